"""Images with a class: from a folder per class or a data set, held out, few-shot, and augmented the same every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import SerialLoraError
from ...heads.framing import TILE
from ...heads.preprocessing import Preprocessing
from ..randomness import generator
from .few_shot import k_shot
from .folders import find_classes, weights_of
from .images import Item, read_row

Mask = np.ndarray  # (H, W) uint8: class of each pixel


def image_folder(folder: str | Path, names: Sequence[str] | None = None) -> tuple[list[Item], list[str]]:
    """The images of a folder that holds one folder per class, and the names of the classes in alphabetical order.

    Args:
        folder: Where the class folders are.
        names: The classes of another folder, whose indices these images are to have.

    Raises:
        SerialLoraError: If there is no class folder, one is not in `names`, or none holds a usable image.
    """
    if names is None:
        given = sorted(p.name for p in Path(folder).glob("*") if p.is_dir() and not p.name.startswith("."))
    else:
        given = list(names)
    index = {name: i for i, name in enumerate(given)}
    return find_classes(folder, index.get).report().items, given


def open_dataset(name: str, split: str, *columns: str, config: str | None = None) -> Any:
    """One split of a data set of the `datasets` library, from the Hub or a folder that `save_to_disk` wrote.

    Raises:
        SerialLoraError: If there is no such data set, split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise SerialLoraError("--dataset_name needs the package datasets: pip install datasets.") from error
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            opened: Any = datasets.load_from_disk(name)
            opened = opened[split] if isinstance(opened, datasets.DatasetDict) else opened
        else:
            opened = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise SerialLoraError(f"--dataset_name {name} cannot be opened (split {split!r}): {error}") from error
    if missing := set(columns) - set(opened.column_names):
        raise SerialLoraError(f"the data set has no column {sorted(missing)}; it has {opened.column_names}.")
    return opened


def hub_dataset(
    name: str,
    split: str,
    image_column: str,
    label_column: str,
    names: Sequence[str] | None = None,
    weight_column: str | None = None,
) -> tuple[list[Item], list[str]]:
    """The rows of a data set, and the names of the classes: a ClassLabel's own, else the sorted values.

    Args:
        name: The data set, see `open_dataset`.
        split: Its split.
        image_column: Its column of images.
        label_column: Its column of classes.
        names: The classes of another split, whose indices these rows are to have.
        weight_column: Its column of weights, if it has one.

    Raises:
        SerialLoraError: If the data set cannot be opened, or a row has no class, or one that is not in `names`.
    """
    opened = open_dataset(name, split, image_column, label_column, *([weight_column] if weight_column else ()))
    values = opened[label_column]
    own = getattr(opened.features[label_column], "names", None)
    if none := [row for row, value in enumerate(values) if value is None or (own and not 0 <= value < len(own))]:
        raise SerialLoraError(f"row {none[0]} of the data set has the class {values[none[0]]!r}: leave such rows out.")
    called = [own[value] if own else str(value) for value in values]
    numbers = not own and all(isinstance(value, int) for value in values)
    given = own or sorted(set(called), key=int if numbers else None)
    known = list(given if names is None else names)
    if unknown := [row for row, label in enumerate(called) if label not in known]:
        row = unknown[0]
        raise SerialLoraError(f"row {row} of the data set has the class {called[row]!r}; known: {', '.join(known)}.")
    read = [partial(read_row, opened, row, image_column) for row in range(len(opened))]
    return [
        Item(f"row {i}", r, (0, 0), "", known.index(label), weight=weight)
        for i, (r, label, weight) in enumerate(zip(read, called, weights_of(opened, weight_column), strict=True))
    ], known


