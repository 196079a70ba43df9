"""The demo's pictures for vision: a capital in one colour over a crop of a photograph, its class and its mask.

The photograph is the portrait of Grace Hopper that matplotlib ships. Training crops come from its left half, the crops
that a model is tested on from its right half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .glyphs import IMAGE_SIZE, LETTERS, Face, glyph_images

_SIDES = (32, 128)  # pixels of the photograph that a crop's side takes
_CONTRAST = 0.35  # least distance between a letter's colour and the mean of what lies behind it, per channel


@dataclass(frozen=True)
class Scenes:
    """Images (N, 3, 32, 32) in [0, 1], classes (N,), and masks (N, 32, 32): 1 on the letter."""

    images: Tensor
    labels: Tensor
    masks: Tensor


def scenes(faces: Sequence[Face], per_letter: int, seed: int, held_out: bool) -> Scenes:
    """Every letter of every face `per_letter` times, each jittered, coloured and on a background of its own.

    Args:
        faces: The faces to draw.
        per_letter: Scenes of each letter of each face.
        seed: Seeds the jitter, the colours and the crops.
        held_out: Take backgrounds from the half of the photograph that is kept from training.
    """
    glyphs, labels = glyph_images(faces, LETTERS, per_letter, seed)
    return _scenes(glyphs, labels, torch.Generator().manual_seed(seed), held_out)


def fresh_scenes(faces: Sequence[Face], per_letter: int, batch_size: int, steps: int, seed: int) -> Iterator[Scenes]:
    """Training batches of `per_letter` drawings of every letter, in new colours and over new crops at every step."""
    glyphs, labels = glyph_images(faces, LETTERS, per_letter, seed)
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(glyphs), generator=draw) for _ in range(batch_size * steps // len(glyphs) + 1)]
    )
    for chosen in order[: batch_size * steps].split(batch_size):
        yield _scenes(glyphs[chosen], labels[chosen], draw, held_out=False)


def compose(glyphs: Tensor, behind: Tensor, draw: torch.Generator) -> Tensor:
    """White-on-black glyphs (N, H, W) of uint8, each in a random colour over its background (N, 3, H, W) in [0, 1]."""
    colours = torch.rand(len(glyphs), 3, 1, 1, generator=draw)
    mean = behind.mean((2, 3), keepdim=True)
    far = torch.where(mean > 0.5, colours * (mean - _CONTRAST), 1 - colours * (1 - mean - _CONTRAST))
    alike = ((colours - mean).abs() < _CONTRAST).all(1, keepdim=True)
    alpha = glyphs[:, None].float() / 255  # (N, 1, H, W)
    return behind * (1 - alpha) + torch.where(alike, far, colours) * alpha


def backgrounds(count: int, draw: torch.Generator, held_out: bool) -> Tensor:
    """Random square crops of one half of the photograph, of random size, (count, 3, 32, 32) in [0, 1]."""
    photo = _photograph()
    middle = photo.shape[2] // 2
    half = photo[:, :, middle:] if held_out else photo[:, :, :middle]
    crops = []
    for _ in range(count):
        side = int(torch.randint(_SIDES[0], _SIDES[1], (1,), generator=draw))
        top, left = (int(torch.randint(n - side + 1, (1,), generator=draw)) for n in half.shape[1:])
        crop = half[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (IMAGE_SIZE, IMAGE_SIZE), mode="area"))
    return torch.cat(crops)


def _scenes(glyphs: Tensor, labels: Tensor, draw: torch.Generator, held_out: bool) -> Scenes:
    images = compose(glyphs, backgrounds(len(glyphs), draw, held_out), draw)
    return Scenes(images, labels, (glyphs > 127).long())


@lru_cache(maxsize=1)
def _photograph() -> Tensor:
    with Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")) as photo:
        return torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1).float() / 255
