"""Large images at their own resolution: overlapping tiles, whose logits are blended where they meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SerialLoraError


def check_tiles(tile: int, overlap: int, patch: int | None) -> None:
    """Raise SerialLoraError unless tiles divide into patches and go on after each other."""
    if tile < 1 or not 0 <= overlap < tile or (patch and tile % patch):
        raise SerialLoraError(
            f"A tile must be at least 1 pixel, a multiple of the model's patch ({patch or 1}), and the overlap from 0 "
            f"to less than it; got tile={tile}, overlap={overlap}."
        )


@torch.no_grad()
def tiled(run: Callable[[Tensor], Tensor], image: Tensor, tile: int, overlap: int) -> Tensor:
    """Logits (classes, H, W) of an image of any size, each tile seen by itself.

    Neighbours share `overlap` pixels, over which one fades into the other: at every pixel the weights sum to 1.

    Args:
        run: From pixels (1, 3, tile, tile) to logits (1, classes, tile, tile).
        image: (3, H, W), prepared; a side below `tile` is filled up by its border.
        tile: Side of a tile in pixels.
        overlap: Pixels that neighbours share.
    """
    height, width = image.shape[1:]
    padded = F.pad(image[None], (0, max(tile - width, 0), 0, max(tile - height, 0)), mode="replicate")
    fade = _fade(tile, overlap).to(image.device)
    window = fade[:, None] * fade  # (tile, tile)
    total: Tensor | None = None
    weights = torch.zeros(padded.shape[2:], device=image.device)
    for top in _starts(padded.shape[2], tile, overlap):
        for left in _starts(padded.shape[3], tile, overlap):
            area = (..., slice(top, top + tile), slice(left, left + tile))
            logits = run(padded[area])[0].float()  # (classes, tile, tile)
            if total is None:
                total = torch.zeros(len(logits), *padded.shape[2:], device=image.device)
            total[area] += logits * window
            weights[area] += window
    assert total is not None
    return (total / weights)[:, :height, :width]


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: the last one ends with the image."""
    return [*range(0, side - tile, tile - overlap), side - tile]


def _fade(tile: int, overlap: int) -> Tensor:
    """Weight of each pixel of a row of a tile: rising over the overlap, falling over it at the other end."""
    ramp = torch.arange(1, overlap + 1) / (overlap + 1)
    fade = torch.ones(tile)
    fade[:overlap] = torch.minimum(fade[:overlap], ramp)
    fade[tile - overlap :] = torch.minimum(fade[tile - overlap :], ramp.flip(0))
    return fade
