"""Which samples every micro-batch of every process holds: a pure function of (seed, number of the micro-batch, rank).

A *row* is what all processes read at one micro-step: `batch size x processes` samples of one shape. Process r takes its
r-th part. So two processes with batches of 2 see what one process with batches of 4 sees, and a resumed run goes on
with the row that comes next.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import SerialLoraError
from ..randomness import generator, generators, randn
from .images import Item

Shape = tuple[int, int]
Fetch = Callable[[Item, Shape, torch.Generator], Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        number: Number of the micro-step, from 0.
        samples: Position of every sample in the row, unique over processes.
        items: What the samples are; those of the class (prior preservation) come after the subject's.
        prior: Which samples are of the class, (B,).
        inputs: Pixels (B, 3, H, W), or the cached moments of the latents (B, 2 C, h, w).
        shape: Height and width in pixels.
        seed: The run's seed.
    """

    number: int
    samples: list[int]
    items: list[Item]
    prior: Tensor
    inputs: Tensor
    shape: Shape
    seed: int

    def draws(self, purpose: str) -> list[torch.Generator]:
        """A generator per sample for one purpose: "noise", "times", ..."""
        return generators(self.seed, purpose, self.number, self.samples)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise for latents `like`, (B, C, h, w) in fp32."""
        return randn(self.draws("noise"), like)

    def dropped(self, probability: float) -> Tensor:
        """Which samples lose their condition, (B,) of bool."""
        return torch.cat([torch.rand(1, generator=draw) for draw in self.draws("dropout")]) < probability


def bucket_shapes(resolution: int, buckets: str | None, multiple: int) -> list[Shape]:
    """The shapes (height, width) that images are cut to.

    Args:
        resolution: Side of the square, and the root of the area of other shapes, in pixels.
        buckets: None for the square alone, "auto" for common aspect ratios, or "height,width;height,width".
        multiple: What every side must be a multiple of (VAE factor times patch size).

    Raises:
        SerialLoraError: If a side is no multiple, or the text cannot be read.
    """
    if buckets == "auto":
        return generate_aspect_ratio_buckets(resolution, divisibility=multiple)
    try:
        shapes = parse_buckets_string(buckets) if buckets else [(resolution, resolution)]
    except ValueError as error:
        raise SerialLoraError(f"--aspect_ratio_buckets must be auto or 'height,width;...'; {error}") from error
    if wrong := [shape for shape in shapes if shape[0] % multiple or shape[1] % multiple or min(shape) < 1]:
        raise SerialLoraError(
            f"{wrong[0][0]} x {wrong[0][1]} pixels do not divide into the model's patches: every side (--resolution, "
            f"--aspect_ratio_buckets) must be a multiple of {multiple}."
        )
    return shapes


class Rows:
    """The order of samples: shuffled anew each epoch, every row of one shape.

    Args:
        shapes: Shape of each item.
        size: Samples per row, over all processes.
        seed: The run's seed.
    """

    def __init__(self, shapes: Sequence[Shape], size: int, seed: int) -> None:
        self.shapes, self.size, self.seed = list(shapes), size, seed
        # The last row of a shape is filled up from the start of that shape's order.
        self.per_epoch = sum(-(-count // size) for count in Counter(self.shapes).values())
        self._table: tuple[int, list[list[int]]] = (-1, [])

    @classmethod
    def of(cls, items: Sequence[Item], shapes: list[Shape], size: int, seed: int) -> Rows:
        """Give every item the shape nearest to its own aspect ratio."""
        return cls([shapes[find_nearest_bucket(*item.size, shapes) or 0] for item in items], size, seed)

    def __getitem__(self, number: int) -> list[int]:
        """The items of row `number`, counted over epochs."""
        epoch, position = divmod(number, self.per_epoch)
        if self._table[0] != epoch:
            self._table = (epoch, self._shuffle(epoch))
        return self._table[1][position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, "order", epoch)
        members: dict[Shape, list[int]] = {}
        for index in torch.randperm(len(self.shapes), generator=draw).tolist():
            members.setdefault(self.shapes[index], []).append(index)
        rows = []
        for _, indices in sorted(members.items()):
            filled = indices + [indices[i % len(indices)] for i in range(-len(indices) % self.size)]
            rows += [filled[start : start + self.size] for start in range(0, len(filled), self.size)]
        if len(members) == 1:
            return rows
        return [rows[i] for i in torch.randperm(len(rows), generator=draw).tolist()]


class Batches(Dataset[Batch]):
    """Every micro-batch of one process, by number.

    Args:
        items: The images.
        rows: Their order.
        fetch: Reads one item at one shape, drawing its cut and flip from a generator.
        rank: Number of this process.
        processes: Count of processes.
        prior: Images of the class; as many of them as of the subject go into every batch.
    """

    def __init__(
        self, items: Sequence[Item], rows: Rows, fetch: Fetch, rank: int = 0, processes: int = 1,
        prior: Sequence[Item] = (),
    ) -> None:  # fmt: skip
        if rows.size % processes:
            raise SerialLoraError(f"{processes} processes cannot share rows of {rows.size} samples.")
        self.items, self.rows, self.fetch, self.rank, self.prior = items, rows, fetch, rank, prior
        self.batch_size = rows.size // processes
        # Class images follow their own shuffled order; each is cut to the shape of the batch that it joins.
        self.prior_rows = Rows(((0, 0),) * len(prior), rows.size, rows.seed + 1) if prior else None

    def __getitem__(self, number: int) -> Batch:
        row = self.rows[number]
        shape = self.rows.shapes[row[0]]
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        items, samples = [self.items[row[i]] for i in mine], list(mine)
        if self.prior_rows is not None:
            prior_row = self.prior_rows[number]
            items += [self.prior[prior_row[i]] for i in mine]
            samples += [self.rows.size + i for i in mine]
        draws = generators(self.rows.seed, "augmentation", number, samples)
        inputs = torch.stack([self.fetch(item, shape, draw) for item, draw in zip(items, draws, strict=True)])
        prior = torch.arange(len(items)) >= self.batch_size
        return Batch(number, samples, items, prior, inputs, shape, self.rows.seed)

    def read(self, start: int, workers: int = 0) -> Iterator[Batch]:
        """Micro-batches from `start` on, without end, read ahead by `workers` processes."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, 2**62),
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  it sees one batch, not a list
            persistent_workers=workers > 0,
            # Forked workers inherit threads' locks from tokenizers and BLAS.
            multiprocessing_context="spawn" if workers and os.name != "nt" else None,
        )
        return iter(loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch
