"""Learning from what people chose and what they rejected: Diffusion-DPO, and the folder of pairs that it reads.

The objective is one class, as anyone may write it (docs/training.md): it ties the noise of a pair, and asks the model
twice, with the adapter and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import SerialLoraError
from ..data.batches import Batch
from ..data.folders import uncaptioned
from ..data.images import Item
from .objectives import Model, Noised, Objective


@dataclass(frozen=True)
class DPO(Objective):
    """-log sigmoid(-beta / 2 ((e_w - e_w,base) - (e_l - e_l,base))), with e the error on chosen w and rejected l.

    Source: Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization, arXiv 2311.12908, as
    diffusers' script has it.

    Args:
        beta: How strongly the base is kept.
    """

    beta: float = 2500.0

    def draw(self, x0: Tensor, batch: Batch, times: Tensor | None = None) -> Noised:
        """Both images of a pair get the same noise, time and caption."""
        chosen = [item for item, rejected in zip(batch.items, batch.prior.tolist(), strict=True) if not rejected]
        if len(chosen) < len(batch.items):
            rejected = [replace(b, caption=a.caption) for a, b in zip(chosen, batch.items[len(chosen) :], strict=True)]
            batch = replace(batch, items=[*chosen, *rejected], samples=batch.samples[: len(chosen)] * 2)
        return super().draw(x0, batch, times)

    def losses(self, model: Model, noised: Noised) -> Tensor:
        """The loss of every pair, at its chosen image; validation images, which have no partner, get the usual loss."""
        ours = self.compare(model(noised), noised)
        if not noised.batch.prior.any():
            return ours
        with torch.no_grad():
            base = self.compare(model.base(noised), noised)
        chosen, rejected = (ours - base).chunk(2)
        loss = -F.logsigmoid(-0.5 * self.beta * (chosen - rejected))
        return torch.cat([loss, torch.zeros_like(loss)])


def preferences(items: Sequence[Item], folder: str | Path) -> tuple[list[Item], list[Item]]:
    """The chosen images and the rejected one of each, of the same path within its folder, whatever the suffix.

    Each pair becomes a concept of its own, so that its images come into a batch together.

    Raises:
        SerialLoraError: If a chosen image has no partner.
    """
    others: dict[str, Item] = {}
    for item in uncaptioned(Path(folder)).items:
        if (name := _stem(item)) in others:
            raise SerialLoraError(f"{folder} has two images called {name}: a pair is known by its name; rename one.")
        others[name] = item
    if missing := [item.name for item in items if _stem(item) not in others]:
        raise SerialLoraError(
            f"--rejected_data_dir {folder} has no image for {', '.join(missing[:4])}: each chosen image needs a "
            "rejected one of the same name."
        )
    chosen = [replace(item, concept=number) for number, item in enumerate(items)]
    rejected = [
        replace(others[_stem(item)], concept=item.concept, caption=item.caption, shapes=item.shapes) for item in chosen
    ]
    return chosen, rejected


def _stem(item: Item) -> str:
    return PurePosixPath(item.name).with_suffix("").as_posix()
