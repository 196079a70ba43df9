"""Which samples every micro-batch of every process holds: a pure function of (seed, number of the micro-batch, rank).

Process r takes the r-th part of a row (see order.py). So two processes with batches of 2 see what one process with
batches of 4 sees, and a resumed run goes on with the row that comes next. The samples of a short row keep the weight
that they would have in a full one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import SerialLoraError
from ..randomness import generator, generators, randn
from .images import Item, Shape
from .order import ClassOrder, Rows

logger = logging.getLogger(__name__)


class Fetch(Protocol):
    """Reads an item as a tensor, cut to a shape with the draws of a generator."""

    def __call__(self, item: Item, shape: Shape, draw: torch.Generator) -> Tensor:
        """Pixels, or moments of latents."""
        ...

    def mask(self, item: Item, shape: Shape, draw: torch.Generator) -> Tensor:
        """What the pixels weigh in the loss, (1, H, W), after the same cut; asked of items with a mask."""
        ...


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
        weights: What each sample's loss is multiplied by before the mean, (B,): the image's own weight, times how full
            the batch is; 0 for a sample that only keeps a process company, or that could not be read.
        masks: What each pixel weighs in its sample's loss, (B, 1, H, W); None where all count.
    """

    number: int
    samples: list[int]
    items: list[Item]
    prior: Tensor
    inputs: Tensor
    shape: Shape
    seed: int
    weights: Tensor
    masks: Tensor | None = None

    def draws(self, purpose: str) -> list[torch.Generator]:
        """A generator per sample for one purpose: "noise", "times", ..."""
        return generators(self.seed, purpose, self.number, self.samples)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise for latents `like`, (B, C, h, w) in fp32."""
        return randn(self.draws("noise"), like)

    def dropped(self, probability: float) -> Tensor:
        """Which samples lose their condition, (B,) of bool."""
        return torch.cat([torch.rand(1, generator=draw) for draw in self.draws("dropout")]) < probability


def masks_of(fetch: Fetch, items: Sequence[Item], shape: Shape, draws: Sequence[torch.Generator]) -> Tensor | None:
    """What the pixels of items weigh, (B, 1, H, W), cut with the draws that cut the images; None where all count."""
    if all(item.mask is None for item in items):
        return None
    return torch.stack([fetch.mask(item, shape, draw) for item, draw in zip(items, draws, strict=True)])


class Batches(Dataset[Batch]):
    """Every micro-batch of one process, by number.

    Args:
        items: The images.
        rows: Their order.
        fetch: Reads one item at one shape, drawing its cut and flip from a generator.
        rank: Number of this process.
        processes: Count of processes.
        prior: Images of the class; one of its concept's goes into every batch beside each of the subject's.
    """

    def __init__(
        self, items: Sequence[Item], rows: Rows, fetch: Fetch, rank: int = 0, processes: int = 1,
        prior: Sequence[Item] = (),
    ) -> None:  # fmt: skip
        if rows.size % processes:
            raise SerialLoraError(f"{processes} processes cannot share rows of {rows.size} samples.")
        self.items, self.rows, self.fetch, self.rank, self.processes = items, rows, fetch, rank, processes
        self.class_order = ClassOrder(prior, items, rows)
        self._unreadable: set[int] = set()

    def __getitem__(self, number: int) -> Batch:
        row = self.rows[number]
        shape = self.rows.shapes[row[0]]
        mine = range(len(row) * self.rank // self.processes, len(row) * (self.rank + 1) // self.processes)
        idle = not mine  # a row of fewer samples than processes: this one reads a sample that counts for nothing
        own = {position: self.items[row[position]] for position in (mine or (0,))}
        others = {self.rows.size + position: self.class_order(number, position) for position in own}
        others = {sample: item for sample, item in others.items() if item is not None}
        everything = [*own.items(), *others.items()]
        samples, items = [sample for sample, _ in everything], [item for _, item in everything if item is not None]
        inputs, read = self._fetch(items, shape, generators(self.rows.seed, "augmentation", number, samples))
        prior = torch.arange(len(items)) >= len(own)
        # The mean over a part of k samples, times k processes / (samples of the longest row), is the part's share.
        share = torch.where(prior, len(others), len(own)) * self.processes / self.rows.longest * (not idle)
        weights = share * torch.tensor([item.weight for item in items]) * read
        masks = masks_of(self.fetch, items, shape, generators(self.rows.seed, "augmentation", number, samples))
        items = [
            item.told(generator(self.rows.seed, "caption", number, s)) for s, item in zip(samples, items, strict=True)
        ]
        return Batch(number, samples, items, prior, inputs, shape, self.rows.seed, weights, masks)

    def _fetch(self, items: list[Item], shape: Shape, draws: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The inputs of a batch, and which could be read: a file that has gone since the start ends no run."""
        found: list[Tensor | None] = []
        last: SerialLoraError | None = None
        for item, draw in zip(items, draws, strict=True):
            try:
                found.append(self.fetch(item, shape, draw))
            except SerialLoraError as error:
                if id(item) not in self._unreadable:
                    logger.warning("%s is left out from now on: %s", item.name, error)
                self._unreadable.add(id(item))
                found.append(None)
                last = error
        whole = [tensor for tensor in found if tensor is not None]
        if last is not None and not whole:
            raise last
        inputs = torch.stack([torch.zeros_like(whole[0]) if tensor is None else tensor for tensor in found])
        return inputs, torch.tensor([tensor is not None for tensor in found])

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
