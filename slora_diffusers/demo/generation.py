"""The demo's first part: adapt the built-in DiT to a style that it never saw, and generate before and after."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from rich.progress import Progress
from torch import nn

from .. import add_serial_lora, save_serial_lora
from .adapt import CONFIG, FULL, SERIAL, Quality, Setting, evaluate, finetune, generate, load_base
from .glyphs import HELD_OUT_LETTERS, LETTERS, SEEN_LETTERS, Face, glyph_images
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
            "settings": {"Serial LoRA": {**CONFIG.to_dict(), **asdict(SERIAL)}, "full fine-tuning": asdict(FULL)},
            "largest_pixel_difference_live_fused": self.largest_pixel_difference_live_fused,
            "rows": [asdict(row) for row in self.rows],
        }


def run_generation(output_dir: Path, face: Face, seed: int, progress: Progress) -> Generation:
    """Fine-tunes the built-in DiT on half of a new style's letters, and draws all of them before, after and fused."""
    drawn: dict[str, torch.Tensor] = {}
    base = load_base()
    drawn["before"] = generate(base, progress.track(SEEDS, description="Drawing with the base"))
    rows = [Row("base", 0, 0, 0.0, evaluate(base, drawn["before"], face))]

    adapter, trained, seconds = _train_adapter(face, output_dir / "adapter", seed, progress)
    pipe = load_base()  # a fresh pipeline: what it learns comes from the file alone
    pipe.load_serial_lora(adapter)
    drawn["after"] = generate(pipe, progress.track(SEEDS, description="Drawing with the adapter"))
    size = _bytes_in(adapter)
    rows.append(Row("Serial LoRA", trained, size, seconds, evaluate(pipe, drawn["after"], face)))
    pipe.fuse_serial_lora()
    drawn["fused"] = generate(pipe, progress.track(SEEDS, description="Drawing with the adapter fused"))
    rows.append(Row("Serial LoRA, fused", trained, size, seconds, evaluate(pipe, drawn["fused"], face)))

    rows.append(_full_fine_tuning(face, seed, progress))
    sheet = _draw_sheet(output_dir / "contact_sheet.png", face, drawn, rows)
    return Generation(sheet, adapter, tuple(rows), (drawn["after"] - drawn["fused"]).abs().max().item())


def train(
    pipe: DiTPipeline, parameters: Sequence[nn.Parameter], face: Face, setting: Setting, progress: Progress, name: str
) -> tuple[int, float]:
    """Runs one fine-tuning under a progress bar; returns the number of trained parameters and the seconds."""
    started = time.time()
    task = progress.add_task(name, total=setting.steps)
    for loss in finetune(pipe, parameters, face, setting):
        progress.update(task, advance=1, description=f"{name} (loss {loss:.3f})")
    return sum(p.numel() for p in parameters), time.time() - started


def _train_adapter(face: Face, folder: Path, seed: int, progress: Progress) -> tuple[Path, int, float]:
    pipe = load_base()
    torch.manual_seed(seed)
    add_serial_lora(pipe.transformer, CONFIG)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    trained, seconds = train(pipe, parameters, face, replace(SERIAL, seed=seed), progress, "Serial LoRA")
    save_serial_lora(pipe.transformer, folder)
    return folder, trained, seconds


def _full_fine_tuning(face: Face, seed: int, progress: Progress) -> Row:
    pipe = load_base()
    parameters = list(pipe.transformer.parameters())
    trained, seconds = train(pipe, parameters, face, replace(FULL, seed=seed), progress, "Full fine-tuning")
    images = generate(pipe, progress.track(SEEDS, description="Drawing with all weights tuned"))
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        size = _bytes_in(Path(folder))
    return Row("full fine-tuning", trained, size, seconds, evaluate(pipe, images, face))


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _draw_sheet(path: Path, face: Face, drawn: dict[str, torch.Tensor], rows: Sequence[Row]) -> Path:
    base, serial = rows[0].quality, rows[1].quality
    title = f"Serial LoRA on the built-in DiT: {face.name} from {len(SEEN_LETTERS)} letters"
    images = {
        "true glyphs": glyph_images([face])[0] / 255,
        "before: the base": drawn["before"][0],
        "after: adapter loaded": drawn["after"][0],
        "adapter fused": drawn["fused"][0],
    }
    letters = {
        "Letters the adapter was trained on": SEEN_LETTERS,
        "Letters it never saw in this style": HELD_OUT_LETTERS,
    }
    groups = {
        heading: {label: [Cell(row[LETTERS.index(letter)]) for letter in chosen] for label, row in images.items()}
        for heading, chosen in letters.items()
    }
    footer = (
        f"Never-seen letters, {len(SEEDS)} samples each: best overlap (IoU) with the true glyph, median "
        f"{base.iou:.2f} before, {serial.iou:.2f} after;",
        f"denoising loss {base.denoising_loss:.3f} before, {serial.denoising_loss:.3f} after. Every row starts from "
        "the same noise.",
    )
    return contact_sheet(path, title, groups, footer)
