"""Pictures of predictions: a segmentation over its image with the names of its classes, and sheets of images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...heads.segmentation import IGNORE_INDEX

T = TypeVar("T")


def palette(classes: int) -> np.ndarray:
    """A colour per class, (classes, 3) of uint8: the first (background) black, the others far apart in hue."""
    hues = [(i * 0.618034) % 1 for i in range(classes - 1)]  # the golden ratio keeps any number of hues apart
    colours = [colorsys.hsv_to_rgb(hue, 0.9, 1.0) for hue in hues]
    return np.array([(0, 0, 0), *(tuple(round(255 * c) for c in colour) for colour in colours)], np.uint8)


def blend(image: Image.Image, mask: np.ndarray, classes: int, opacity: float) -> Image.Image:
    """The image with the classes of its mask (H, W) in colour; the first, and pixels of 255, are left clear."""
    coloured = (mask != 0) & (mask != IGNORE_INDEX)
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    paint = palette(classes)[np.where(coloured, mask, 0)]
    mixed = np.where(coloured[..., None], (1 - opacity) * pixels + opacity * paint, pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay(image: Image.Image, mask: np.ndarray, names: Sequence[str], opacity: float = 0.55) -> Image.Image:
    """The image with its classes in colour (the first is left clear), and a legend of those that occur below.

    Args:
        image: An RGB image.
        mask: Class of each pixel, (H, W); 255 is left clear.
        names: Names of the classes.
        opacity: Weight of the colours, from 0 to 1.
    """
    colours, mixed = palette(len(names)), blend(image, mask, len(names), opacity)
    present = [i for i in range(1, len(names)) if (mask == i).any()]
    row = max(14, image.height // 40)  # pixels of one line of the legend
    font = ImageFont.load_default(round(0.8 * row))
    width = max([image.width, *(row + 6 + math.ceil(font.getlength(names[i])) for i in present)])
    picture = Image.new("RGB", (width, image.height + row * len(present)), "white")
    picture.paste(mixed, (0, 0))
    draw = ImageDraw.Draw(picture)
    for number, i in enumerate(present):
        y = image.height + number * row
        draw.rectangle((2, y + 2, row - 3, y + row - 3), fill=tuple(int(c) for c in colours[i]))
        draw.text((row + 2, y + row // 2), names[i], fill="black", font=font, anchor="lm")
    return picture


def captioned(image: Image.Image, caption: str, side: int = 160) -> Image.Image:
    """The image within a square of so many pixels, on white, and a line below it."""
    picture = Image.new("RGB", (side, side + 20), "white")
    small = ImageOps.contain(image.convert("RGB"), (side, side))
    picture.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    ImageDraw.Draw(picture).text((side // 2, side + 10), caption, fill="black", font_size=12, anchor="mm")
    return picture


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images beside and below each other, in columns of one width."""
    width = max(image.width for row in rows for image in row)
    heights = [max(image.height for image in row) for row in rows]
    whole = Image.new("RGB", (width * max(map(len, rows)), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            whole.paste(image, (column * width, sum(heights[:number])))
    return whole


def spread(items: Sequence[T], most: int) -> list[T]:
    """Some of the items, evenly spread: those of a folder lie class by class."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
