"""The project's main job on the embedded default: adapt the built-in DiT to a style it never saw, and generate."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import DiTPipeline
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from .. import add_serial_lora, save_serial_lora
from ..errors import SerialLoraError
from .adapt import CONFIG, FULL, SERIAL, Quality, Setting, evaluate, finetune, generate, load_base
from .glyphs import HELD_OUT_LETTERS, NEW_STYLES, SEEN_LETTERS, Face, glyph_images
from .sheet import contact_sheet

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
class DemoResult:
    """What `run_demo` made, and what it measured."""

    sheet: Path
    adapter: Path
    metrics: Path
    rows: tuple[Row, ...]
    seconds: float


def run_demo(
    output_dir: str | Path = "outputs/demo", style: str = "calligraphic", seed: int = 0, console: Console | None = None
) -> DemoResult:
    """Fine-tunes the built-in base on half of a new style's letters, and draws all of them before, after and fused.

    Args:
        output_dir: Where the contact sheet, the adapter and the metrics go.
        style: A style that the base never saw: one of `glyphs.NEW_STYLES`.
        seed: Seeds the adapter, the data order and the noise.
        console: Where progress and the summary are printed; by default the terminal.

    Raises:
        SerialLoraError: If the style is unknown.
    """
    if style not in NEW_STYLES:
        raise SerialLoraError(f"style must be one of {', '.join(NEW_STYLES)}; got {style!r}.")
    started, face, output_dir, console = time.time(), NEW_STYLES[style], Path(output_dir), console or Console()
    output_dir.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    drawn: dict[str, torch.Tensor] = {}
    with Progress(*columns, console=console) as progress:
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
    metrics = _write_metrics(
        output_dir / "metrics.json", face, seed, rows, (drawn["after"] - drawn["fused"]).abs().max()
    )
    result = DemoResult(sheet, adapter, metrics, tuple(rows), time.time() - started)
    _summarise(console, face, result)
    return result


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
    groups = {
        "Letters the adapter was trained on": SEEN_LETTERS,
        "Letters it never saw in this style": HELD_OUT_LETTERS,
    }
    images = {
        "true glyphs": glyph_images([face])[0] / 255,
        "before: the base": drawn["before"][0],
        "after: adapter loaded": drawn["after"][0],
        "adapter fused": drawn["fused"][0],
    }
    footer = (
        f"Never-seen letters, {len(SEEDS)} samples each: best overlap (IoU) with the true glyph, median "
        f"{base.iou:.2f} before, {serial.iou:.2f} after;",
        f"denoising loss {base.denoising_loss:.3f} before, {serial.denoising_loss:.3f} after. Every row starts from "
        "the same noise.",
    )
    return contact_sheet(path, title, groups, images, footer)


def _write_metrics(path: Path, face: Face, seed: int, rows: Sequence[Row], fused_difference: torch.Tensor) -> Path:
    metrics = {
        "style": face.name,
        "seen_letters": SEEN_LETTERS,
        "held_out_letters": HELD_OUT_LETTERS,
        "samples_per_letter": len(SEEDS),
        "seed": seed,
        "settings": {"Serial LoRA": {**CONFIG.to_dict(), **asdict(SERIAL)}, "full fine-tuning": asdict(FULL)},
        "largest_pixel_difference_live_fused": fused_difference.item(),
        "rows": [asdict(row) for row in rows],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return path


def _summarise(console: Console, face: Face, result: DemoResult) -> None:
    table = Table(title=f"{face.name}, on the letters never seen in it: {HELD_OUT_LETTERS}", box=box.SIMPLE_HEAD)
    for heading in ("method", "trained", "KiB", "s", "loss", "IoU", "seen", "hit"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in result.rows:
        q = row.quality
        table.add_row(
            row.method, f"{row.trainable_parameters:,}", f"{row.file_bytes / 1024:,.0f}",
            f"{row.training_seconds:.0f}", f"{q.denoising_loss:.3f}", f"{q.iou:.3f}", f"{q.iou_seen:.3f}",
            f"{q.right_letter:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "KiB: saved. s: training. loss: denoising, on fixed noise. IoU: best overlap with the true glyph over small "
        "shifts, median (seen: on the letters of the training set). hit: the nearest glyph of the style is the letter "
        "asked for.",
        style="dim",
    )
    console.print(f"Made in {result.seconds:.0f} s:")
    for what, path in {"contact sheet": result.sheet, "adapter": result.adapter, "metrics": result.metrics}.items():
        console.print(f"  {what:<14} {path}", soft_wrap=True, highlight=False)
