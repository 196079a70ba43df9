"""One training image: what a run knows of it, how it is read as upright RGB, and how it is cut to a shape."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

from ...errors import SerialLoraError
from ...heads.preprocessing import upright_rgb
from .identity import key_of

# What opens files of an ending that Pillow itself may not read: (package to install, module, its function).
_HEIF = ("pillow-heif", "pillow_heif", "register_heif_opener")
_PLUGINS = {
    ".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".avif": ("pillow-avif-plugin", "pillow_avif", None),
}  # fmt: skip
_PILLOWS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES = frozenset({*_PILLOWS, *_PLUGINS})
DECODE_AT_MOST = 20_000  # every image is decoded before training, unless there are more than this
Shape = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Item:
    """One training image, and what a run is to make of it.

    Attributes:
        name: What to call it in messages.
        read: Reads it as upright RGB.
        size: Height and width in pixels.
        caption: What it shows.
        label: Its class.
        variants: Other forms of the caption; each sample draws one. Empty for the caption itself.
        weight: Weight of its loss.
        repeats: How often an epoch shows it.
        concept: Which of the run's data sets it belongs to.
        shapes: Shapes that it may be cut to, if not the run's.
        mask: Reads which pixels count in the loss, as grey values of the image's size; None for all.
        floor: Weight of a pixel where the mask is black.
    """

    name: str
    read: Callable[[], Image.Image] = field(repr=False, compare=False)
    size: Shape
    caption: str = ""
    label: int = 0
    variants: tuple[str, ...] = ()
    weight: float = 1.0
    repeats: int = 1
    concept: int = 0
    shapes: tuple[Shape, ...] = ()
    mask: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)
    floor: float = 0.0

    @cached_property
    def mask_content(self) -> str:
        """Key of the mask."""
        mask = None if self.mask is None else self.mask()
        return key_of(None) if mask is None else key_of(mask.mode, list(mask.size), mask.tobytes(), self.floor)

    def told(self, draw: torch.Generator) -> Item:
        """The item with one of its caption's forms, drawn, as its caption."""
        if not self.variants:
            return self
        return replace(self, caption=self.variants[int(torch.randint(len(self.variants), (1,), generator=draw))])

    @cached_property
    def content(self) -> str:
        """Key of the pixels: what tells one image from another. Names do not, for 0.png is in many folders."""
        image = self.read()
        return key_of(image.mode, list(image.size), image.tobytes())


def content_of(*groups: Sequence[Item]) -> str:
    """Key of what groups of images are and how they are used, in their order; names and places do not matter.

    Of more than 20,000 images it tells the sizes and captions alone: reading all of them would take minutes.
    """
    items = [item for group in groups for item in group]
    read = len(items) <= DECODE_AT_MOST
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        contents = list(pool.map(_content if read else lambda item: "", items))
    used = [[i.size, i.caption, i.variants, i.label, i.weight, i.repeats, i.concept, i.shapes, i.floor] for i in items]
    return key_of([len(group) for group in groups], contents, used)


def _content(item: Item) -> str:
    try:
        return item.content if item.mask is None else key_of(item.content, item.mask_content)
    except SerialLoraError:  # it has gone since it was found, and counts for nothing
        return ""


def read_image(path: Path) -> Image.Image:
    """One file as upright RGB.

    Raises:
        SerialLoraError: If the file is not a whole image, or one of more pixels than Pillow opens.
    """
    with opened(path) as image:
        return whole(upright_rgb, image, str(path))


def opened(path: Path) -> Image.Image:
    """A file as an image that is not decoded yet, with the plug-in that its ending needs.

    Raises:
        SerialLoraError: If it cannot be, or the plug-in is not installed.
    """
    _use_plugin(path.suffix.lower())
    return whole(Image.open, path, str(path))


def whole(read: Callable[[Any], Any], source: Any, name: str) -> Any:
    """What a reader makes of an image.

    Raises:
        SerialLoraError: If the image is damaged: Pillow's plug-ins then raise nearly anything.
    """
    try:
        return read(source)
    except SerialLoraError:
        raise
    except Exception as error:
        raise SerialLoraError(f"{name} cannot be read as an image: {error}. Replace or remove it.") from error


