"""Images with a mask each: two folders of the same file names, and what the masks' values or colours mean."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...errors import SerialLoraError
from ...heads.segmentation import IGNORE_INDEX
from .folders import uncaptioned, weights_of
from .images import SUFFIXES, Item, opened, read_row, whole
from .labelled import Mask, open_dataset

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
    items = uncaptioned(Path(folder) / "images").report().items
    readers = {
        name: partial(read_mask, path, label_map) for name, path in paired(items, Path(folder) / "masks").items()
    }
    return _checked(items, readers), readers


def paired(items: Sequence[Item], folder: Path) -> dict[str, Path]:
    """The file of each image's mask, by the image's name: the one of the same name but for its ending.

    Raises:
        SerialLoraError: If one has no mask, or two have one, or one has two.
    """
    available: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            available.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    stems = {item.name: PurePosixPath(item.name).with_suffix("").as_posix() for item in items}
    counts = Counter(stems.values())
    for name, stem in stems.items():
        if counts[stem] > 1:
            raise SerialLoraError(f"there are several images called {stem}: one mask is not enough.")
        if (there := len(available.get(stem, ()))) != 1:
            given = f"has no mask for {name}" if not there else f"has {there} masks for {name}"
            raise SerialLoraError(f"{folder} {given}: give one of the same name.")
    return {name: available[stem][0] for name, stem in stems.items()}


def mask_dataset(
    name: str, split: str, image_column: str, mask_column: str, label_map: LabelMap, weight_column: str | None = None
) -> tuple[list[Item], dict[str, Callable[[], Mask]]]:
    """The same from a data set of the `datasets` library, with a column of images and one of masks as images.

    Raises:
        SerialLoraError: As for a folder, or if there is no such data set, split or column.
    """
    opened = open_dataset(name, split, image_column, mask_column, *([weight_column] if weight_column else ()))

    def read(row: int) -> Mask:
        return mask_of(opened[row][mask_column], label_map, f"the mask of row {row}")

    images = [partial(read_row, opened, row, image_column) for row in range(len(opened))]
    sizes = [image().size for image in images]
    weights = weights_of(opened, weight_column)
    items = [Item(f"row {i}", images[i], (h, w), weight=weights[i]) for i, (w, h) in enumerate(sizes)]
    readers = {item.name: partial(read, row) for row, item in enumerate(items)}
    return _checked(items, readers), readers


def read_mask(path: Path, label_map: LabelMap) -> Mask:
    """One mask as class indices (H, W) of uint8, 255 where a pixel does not count.

    Raises:
        SerialLoraError: If the file is not an image, or holds a value or colour that the map does not name.
    """
    with opened(path) as image:
        return whole(partial(mask_of, label_map=label_map, name=str(path)), image, str(path))


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
        raise ValueError(f"{value!r} is not a whole number from 0 to {most}")
    return int(value)
