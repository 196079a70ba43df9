"""Randomness from counters: every draw is a function of (seed, what for, step, sample), so nothing needs restoring.

A run that is resumed, or spread over another number of processes, draws the same noise for the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def counter_seed(seed: int, *counters: int | str) -> int:
    """A 63-bit seed from the run's seed and any counters (Python's own hash is salted per process)."""
    digest = hashlib.blake2b(repr((seed, *counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *counters: int | str) -> torch.Generator:
    """A CPU generator for (seed, *counters): the same numbers whatever the device."""
    return torch.Generator().manual_seed(counter_seed(seed, *counters))


def generators(seed: int, purpose: str, step: int, samples: Sequence[int]) -> list[torch.Generator]:
    """One generator per sample of a batch."""
    return [generator(seed, purpose, step, sample) for sample in samples]


def randn(draws: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise of `like`'s shape (B, ...), sample b from `draws[b]`: fp32, on `like`'s device."""
    noise = torch.stack([torch.randn(like.shape[1:], generator=draw) for draw in draws])
    return noise.to(like.device)