def read_row(dataset: Any, row: int, column: str) -> Image.Image:
    """The image in one row of a data set, as upright RGB.

    Raises:
        SerialLoraError: If it is not a whole image.
    """
    return whole(lambda index: upright_rgb(dataset[index][column]), row, f"row {row}")


def read_tag(path: Path, name: str) -> str | None:
    """A text that was written into a PNG file, or None."""
    with opened(path) as image:
        return image.info.get(name)


def upright_size(path: Path) -> Shape:
    """Height and width of a file as its header tells them, turned as EXIF says."""

    def size(image: Image.Image) -> Shape:
        turned = image.getexif().get(0x0112, 1) > 4
        return image.size if turned else (image.height, image.width)

    with opened(path) as image:
        return whole(size, image, str(path))


def from_tensors(images: Tensor, labels: Sequence[int], name: str = "image") -> list[Item]:
    """Items from images that are in memory: uint8 (N, H, W) or (N, H, W, 3)."""
    pictures = [Image.fromarray(image.numpy()).convert("RGB") for image in images]
    return [
        Item(f"{name} {i}", picture.copy, (picture.height, picture.width), "", int(label))
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]


def to_pixels(
    image: Image.Image,
    size: Shape,
    draw: torch.Generator | None = None,
    crop: bool = False,
    flip: bool = False,
) -> Tensor:
    """`cut` as pixels in [-1, 1], (3, H, W)."""
    return torch.from_numpy(np.array(cut(image, size, draw, crop, flip))).permute(2, 0, 1).float() / 127.5 - 1


def mask_pixels(
    item: Item, size: Shape, draw: torch.Generator | None = None, crop: bool = False, flip: bool = False
) -> Tensor:
    """What each pixel of the image, cut in the same way, weighs in the loss: (1, H, W) in [0, 1]."""
    if item.mask is None:
        return torch.ones(1, *size)
    grey = torch.from_numpy(np.array(cut(item.mask(), size, draw, crop, flip))).float()[None] / 255
    return item.floor + (1 - item.floor) * grey


def cut(
    image: Image.Image,
    size: Shape,
    draw: torch.Generator | None = None,
    crop: bool = False,
    flip: bool = False,
) -> Image.Image:
    """Scale an image until it covers `size` (height, width), and cut it there.

    Only the part that is kept is scaled, so that a strip of 6000 x 20 pixels needs no memory for the rest.

    Args:
        image: An image.
        size: Height and width in pixels.
        draw: Where the place of a random cut and the toss of a flip come from; None means centred and not flipped.
        crop: Cut at a random place instead of the centre.
        flip: Mirror half of the draws.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    room_y, room_x = covering[1] - height, covering[0] - width
    top, left = room_y // 2, room_x // 2
    if draw is not None and crop:
        top = int(torch.randint(room_y + 1, (1,), generator=draw))
        left = int(torch.randint(room_x + 1, (1,), generator=draw))
    if covering == image.size:
        image = image.crop((left, top, left + width, top + height))
    else:
        x, y = image.width / covering[0], image.height / covering[1]  # pixels of the image per pixel of the result
        box = (left * x, top * y, min(image.width, (left + width) * x), min(image.height, (top + height) * y))
        image = image.resize((width, height), Image.Resampling.LANCZOS, box)
    if draw is not None and flip and torch.rand(1, generator=draw) < 0.5:
        image = ImageOps.mirror(image)
    return image


@cache
def _use_plugin(suffix: str) -> None:
    if suffix not in _PLUGINS or (suffix == ".avif" and features.check("avif")):
        return
    package, module, register = _PLUGINS[suffix]
    if importlib.util.find_spec(module) is None:
        raise SerialLoraError(f"{suffix} files need the package {package}: pip install {package}.")
    loaded = importlib.import_module(module)
    if register is not None:
        getattr(loaded, register)()