def hold_out(
    items: Sequence[Item], fraction: float, seed: int, names: Sequence[str] | None = None
) -> tuple[list[Item], list[Item]]:
    """The items to train on and those to validate on: `fraction` of every class, at least one and never all.

    Raises:
        SerialLoraError: If the fraction is not in (0, 1), or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise SerialLoraError(f"--validation_fraction must lie between 0 and 1; got {fraction}.")
    held: set[int] = set()
    for label in sorted({item.label for item in items}):
        own = [i for i, item in enumerate(items) if item.label == label]
        if len(own) < 2:
            name = names[label] if names else label
            raise SerialLoraError(f"class {name} has one image: none can be held out. Give validation images.")
        count = min(max(1, round(len(own) * fraction)), len(own) - 1)
        order = torch.randperm(len(own), generator=generator(seed, "held out", label)).tolist()
        held |= {own[i] for i in order[:count]}
    return [item for i, item in enumerate(items) if i not in held], [items[i] for i in sorted(held)]


def few_shots(items: Sequence[Item], shots: int, seed: int, names: Sequence[str] | None = None) -> list[Item]:
    """`shots` items of every class, the same for the same seed; 0 for all."""
    return [items[i] for i in k_shot([item.label for item in items], shots, seed, names)]


@dataclass(frozen=True)
class Fetch:
    """Reads an item for training: a random part of the image, of random shape or as large as a tile, perhaps mirrored.

    Args:
        prepare: The backbone's normalisation.
        smallest: Smallest share of the image's area that a part may have; 1 takes the whole image.
        flip: Mirror half of the draws.
        masks: {item's name: reader of its mask}; the mask then comes as a fourth channel, 255 on padding. Without, that
            is 1 on the image and 0 on padding, where images are padded.
    """

    prepare: Preprocessing
    smallest: float = 1.0
    flip: bool = False
    masks: Mapping[str, Callable[[], Mask]] = field(default_factory=dict)

    def __call__(self, item: Item, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
        """Pixel values (3, H, W), or with a mask (4, H, W)."""
        image, prepare = item.read(), replace(self.prepare, size=shape)
        mask = Image.fromarray(self.masks[item.name]()) if self.masks else None
        box, mirrored = self._part(image.size, shape, draw)

        def part(whole: Image.Image) -> Image.Image:
            return ImageOps.mirror(whole.crop(box)) if mirrored else whole.crop(box)

        pixels = prepare(part(image))  # (3, H, W)
        frame = prepare.frame((box[3] - box[1], box[2] - box[0]))
        if mask is not None:
            return torch.cat([pixels, frame.labels(part(mask)).float()[None]])  # (4, H, W)
        return torch.cat([pixels, frame.pixel_mask()[None]]) if prepare.pads else pixels

    def mask(self, item: Item, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
        """What the pixels weigh, (1, H, W), of the same part, mirrored alike, as with the same draws."""
        if item.mask is None:
            return torch.ones(1, *shape)
        mask = item.mask()
        box, mirrored = self._part(mask.size, shape, draw)
        part = ImageOps.mirror(mask.crop(box)) if mirrored else mask.crop(box)
        frame = replace(self.prepare, size=shape).frame((part.height, part.width))
        grey = torch.from_numpy(np.array(frame.resized(part)))[None].float() / 255
        return frame.fill(item.floor + (1 - item.floor) * grey, 0.0)

    def _part(
        self, size: tuple[int, int], shape: tuple[int, int], draw: torch.Generator
    ) -> tuple[tuple[int, int, int, int], bool]:
        """The part of an image of a width and height that is taken, and whether it is mirrored."""
        tiled = self.prepare.resize_mode == TILE
        box = random_window(size, shape, draw) if tiled else random_box(size, self.smallest, draw)
        return box, self.flip and bool(torch.rand(1, generator=draw) < 0.5)


def random_box(size: tuple[int, int], smallest: float, draw: torch.Generator) -> tuple[int, int, int, int]:
    """A part of an image: (left, top, right, bottom), of `smallest` to all of its area and a ratio within 3:4 of its.

    Args:
        size: Width and height of the image.
        smallest: Smallest share of the area.
        draw: Where the randomness comes from.
    """
    if smallest >= 1:
        return (0, 0, *size)
    area, ratio, x, y = torch.rand(4, generator=draw).tolist()
    side = math.sqrt(smallest + (1 - smallest) * area)
    stretch = math.exp((2 * ratio - 1) * math.log(4 / 3) / 2)
    width = max(1, round(size[0] * min(1.0, side * stretch)))
    height = max(1, round(size[1] * min(1.0, side / stretch)))
    left, top = round(x * (size[0] - width)), round(y * (size[1] - height))
    return left, top, left + width, top + height


def random_window(size: tuple[int, int], shape: tuple[int, int], draw: torch.Generator) -> tuple[int, int, int, int]:
    """A part of an image as large as a tile, or all of a side that is smaller: (left, top, right, bottom).

    Args:
        size: Width and height of the image.
        shape: Height and width of the tile.
        draw: Where the randomness comes from.
    """
    width, height = min(size[0], shape[1]), min(size[1], shape[0])
    left = int(torch.randint(size[0] - width + 1, (1,), generator=draw))
    top = int(torch.randint(size[1] - height + 1, (1,), generator=draw))
    return left, top, left + width, top + height
