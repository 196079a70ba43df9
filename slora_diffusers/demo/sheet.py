"""The contact sheet: true glyphs above what the model draws before, after and with the adapter fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from .glyphs import LETTERS, load_font

CELL = 64  # pixels of one glyph on the sheet
GAP = 6
LABELS = 250  # width of the column of row labels
PAPER, INK, FAINT = 255, 20, 110


def contact_sheet(
    path: str | Path,
    title: str,
    groups: Mapping[str, str],
    rows: Mapping[str, torch.Tensor],
    footer: Sequence[str] = (),
) -> Path:
    """Writes one PNG.

    Args:
        path: Where it goes.
        title: Its heading.
        groups: Heading of each group of letters -> the letters in it.
        rows: Label of each row -> grey images in [0, 1] of all 26 letters, (26, H, W).
        footer: Lines of text below the glyphs.
    """
    columns = max(len(letters) for letters in groups.values())
    group_height = 40 + len(rows) * (CELL + GAP) + 14
    width = LABELS + columns * (CELL + GAP) + 2 * 20
    sheet = Image.new("L", (width, 64 + len(groups) * group_height + 26 * len(footer) + 16), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((20, 18), title, INK, load_font("DejaVuSans-Bold", 24))
    top = 64
    for heading, letters in groups.items():
        draw.text((20, top + 4), heading, INK, load_font("DejaVuSans-Bold", 18))
        for row, (label, images) in enumerate(rows.items()):
            y = top + 36 + row * (CELL + GAP)
            draw.text(
                (20, y + CELL // 2),
                label,
                INK,
                load_font("DejaVuSans", 17),
                anchor="lm",
            )
            for column, letter in enumerate(letters):
                sheet.paste(
                    _cell(images[LETTERS.index(letter)]),
                    (LABELS + 20 + column * (CELL + GAP), y),
                )
        top += group_height
    for line, text in enumerate(footer):
        draw.text((20, top + 26 * line), text, FAINT, load_font("DejaVuSans", 16))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _cell(image: torch.Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((CELL, CELL), Image.Resampling.BICUBIC)
