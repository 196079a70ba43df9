"""Large images at their own resolution: overlapping tiles, whose logits are blended where they meet, or averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, int]  # height and width in pixels
Seen = Iterator[tuple[slice, slice, Tensor]]  # rows, columns and logits of each tile


def tiles(run: Callable[[Tensor, Tensor], Tensor], image: Tensor, size: Shape, overlap: int) -> Seen:
    """The logits of every tile, each seen by itself.

    Args:
        run: From pixels (1, 3, *size) and a mask (1, *size), 1 where they are image, to logits (1, classes, ...).
        image: (3, H, W), prepared; a side below a tile's is filled up with zeros, to the right and below.
        size: Height and width of a tile.
        overlap: Pixels that neighbours share.
    """
    missing = (0, max(size[1] - image.shape[2], 0), 0, max(size[0] - image.shape[1], 0))
    padded, mask = F.pad(image, missing), F.pad(torch.ones(image.shape[1:]), missing)
    rows, columns = (_slices(n, side, overlap) for n, side in zip(padded.shape[1:], size, strict=True))
    for row in rows:
        for column in columns:
            yield row, column, run(padded[None, :, row, column], mask[None, row, column])[0].float().cpu()


def blended(seen: Seen, image: Shape, size: Shape, overlap: int) -> Tensor:
    """Logits (classes, H, W) of an image: where tiles overlap one fades into the other, by weights that sum to 1."""
    down, across = (_fade(side, overlap) for side in size)
    window = down[:, None] * across  # (h, w)
    height, width = (max(n, side) for n, side in zip(image, size, strict=True))
    total: Tensor | float = 0.0
    weights = torch.zeros(height, width)
    for row, column, logits in seen:
        total = total if isinstance(total, Tensor) else torch.zeros(len(logits), height, width)
        total[:, row, column] += logits * window
        weights[row, column] += window
    return (total / weights)[:, : image[0], : image[1]]


def averaged(seen: Seen, *_: object) -> Tensor:
    """The mean of the tiles' logits, (classes,): every tile has one vote."""
    return torch.stack([logits for _, _, logits in seen]).mean(0)


def _slices(length: int, side: int, overlap: int) -> list[slice]:
    """Where tiles lie along one side: the last one ends with the image."""
    starts = [*range(0, length - side, side - overlap), length - side]
    return [slice(start, start + side) for start in starts]


def _fade(side: int, overlap: int) -> Tensor:
    """Weight of each pixel of a row of a tile: rising over the overlap, falling over it at the other end."""
    ramp = torch.arange(1, overlap + 1) / (overlap + 1)
    fade = torch.ones(side)
    fade[:overlap] = torch.minimum(fade[:overlap], ramp)
    fade[side - overlap :] = torch.minimum(fade[side - overlap :], ramp.flip(0))
    return fade
