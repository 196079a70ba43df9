"""Images with a mask each: two folders of the same file names, and what the masks' values or colours mean."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import SerialLoraError
from ...heads.segmentation import IGNORE_INDEX
from .images import Item, find_images
from .labelled import Mask, open_dataset, read_row

LabelMap = Mapping[str, Any]
"""{class name: value, or [red, green, blue]} in the order of the classes; "ignore" names pixels that do not count."""


def read_label_map(path: str | Path) -> LabelMap:
    """A JSON file like `{"background": 0, "cat": 1, "ignore": 255}`, or with colours.

    Where any class has a colour, a plain value v stands for the grey [v, v, v].

    Raises:
        SerialLoraError: If the file is missing or no such mapping, or two classes share a value.
    """
    try:
        label_map = json.loads(Path(path).read_text(encoding="utf-8"))
        keys = _keys(label_map).values()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SerialLoraError(
            f'--label_map {path} must be JSON like {{"background": 0, "cat": 1, "ignore": 255}} or '
            f'{{"background": [0, 0, 0], "cat": [255, 0, 0], "ignore": [255, 255, 255]}}: {error}.'
        ) from error
    if len(set(keys)) != len(keys) or not 2 <= len(class_names(label_map)) <= IGNORE_INDEX:
        raise SerialLoraError(
            f"--label_map {path} must give from 2 to {IGNORE_INDEX} classes, each a value of its own; got {len(keys)}."
        )
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
    stems = Counter(Path(item.name).stem for item in items)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise SerialLoraError(
            f"{folder}/images has several files called {', '.join(twice[:5])}: one mask is not enough."
        )
    missing = [item.name for item in items if Path(item.name).stem not in available]
    if missing:
        raise SerialLoraError(f"{folder}/masks has no mask for {', '.join(missing[:5])}: give one of the same name.")
    readers = {item.name: partial(read_mask, available[Path(item.name).stem], label_map) for item in items}
    return _checked(items, readers), readers


def mask_dataset(
    name: str, split: str, image_column: str, mask_column: str, label_map: LabelMap
) -> tuple[list[Item], dict[str, Callable[[], Mask]]]:
    """The same from a data set of the `datasets` library, with a column of images and one of masks as images.

    Raises:
        SerialLoraError: As for a folder, or if there is no such data set, split or column.
    """
    opened = open_dataset(name, split, image_column, mask_column)

    def read(row: int) -> Mask:
        return mask_of(opened[row][mask_column], label_map, f"the mask of row {row}")

    images = [partial(read_row, opened, row, image_column) for row in range(len(opened))]
    sizes = [image().size for image in images]
    items = [Item(f"row {i}", images[i], (height, width)) for i, (width, height) in enumerate(sizes)]
    readers = {item.name: partial(read, row) for row, item in enumerate(items)}
    return _checked(items, readers), readers


def read_mask(path: Path, label_map: LabelMap) -> Mask:
    """One mask as class indices (H, W) of uint8, 255 where a pixel does not count.

    Raises:
        SerialLoraError: If the file is no image, or holds a value or colour that the map does not name.
    """
    try:
        with Image.open(path) as image:
            return mask_of(image, label_map, str(path))
    except (OSError, UnidentifiedImageError) as error:
        raise SerialLoraError(f"{path} cannot be read as a mask: {error}.") from error


def mask_of(image: Image.Image, label_map: LabelMap, name: str) -> Mask:
    """The same of an image, turned upright as images are; `name` is for errors."""
    image = ImageOps.exif_transpose(image)
    if _has_colours(label_map):
        values = np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    elif image.mode in ("P", "L", "1", "I", "I;16"):  # a palette's indices are the values
        values = np.asarray(image)
    else:
        values = np.asarray(image.convert("RGB"))
        if (values != values[..., :1]).any():
            raise SerialLoraError(f"{name} is in colour, and the label map gives no colour: write it as [r, g, b].")
        values = values[..., 0]
    classes = class_names(label_map)
    lookup = {key: IGNORE_INDEX if name == "ignore" else classes.index(name) for name, key in _keys(label_map).items()}
    found, inverse = np.unique(values, return_inverse=True)
    if unknown := [int(value) for value in found if int(value) not in lookup]:
        shown = [f"#{value:06x}" if _has_colours(label_map) else str(value) for value in unknown[:5]]
        raise SerialLoraError(f"{name} holds the values {', '.join(shown)}, which the label map does not name.")
    return np.array([lookup[int(value)] for value in found], np.uint8)[inverse].reshape(values.shape)


def _checked(items: list[Item], readers: Mapping[str, Callable[[], Mask]]) -> list[Item]:
    for item in items:
        if (shape := readers[item.name]().shape) != item.size:
            raise SerialLoraError(f"the mask of {item.name} has {shape} pixels (height, width), its image {item.size}.")
    return items


def _has_colours(label_map: LabelMap) -> bool:
    return any(isinstance(value, Sequence) and not isinstance(value, str) for value in label_map.values())


def _keys(label_map: LabelMap) -> dict[str, int]:
    """Every name's value, or colour as one number; among colours a value stands for a grey."""
    if not _has_colours(label_map):
        return {name: _whole(value, 65535) for name, value in label_map.items()}
    keys = {}
    for name, value in label_map.items():
        red, green, blue = (_whole(part, 255) for part in (value if isinstance(value, Sequence) else [value] * 3))
        keys[name] = (red << 16) + (green << 8) + blue
    return keys


def _whole(value: Any, most: int) -> int:
    if isinstance(value, bool) or int(value) != float(value) or not 0 <= int(value) <= most:
        raise ValueError(f"{value!r} is no whole number from 0 to {most}")
    return int(value)
