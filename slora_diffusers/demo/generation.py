"""The demo's first part: adapt the built-in DiT to a style that it never saw, and generate before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from .. import save_serial_lora
from .adapt import Quality, evaluate, generate, load_base
from .glyphs import HELD_OUT_LETTERS, LETTERS, SEEN_LETTERS, Face, glyph_images
from .methods import FULL, METHODS, RANK, SAME_SIZE, SERIAL, FineTuning, fine_tuning
from .sheet import Cell, contact_sheet

SEEDS = range(4)  # samples of each letter


@dataclass(frozen=True)
class Row:
    """One line of the metrics table."""

    method: str
    trainable_parameters: int
    file_bytes: int
    training_seconds: float
    quality: Quality


@dataclass(frozen=True)
class Generation:
    """What the first part made, and what it measured."""

    sheet: Path
    adapter: Path
    rows: tuple[Row, ...]
    largest_pixel_difference_live_fused: float

    def metrics(self) -> dict[str, Any]:
        """As JSON values, with the settings."""
        return {
            "seen_letters": SEEN_LETTERS,
            "held_out_letters": HELD_OUT_LETTERS,
            "samples_per_letter": len(SEEDS),
            "settings": {name: asdict(METHODS[name].setting) for name in (SERIAL, SAME_SIZE, FULL)},
            "rank": RANK,
            "largest_pixel_difference_live_fused": self.largest_pixel_difference_live_fused,
            "rows": [asdict(row) for row in self.rows],
        }


def run_generation(output_dir: Path, face: Face, seed: int, progress: Progress) -> Generation:
    """Fine-tunes the built-in DiT on half of a new style's letters, and draws all of them before, after and fused."""
    drawn: dict[str, torch.Tensor] = {}
    base = load_base()
    drawn["before: the base"] = generate(base, progress.track(SEEDS, description="Drawing with the base"))
    rows = [Row("base", 0, 0, 0.0, evaluate(base, drawn["before: the base"], face))]

    adapter = output_dir / "adapter"
    tuned = _train(SERIAL, face, seed, progress)
    save_serial_lora(tuned.pipe.transformer, adapter)
    pipe = load_base()  # a fresh pipeline: what it learns comes from the file alone
    pipe.load_serial_lora(adapter)
    live = generate(pipe, progress.track(SEEDS, description="Drawing with the adapter"))
    rows.append(_row(SERIAL, tuned, evaluate(pipe, live, face)))
    pipe.fuse_serial_lora()
    fused = generate(pipe, progress.track(SEEDS, description="Drawing with the adapter fused"))
    rows.append(_row(f"{SERIAL}, fused", tuned, evaluate(pipe, fused, face)))
    drawn |= {f"{SERIAL} r={RANK}": live, "the same, fused": fused}

    for name in (SAME_SIZE, FULL):
        tuned = _train(name, face, seed, progress)
        drawn[name] = generate(tuned.pipe, progress.track(SEEDS, description=f"Drawing with {name}"))
        rows.append(_row(name, tuned, evaluate(tuned.pipe, drawn[name], face)))
    sheet = _draw_sheet(output_dir / "contact_sheet.png", face, drawn, rows)
    return Generation(sheet, adapter, tuple(rows), (live - fused).abs().max().item())


def _train(name: str, face: Face, seed: int, progress: Progress) -> FineTuning:
    """Runs one fine-tuning of a fresh base under a progress bar."""
    tuning = fine_tuning(load_base(), name, seed)
    task = progress.add_task(name, total=tuning.setting.steps)
    for loss in tuning.run(face):
        progress.update(task, advance=1, description=f"{name} (loss {loss:.3f})")
    return tuning


def _row(name: str, tuning: FineTuning, quality: Quality) -> Row:
    return Row(name, sum(p.numel() for p in tuning.parameters), tuning.size(), tuning.seconds, quality)


def _draw_sheet(path: Path, face: Face, drawn: dict[str, torch.Tensor], rows: Sequence[Row]) -> Path:
    by_method = {row.method: row.quality for row in rows}
    title = f"Serial LoRA on the built-in DiT: {face.name} from {len(SEEN_LETTERS)} letters"
    images = {"true glyphs": glyph_images([face])[0] / 255, **{name: row[0] for name, row in drawn.items()}}
    images = {f"{name}, same size" if name == SAME_SIZE else name: row for name, row in images.items()}
    letters = {
        "Letters the adapter was trained on": SEEN_LETTERS,
        "Letters it never saw in this style": HELD_OUT_LETTERS,
    }
    groups = {
        heading: {label: [Cell(row[LETTERS.index(letter)]) for letter in chosen] for label, row in images.items()}
        for heading, chosen in letters.items()
    }
    measured = ("base", SERIAL, SAME_SIZE, FULL)
    overlaps = ", ".join(f"{by_method[name].iou:.2f} {name}" for name in measured)
    hits = ", ".join(f"{by_method[name].right_letter:.0%} {name}" for name in measured)
    footer = (
        f"Letters never seen, {len(SEEDS)} samples each; every row starts from the same noise.",
        f"Best overlap (IoU) with the true glyph, median: {overlaps}.",
        f"Nearest glyph of the style is the letter asked for: {hits}.",
    )
    return contact_sheet(path, title, groups, footer)
