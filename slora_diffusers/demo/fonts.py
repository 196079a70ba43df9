"""Which faces of a folder of fonts the demo's base is pretrained on, and how often each is drawn.

Any folder will do (.ttf, .otf, .woff, searched through). A face is left out if it lacks a capital or if its capitals
are not letters, if it is a copy of a face that was taken, and if it is close to one of `NEW_STYLES`, which the base is
never to see. `base/README.md` says which fonts the shipped base saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFont
from torch import Tensor

from .glyphs import EM_PIXELS, LETTERS, NEW_STYLES, PRETRAINING_FACES, Face, render_glyph

PIXELS = 64  # side of the stored glyphs, twice the demo's: they are moved and bent first, then averaged down
SUFFIXES = {".ttf", ".otf", ".woff"}
CAP_HEIGHT = 20 / EM_PIXELS  # of the em, in the faces that matplotlib ships; other fonts are scaled to it
COPY = 0.985  # faces that are more alike than this are one
NEW = 0.9  # a face that is closer than this to a new style is left out
READABLE = 0.1  # share of the letters that other families' faces must recognise; an ornament reaches 0.08
NEIGHBOUR = 0.85  # faces that are more alike than this share their turns
# Copies of the new styles in another weight or size, fonts whose capitals are Greek or lowercase, and letters in boxes.
NOT_WANTED = (
    "mnsymbol", "stix", "xits", "qtfraktur", "unifrakturmaguntia", "drmgrk", "drmsym", "drmdoz", "drmfig", "drminf",
    "alfa-beta", "elleb", "ellen",
    "standardsymbols", "qtgreece", "keyboard", "storytimecaps", "snowcaps", "flatline", "solothurn", "ubuntu-title",
    "semaphor", "monsieur",
)  # fmt: skip


@dataclass(frozen=True)
class Faces:
    """Faces to draw: `glyphs` uint8 (F, 26, 64, 64), and the share of the draws that each face gets, (F,)."""

    names: tuple[str, ...]
    glyphs: Tensor
    shares: Tensor


def read_faces(folder: Path | None) -> Faces:
    """matplotlib's pretraining faces and the usable ones of a folder."""
    names, drawn, left_out = [], [], Counter()
    for face in (*PRETRAINING_FACES, *_files(folder)):
        glyphs = _draw(face)
        left_out["not 26 letters"] += glyphs is None
        if glyphs is not None:
            names.append(face.name)
            drawn.append(glyphs)
    glyphs = torch.from_numpy(np.stack(drawn))
    keep = _choose(names, glyphs, left_out)
    print(f"{len(keep)} faces; left out: {', '.join(f'{count} {why}' for why, count in left_out.items())}", flush=True)
    names, glyphs = [names[i] for i in keep], glyphs[keep]
    neighbours = (_likeness(_features(glyphs)) > NEIGHBOUR).sum(1).float()
    return Faces(tuple(names), glyphs, F.normalize(neighbours.rsqrt(), p=1, dim=0))


def _files(folder: Path | None) -> Iterator[Face]:
    """A face for each font file, its em such that the median capital is as high as matplotlib's."""
    for path in sorted(folder.rglob("*")) if folder is not None else ():
        if path.suffix.lower() not in SUFFIXES or any(word in str(path).lower() for word in NOT_WANTED):
            continue
        try:
            font = ImageFont.truetype(path, 100)
        except OSError:  # a link to nowhere, or no font that FreeType reads
            continue
        boxes = [font.getbbox(letter) for letter in LETTERS]
        height = float(np.median([bottom - top for _, top, _, bottom in boxes])) / 100
        em = round(EM_PIXELS * CAP_HEIGHT / max(height, 0.01))
        if 10 <= em <= 100:
            yield Face(str(path), str(path.resolve()), em=em)


def _draw(face: Face) -> np.ndarray | None:
    """Its capitals, uint8 (26, 64, 64), or None if they are not 26 different pictures of a letter's weight."""
    try:
        glyphs = np.stack([render_glyph(face, letter, pixels=PIXELS) for letter in LETTERS])
    except (OSError, ZeroDivisionError):  # a letter that is empty
        return None
    ink = (glyphs > 127).sum((1, 2)) * 32**2 / PIXELS**2
    different = len({glyph.tobytes() for glyph in glyphs}) == len(LETTERS)
    return glyphs if different and ink.min() >= 20 and ink.max() <= 600 else None


def _features(glyphs: Tensor) -> Tensor:
    """Blurred glyphs of mean 0 and norm 1: (F, 26, 64, 64) -> (F, 26, 256)."""
    x = F.avg_pool2d(glyphs.flatten(0, 1)[:, None].float() / 255, PIXELS // 16)
    x = F.avg_pool2d(x, 3, 1, 1).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1).view(*glyphs.shape[:2], -1)


def _likeness(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Mean correlation of the letters of two sets of faces: (F, 26, d), (G, 26, d) -> (F, G)."""
    return x.flatten(1) @ (x if y is None else y).flatten(1).T / len(LETTERS)


def _choose(names: list[str], glyphs: Tensor, left_out: Counter[str]) -> list[int]:
    """Positions of the faces that are used; what is not is counted by its reason."""
    features = _features(glyphs)
    alike = _likeness(features)
    drawn = [_draw(style) for style in NEW_STYLES.values()]
    new = _likeness(features, _features(torch.from_numpy(np.stack([g for g in drawn if g is not None]))))
    keep: list[int] = []
    for i in range(len(names)):
        copy, close = bool((alike[i, keep] > COPY).any()), bool(new[i].max() > NEW)
        left_out["copies"] += copy
        left_out["close to a new style"] += close and not copy
        if not copy and not close:
            keep.append(i)
    read = _readable([names[i] for i in keep], features[keep], alike[keep][:, keep])
    left_out["not readable"] += int((read < READABLE).sum())
    keep = [i for i, share in zip(keep, read, strict=True) if share >= READABLE]
    for style, column in zip(NEW_STYLES, new[keep].T, strict=True):
        nearest = column.topk(min(3, len(keep)))
        print(f"closest to {style}: " + ", ".join(
            f"{Path(names[keep[i]]).stem} {value:.2f}" for value, i in zip(nearest.values, nearest.indices, strict=True)
        ), flush=True)  # fmt: skip
    return keep


def _readable(names: list[str], features: Tensor, alike: Tensor) -> Tensor:
    """Share of each face's letters that the 15 nearest glyphs of other families call by the same name, (F,)."""
    families = [str(Path(name).parent) for name in names]
    of_a_family = torch.tensor([[a == b != "." for b in families] for a in families])
    relatives = of_a_family | (alike > 0.93)
    letters = torch.arange(len(LETTERS))
    shares = []
    for own, relative in zip(features, relatives, strict=True):
        scores = (own @ features.flatten(0, 1).T).view(len(LETTERS), len(names), len(LETTERS))
        nearest = scores.masked_fill(relative[None, :, None], -1).flatten(1).topk(15).indices % len(LETTERS)
        shares.append((F.one_hot(nearest, len(LETTERS)).sum(1).argmax(1) == letters).float().mean())
    return torch.stack(shares)
