"""Judge an adapter while it trains: a loss whose noise and times never change, and grids of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..data.batches import Batch, Fetch, Rows, Shape
from ..data.images import Item
from ..randomness import generator, generators
from .objectives import Objective

Predict = Callable[[Tensor, Tensor, Batch], Tensor]


class Fixed(Protocol):
    """Validation images that are the same at every call, one to a batch, and their clean latents."""

    def fixed(self) -> Iterator[Batch]:
        """The batches."""
        ...

    def latents(self, batch: Batch) -> Tensor:
        """Clean latents of a batch."""
        ...


def denoising_losses(
    objective: Objective, predict: Predict, x0: Tensor, batch: Batch, times: Tensor | None = None
) -> Tensor:
    """The loss of every sample, (B,), at random times or at given ones; noise and times come from the batch's counters.

    Args:
        objective: The loss.
        predict: The transformer: noisy latents, its timesteps (B,) and the batch to its output.
        x0: Clean latents (B, C, h, w).
        batch: What the latents are of.
        times: Times to use instead of random ones, (B,).
    """
    noise = batch.noise(x0)
    times = objective.sample_times(batch.draws("times")) if times is None else times
    xt = objective.add_noise(x0, noise, times)
    output = predict(xt, objective.timesteps(times).to(x0.device), batch)
    return objective.loss(output, x0, noise, xt, times.to(x0.device))


def fixed_batches(items: Sequence[Item], shapes: list[Shape], fetch: Fetch, seed: int) -> Iterator[Batch]:
    """Each item alone, always with the same cut, noise and times."""
    rows = Rows.of(items, shapes, 1, seed)
    for index, (item, shape) in enumerate(zip(items, rows.shapes, strict=True)):
        number = -1 - index  # training counts from 0: no draw is shared with it
        inputs = fetch(item, shape, generator(seed, "validation", index))[None]
        yield Batch(number, [0], [item], torch.zeros(1, dtype=torch.bool), inputs, shape, seed)


@torch.no_grad()
def fixed_noise_loss(objective: Objective, predict: Predict, samples: Fixed, times: int = 8) -> float:
    """Mean loss of the validation images at `times` stratified times each, with noise that never changes."""
    losses = []
    for batch in samples.fixed():
        x0 = samples.latents(batch)
        for index, time in enumerate(objective.stratified_times(times)):
            own_noise = replace(batch, samples=[index])
            losses.append(denoising_losses(objective, predict, x0, own_noise, time[None]))
    return torch.cat(losses).mean().item()


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, side by side, `columns` to a row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def sample_generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator per validation image, the same at every validation."""
    return generators(seed, "validation image", 0, range(count))
