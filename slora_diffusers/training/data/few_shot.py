"""The same few images per class for everyone who names the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from ...errors import SerialLoraError
from ..randomness import generator


def k_shot(labels: Sequence[int], shots: int, seed: int, names: Sequence[str] | None = None) -> list[int]:
    """Indices of `shots` samples of every class, drawn without repetition; 0 shots stands for all samples.

    What is drawn of a class follows from the seed and that class's own samples alone: other classes, and the number
    of shots (more shots add samples), do not change it.

    Args:
        labels: Class of every sample.
        shots: Samples per class.
        seed: Seed of the draw.
        names: Names of the classes, for the error.

    Raises:
        SerialLoraError: If a class has fewer samples.
    """
    if shots < 0:
        raise SerialLoraError(f"shots must be at least 0; got {shots}.")
    if shots == 0:
        return list(range(len(labels)))
    if few := {label: n for label, n in sorted(Counter(labels).items()) if n < shots}:
        shown = ", ".join(f"{names[label] if names else label} ({n})" for label, n in few.items())
        raise SerialLoraError(
            f"{shots} shots need as many images of every class; these classes have fewer: {shown}. Images held out for "
            "validation do not count: give fewer shots, or validation images of their own."
        )
    chosen: list[int] = []
    for label in sorted(set(labels)):
        own = [index for index, other in enumerate(labels) if other == label]
        order = torch.randperm(len(own), generator=generator(seed, "shots", label)).tolist()
        chosen += [own[i] for i in order[:shots]]
    return sorted(chosen)
