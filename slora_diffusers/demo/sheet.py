"""A contact sheet: labelled rows of small pictures in groups, each picture with a caption if it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from .glyphs import load_font

CELL = 64  # pixels of one picture on the sheet
GAP = 6
LABELS = 250  # width of the column of row labels
MARGIN = 20
_CAPTION = 18  # height of a line of captions
PAPER, INK, FAINT, GOOD, BAD = "white", (20, 20, 20), (110, 110, 110), (0, 110, 0), (200, 0, 0)


@dataclass(frozen=True)
class Cell:
    """A picture in [0, 1], grey (H, W) or RGB (3, H, W), and what is written below it, as right or as wrong."""

    image: torch.Tensor
    caption: str = ""
    right: bool = True


Rows = Mapping[str, Sequence[Cell]]  # label of a row -> its pictures


def contact_sheet(
    path: str | Path, title: str, groups: Mapping[str, Rows], footer: Sequence[str] = (), columns: int = 13
) -> Path:
    """Writes one PNG.

    Args:
        path: Where it goes.
        title: Its heading.
        groups: Heading of each group of rows -> the rows.
        footer: Lines of text below the pictures.
        columns: Pictures that a row has room for.
    """
    height = 64 + sum(_height(rows) for rows in groups.values()) + 26 * len(footer) + 16
    sheet = Image.new("RGB", (LABELS + columns * (CELL + GAP) + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 18), title, INK, load_font("DejaVuSans-Bold", 24))
    top = 64
    for heading, rows in groups.items():
        draw.text((MARGIN, top + 4), heading, INK, load_font("DejaVuSans-Bold", 18))
        y = top + 36
        for label, cells in rows.items():
            _draw_row(sheet, draw, y, label, cells)
            y += _row_height(cells)
        top += _height(rows)
    for line, text in enumerate(footer):
        draw.text((MARGIN, top + 26 * line), text, FAINT, load_font("DejaVuSans", 16))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, y: int, label: str, cells: Sequence[Cell]) -> None:
    draw.text((MARGIN, y + CELL // 2), label, INK, load_font("DejaVuSans", 17), anchor="lm")
    for column, cell in enumerate(cells):
        x = LABELS + MARGIN + column * (CELL + GAP)
        sheet.paste(_picture(cell.image), (x, y))
        if cell.caption:
            at, font = (x + CELL // 2, y + CELL + 1), load_font("DejaVuSans-Bold", 14)
            draw.text(at, cell.caption, GOOD if cell.right else BAD, font, anchor="ma")


def _row_height(cells: Sequence[Cell]) -> int:
    return CELL + GAP + (_CAPTION if any(cell.caption for cell in cells) else 0)


def _height(rows: Rows) -> int:
    return 40 + sum(map(_row_height, rows.values())) + 14


def _picture(image: torch.Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy())).convert("RGB")
    return picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
