"""What is measured while an adapter trains: a loss whose noise and times never change, and grids of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.batches import Batch, Fetch, masks_of
from ..data.images import Item, Shape
from ..data.order import nearest_shape
from ..randomness import generator, generators
from .processes import Process


def fixed_batches(items: Sequence[Item], shapes: list[Shape], fetch: Fetch, seed: int) -> Iterator[Batch]:
    """Each item alone, always with the same cut, noise and times."""
    for index, item in enumerate(items):
        number, shape = -1 - index, nearest_shape(item, shapes)  # training counts from 0: no draw is shared with it
        inputs = fetch(item, shape, generator(seed, "validation", index))[None]
        masks = masks_of(fetch, [item], shape, [generator(seed, "validation", index)])
        yield Batch(number, [0], [item], torch.zeros(1, dtype=torch.bool), inputs, shape, seed, torch.ones(1), masks)


@torch.no_grad()
def fixed_noise_loss(
    process: Process, batches: Iterator[Batch], losses_of: Callable[[Batch, Tensor], Tensor], count: int = 8
) -> float:
    """Mean loss of the validation images at `count` stratified times each, with noise that never changes.

    Args:
        process: Knows the times of training.
        batches: The images, one to a batch, the same at every call.
        losses_of: Losses of a batch at given times, (B,).
        count: How many times.
    """
    losses = []
    for batch in batches:
        for index, time in enumerate(process.stratified_times(count)):
            own_noise = replace(batch, samples=[index])
            losses.append(losses_of(own_noise, time[None]))
    return torch.cat(losses).mean().item()


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, side by side, `columns` to a row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def side_by_side(pictures: Mapping[int, Path], most: int = 12, width: int = 320) -> Image.Image:
    """The pictures of several steps beside each other, each under the number of its step.

    Args:
        pictures: {step: picture}, in order.
        most: How many at most: the first, the last, and evenly spread ones between.
        width: What each is scaled down to, in pixels, if it is wider.
    """
    steps = list(pictures)
    count = min(most, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    columns = []
    for step in chosen:
        with Image.open(pictures[step]) as picture:
            small = picture.convert("RGB")
        if small.width > width:
            small = small.resize((width, max(1, round(small.height * width / small.width))))
        column = Image.new("RGB", (max(small.width, 64) + 4, small.height + 16), "white")
        column.paste(small, (2, 14))
        ImageDraw.Draw(column).text((2, 1), f"step {step}", fill="black")
        columns.append(column)
    sheet = Image.new("RGB", (sum(c.width for c in columns), max(c.height for c in columns)), "white")
    left = 0
    for column in columns:
        sheet.paste(column, (left, 0))
        left += column.width
    return sheet


def sample_generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator per validation image, the same at every validation."""
    return generators(seed, "validation image", 0, range(count))
