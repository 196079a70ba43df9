"""Pictures in labelled rows and columns: weights or adapters against seeds and prompts (or classes)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from ..errors import SerialLoraError
from ..serving.requests import Request
from .session import Look, OnStep, Session

MOST_CELLS = 400
_SMALLEST, _LARGEST = 128, 384  # pixels of the longer side of a picture on the sheet
_GAP, _MARGIN = 8, 16
_PAPER, _INK, _FAINT = "white", (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Grid:
    """What to draw: a look for each row, a request for each column.

    Args:
        rows: {label: how the adapters act}.
        columns: {label: what is drawn}.
    """

    rows: Mapping[str, Look]
    columns: Mapping[str, Request]


def by_weights(look: Look, weights: Sequence[float]) -> dict[str, Look]:
    """A row for each weight, which all adapters of a look get as a factor of their own."""
    rows = {}
    for weight in weights:
        scaled = replace(look, weights={name: weight * own for name, own in look.weights.items()})
        rows[f"weight {weight:g}" if weight else "weight 0: the base"] = scaled
    return rows


def by_adapters(look: Look) -> dict[str, Look]:
    """A row for the base, one for each adapter alone, and one for several together."""
    rows = {"base": replace(look, weights={})}
    for name, weight in look.weights.items():
        rows[f"{name}, weight {weight:g}"] = replace(look, weights={name: weight})
    if len(look.weights) > 1:
        rows["all together"] = look
    return rows


def columns_of(
    session: Session, subjects: Sequence[str], seeds: Sequence[int], steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, Request]:  # fmt: skip
    """A column for each subject and seed; a label says what differs.

    Raises:
        SerialLoraError: If there is nothing to draw, or the pipeline cannot draw it.
    """
    if not subjects or not seeds:
        raise SerialLoraError("A grid needs something to draw and at least one seed.")
    columns = {}
    for subject in dict.fromkeys(subjects):
        for seed in dict.fromkeys(seeds):
            parts = [subject] * (len(subjects) > 1 or len(seeds) == 1) + [f"seed {seed}"] * (len(seeds) > 1)
            columns[", ".join(parts)] = session.request(subject, seed, steps, guidance)
    return columns


def draw_grid(session: Session, grid: Grid, title: str = "", on_step: OnStep | None = None) -> Image.Image:
    """Draw every cell, a row after the other, and lay them out.

    Raises:
        SerialLoraError: If a cell cannot be drawn, or there are more than `MOST_CELLS`.
    """
    cells = [(request, look) for look in grid.rows.values() for request in grid.columns.values()]
    if len(cells) > MOST_CELLS:
        raise SerialLoraError(f"A grid has at most {MOST_CELLS} pictures; this one would have {len(cells)}.")
    images = session.draw(cells, on_step)
    across = len(grid.columns)
    rows = [images[start : start + across] for start in range(0, len(images), across)]
    return sheet(rows, list(grid.rows), list(grid.columns), title)


def sheet(
    images: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """Pictures in rows and columns with their labels, each scaled to a size that can be seen.

    Args:
        images: The pictures, a row after the other.
        rows: A label for each row.
        columns: A label for each column.
        title: A line above all.
    """
    width, height = _cell_size(images[0][0])
    font, head = ImageFont.load_default(15), ImageFont.load_default(20)
    wide = max(8, int(width / font.getlength("n")))
    above = [_wrapped(label, wide) for label in columns]
    beside = [_wrapped(label, 24) for label in rows]
    line = 20
    left = _MARGIN + max(int(font.getlength(part)) for label in beside for part in label.split("\n")) + 14
    top = _MARGIN + (34 if title else 0) + line * max(label.count("\n") + 1 for label in above) + 6
    right = left + len(columns) * (width + _GAP) + _MARGIN
    full = max(right, 2 * _MARGIN + int(head.getlength(title)) if title else 0)
    paper = Image.new("RGB", (full, top + len(rows) * (height + _GAP) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((_MARGIN, _MARGIN - 4), title, _INK, head)
    for number, label in enumerate(above):
        x = left + number * (width + _GAP) + width // 2
        draw.multiline_text((x, top - 6), label, _FAINT, font, anchor="md", align="center")
    for number, (label, row) in enumerate(zip(beside, images, strict=True)):
        y = top + number * (height + _GAP)
        draw.multiline_text((left - 14, y + height // 2), label, _FAINT, font, anchor="rm", align="right")
        for place, image in enumerate(row):
            picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            paper.paste(picture, (left + place * (width + _GAP), y))
    return paper


def _cell_size(image: Image.Image) -> tuple[int, int]:
    longer = max(image.size)
    factor = min(max(longer, _SMALLEST), _LARGEST) / longer
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


def _wrapped(label: str, width: int) -> str:
    """A label in at most three lines."""
    return "\n".join(textwrap.wrap(label, width, max_lines=3, placeholder=" ...", break_on_hyphens=False) or [""])
