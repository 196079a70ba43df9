"""Heads over several layers of a backbone, from maps of patches to logits of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLS = (1, 2, 3, 6)
"""Cells of each pooling on a side."""


class ConvolutionalHead(nn.Module):
    """Levels norm'd, projected and summed, then two steps of convolution and upsampling by 2.

    The sum over layers is SETR-MLA's, the progressive upsampling SETR-PUP's (Zheng et al., arXiv 2012.15840).
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(_Norm(d), nn.Conv2d(d, width, 1)) for d in widths)
        self.steps = nn.ModuleList(_block(width, width, 3) for _ in range(2))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, d_i, h_i, w_i) -> logits (B, classes, 4 h, 4 w), with h and w of the finest level."""
        size = max((x.shape[-2:] for x in maps), key=lambda s: s[0])
        levels = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        x = sum(F.interpolate(y, size, mode="bilinear") for y in levels)  # (B, width, h, w)
        for step in self.steps:
            x = F.interpolate(step(x), scale_factor=2, mode="bilinear")
        return self.classifier(x)


class UPerNet(nn.Module):
    """A pyramid of levels, with pooled context on the last, from the coarsest to the finest, then all side by side.

    Args:
        widths: d_i of the levels, at most four.
        width: Channels within.
        classes: Channels of the result.
        scales: Powers of two by which each level is enlarged; -1 halves it. A plain backbone's levels are all of one
            size, which this makes a pyramid of.

    Source: Xiao et al., arXiv 1807.10221.
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_scale(d, width, scale) for d, scale in zip(widths, scales, strict=True))
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), _block(width, width, 1)) for n in POOLS)
        self.context = _block(width * (1 + len(POOLS)), width, 3)
        self.smooth = nn.ModuleList(_block(width, width, 3) for _ in widths[1:])
        self.together = _block(len(widths) * width, width, 3)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, d_i, h_i, w_i) -> logits (B, classes, H, W), at the size of the finest level."""
        levels = [scale(x) for scale, x in zip(self.scales, maps, strict=True)]
        last = levels[-1]
        x = self.context(torch.cat([last, *(_sized(pool(last), last) for pool in self.pools)], 1))
        pyramid = [x]
        for level, smooth in zip(levels[-2::-1], self.smooth, strict=True):
            x = level + _sized(x, level)
            pyramid.append(smooth(x))
        return self.classifier(self.together(torch.cat([_sized(y, pyramid[-1]) for y in pyramid], 1)))


def scales_of(maps: Sequence[Tensor]) -> list[int]:
    """Powers of two that make a pyramid of maps of one size; a hierarchical backbone's are one already."""
    if len({x.shape[-2:] for x in maps}) > 1:
        return [0] * len(maps)
    return [2, 1, 0, -1][-len(maps) :]


def _scale(d: int, width: int, power: int) -> nn.Module:
    if power < 1:
        down = [nn.MaxPool2d(2**-power)] if power else []
        return nn.Sequential(_Norm(d), nn.Conv2d(d, width, 1), *down)
    steps: list[nn.Module] = [_Norm(d), nn.ConvTranspose2d(d, width, 2, 2)]
    for _ in range(power - 1):
        steps += [_Norm(width), nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2)]
    return nn.Sequential(*steps)


def _block(d: int, width: int, side: int) -> nn.Module:
    """Convolution, norm, activation."""
    return nn.Sequential(nn.Conv2d(d, width, side, padding=side // 2), _Norm(width), nn.GELU())


def _sized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear")


class _Norm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, d, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
