"""Images with a mask each: two folders of the same file names, and what the masks' values or colours mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import SerialLoraError
from ..vision import IGNORE_INDEX
from .data import Item, find_images
from .labelled import Mask

LabelMap = Mapping[str, Any]
"""{class name: value, or [red, green, blue]} in the order of the classes; "ignore" names pixels that do not count."""


def read_label_map(path: str | Path) -> LabelMap:
    """A JSON file like `{"background": 0, "cat": [255, 0, 0], "ignore": 255}`.

    Raises:
        SerialLoraError: If the file is missing or no such mapping, or two classes share a value.
    """
    try:
        label_map = json.loads(Path(path).read_text(encoding="utf-8"))
        keys = [_key(value) for value in label_map.values()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SerialLoraError(
            f'--label_map {path} must be JSON like {{"background": 0, "cat": [255, 0, 0], "ignore": 255}}: {error}.'
        ) from error
    if len(set(keys)) != len(keys) or len(class_names(label_map)) < 2:
        raise SerialLoraError(f"--label_map {path} must give two classes or more, each a value of its own.")
    return label_map


def class_names(label_map: LabelMap) -> list[str]:
    """The names of the classes, by index."""
    return [name for name in label_map if name != "ignore"]


def mask_folder(folder: str | Path, label_map: LabelMap) -> tuple[list[Item], dict[str, Callable[[], Mask]]]:
    """The images of `<folder>/images` and, by their names, readers of the masks of the same stem in `<folder>/masks`.

    Every mask is read once here, so that a wrong value is found before training.

    Raises:
        SerialLoraError: If a folder or a mask is missing, of another size than its image, or holds a value that the
            map does not name.
    """
    items = find_images(Path(folder) / "images", captions=None, prompt="").report().items
    available = {path.stem: path for path in sorted((Path(folder) / "masks").glob("*")) if path.is_file()}
    missing = [item.name for item in items if Path(item.name).stem not in available]
    if missing:
        raise SerialLoraError(f"{folder}/masks has no mask for {', '.join(missing[:5])}: give one of the same name.")
    readers = {item.name: partial(read_mask, available[Path(item.name).stem], label_map) for item in items}
    for item in items:
        if (shape := readers[item.name]().shape) != item.size:
            raise SerialLoraError(f"the mask of {item.name} has {shape} pixels (height, width), its image {item.size}.")
    return items, readers


def read_mask(path: Path, label_map: LabelMap) -> Mask:
    """One mask as class indices (H, W) of uint8, 255 where a pixel does not count.

    Raises:
        SerialLoraError: If the file is no image, or holds a value or colour that the map does not name.
    """
    try:
        with Image.open(path) as image:
            colours = any(_is_colour(value) for value in label_map.values())
            # A palette's indices are the values, unless the map speaks of colours.
            values = np.asarray(image.convert("RGB") if colours or image.mode in ("RGB", "RGBA") else image)
    except (OSError, UnidentifiedImageError) as error:
        raise SerialLoraError(f"{path} cannot be read as a mask: {error}.") from error
    if values.ndim == 3:
        values = values.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    classes = class_names(label_map)
    lookup = {_key(v): IGNORE_INDEX if name == "ignore" else classes.index(name) for name, v in label_map.items()}
    found, inverse = np.unique(values, return_inverse=True)
    if unknown := [int(value) for value in found if int(value) not in lookup]:
        shown = [f"#{value:06x}" if values.max() > 255 else str(value) for value in unknown[:5]]
        raise SerialLoraError(f"{path} holds the values {', '.join(shown)}, which the label map does not name.")
    return np.array([lookup[int(value)] for value in found], np.uint8)[inverse].reshape(values.shape)


def _is_colour(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _key(value: Any) -> int:
    """A value, or a colour as one number."""
    if _is_colour(value):
        red, green, blue = (int(part) for part in value)
        return (red << 16) + (green << 8) + blue
    return int(value)
