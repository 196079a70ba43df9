"""Glyphs in colour over smooth coloured grounds, each with its mask: what the demo's vision model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .glyphs import IMAGE_SIZE, LETTERS, Face, glyph_images

_CONTRAST = 0.25  # least distance of a letter's mean colour from the ground's


@dataclass(frozen=True)
class Scenes:
    """Pixels (N, 3, 32, 32) in [0, 1], class of the letter (N,), and its mask (N, 32, 32) of 0 and 1."""

    pixels: Tensor
    labels: Tensor
    masks: Tensor

    def batch(self, size: int, generator: torch.Generator) -> Scenes:
        """`size` scenes drawn at random, as one."""
        return self[torch.randint(len(self.labels), (size,), generator=generator)]

    def __getitem__(self, chosen: Tensor | slice) -> Scenes:
        return Scenes(self.pixels[chosen], self.labels[chosen], self.masks[chosen])


def glyph_scenes(faces: Sequence[Face], variations: int, seed: int = 0, letters: str = LETTERS) -> Scenes:
    """`variations` scenes of every letter of every face.

    Args:
        faces: The faces to draw.
        variations: Jittered copies of each glyph, every one in colours of its own.
        seed: Seeds jitter and colours.
        letters: The capitals to draw.
    """
    glyphs, labels = glyph_images(faces, letters, variations, seed)
    draw = torch.Generator().manual_seed(seed)
    alpha = glyphs.float()[:, None] / 255  # (N, 1, 32, 32)
    ground = torch.rand(len(labels), 3, 4, 4, generator=draw)
    ground = F.interpolate(ground, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")  # (N, 3, 32, 32)
    colour = torch.rand(len(labels), 3, 1, 1, generator=draw)
    close = (colour - ground.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True) < _CONTRAST
    colour = torch.where(close, (colour + 0.5) % 1, colour)
    pixels = ground * (1 - alpha) + colour * alpha
    return Scenes(pixels, labels, (alpha[:, 0] > 0.5).long())
