"""The project's main job on the embedded defaults: a DiT that learns a style, a ViT that learns to read and mark it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import SerialLoraError
from .generation import Generation, run_generation
from .glyphs import HELD_OUT_LETTERS, NEW_STYLES, Face
from .vision import Vision, run_vision

PARTS = ("generation", "vision")
STYLE = "bold-calligraphic"  # its thick strokes show best what was learnt; docs/benchmarks.md has all four


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` made, and what it measured; None for a part that was left out."""

    metrics: Path
    generation: Generation | None
    vision: Vision | None
    seconds: float

    @property
    def files(self) -> dict[str, Path]:
        """Everything that was written, by what it is."""
        made = {}
        if self.generation is not None:
            made |= {"contact sheet": self.generation.sheet, "adapter": self.generation.adapter}
        if self.vision is not None:
            made |= {"vision sheet": self.vision.sheet, **self.vision.models}
        return made | {"metrics": self.metrics}


def run_demo(
    output_dir: str | Path = "outputs/demo",
    style: str = STYLE,
    seed: int = 0,
    console: Console | None = None,
    part: str = "all",
) -> DemoResult:
    """Adapts the built-in models to a style that they never saw, and writes pictures, adapters and metrics.

    The first part draws the style's letters, half of them never shown to the adapter; the second recognises and marks
    them in photographs.

    Args:
        output_dir: Where the pictures, the adapters and the metrics go.
        style: A style that the bases never saw: one of `glyphs.NEW_STYLES`.
        seed: Seeds the adapters, the data order and the noise.
        console: Where progress and the summary are printed; by default the terminal.
        part: "generation", "vision" or "all".

    Raises:
        SerialLoraError: If the style or the part is unknown.
    """
    if style not in NEW_STYLES:
        raise SerialLoraError(f"style must be one of {', '.join(NEW_STYLES)}; got {style!r}.")
    if part not in ("all", *PARTS):
        raise SerialLoraError(f"part must be one of all, {', '.join(PARTS)}; got {part!r}.")
    started, face, output_dir, console = time.time(), NEW_STYLES[style], Path(output_dir), console or Console()
    output_dir.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (Progress if console.is_terminal else _Lines)(*columns, console=console) as progress:
        generation = run_generation(output_dir, face, seed, progress) if part != "vision" else None
        vision = run_vision(output_dir, face, seed, progress) if part != "generation" else None
    metrics = output_dir / "metrics.json"
    content = {
        "style": face.name,
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **(generation.metrics() if generation is not None else {}),
        **({"vision": vision.metrics()} if vision is not None else {}),
    }
    metrics.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    result = DemoResult(metrics, generation, vision, time.time() - started)
    _summarise(console, face, result)
    return result


class _Lines(Progress):
    """Where nothing can be drawn over, as in a log: a line as each task begins and after every quarter, and no bars."""

    def __init__(self, *columns: Any, console: Console) -> None:
        super().__init__(*columns, console=console, disable=True)

    def add_task(self, description: str, *arguments: Any, **more: Any) -> TaskID:
        """Print the task's name and keep it, as a `Progress` does."""
        self.console.print(f"{description} ...", highlight=False)
        return super().add_task(description, *arguments, **more)

    def track(
        self, sequence: Any, total: float | None = None, *_: Any, description: str = "", **__: Any
    ) -> Iterator[Any]:
        """Go through a sequence, as a `Progress` does."""
        task = self.add_task(description, total=len(sequence) if total is None else total)
        for item in sequence:
            yield item
            self.update(task, advance=1)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Note how far a task is; print it after every quarter."""
        super().update(task_id, **changes)
        task = next(task for task in self.tasks if task.id == task_id)
        if task.total and task.completed % max(1, task.total // 4) == 0:
            self.console.print(f"{task.description}: {task.completed:.0f}/{task.total:.0f}", highlight=False)


def _summarise(console: Console, face: Face, result: DemoResult) -> None:
    if result.generation is not None:
        console.print(_generation_table(face, result.generation))
        console.print(
            "KiB: saved. s: training. loss: denoising, on fixed noise. IoU: best overlap with the true glyph over "
            "small shifts, median (seen: on the letters of the training set). hit: the nearest glyph of the style is "
            "the letter asked for.",
            style="dim",
        )
    if result.vision is not None:
        console.print(_vision_table(face, result.vision))
        console.print(
            "In scenes that were never trained on. accuracy: of the letter, %. mIoU: of letter and background, %. "
            "trained: parameters of the backbone, the head's not counted.",
            style="dim",
        )
    console.print(f"Made in {result.seconds:.0f} s:")
    for what, path in result.files.items():
        console.print(f"  {what:<14} {path}", soft_wrap=True, highlight=False)


def _table(title: str, *headings: str, left: int = 1) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", no_wrap=True)
    return table


def _generation_table(face: Face, generation: Generation) -> Table:
    title = f"{face.name}, on the letters never seen in it: {HELD_OUT_LETTERS}"
    table = _table(title, "method", "trained", "KiB", "s", "loss", "IoU", "seen", "hit")
    for row in generation.rows:
        q = row.quality
        table.add_row(
            row.method, f"{row.trainable_parameters:,}", f"{row.file_bytes / 1024:,.0f}",
            f"{row.training_seconds:.0f}", f"{q.denoising_loss:.3f}", f"{q.iou:.3f}", f"{q.iou_seen:.3f}",
            f"{q.right_letter:.0%}",
        )  # fmt: skip
    return table


def _vision_table(face: Face, vision: Vision) -> Table:
    table = _table(f"{face.name}, over photographs", "task", "method", "trained", "KiB", "s", "score", left=2)
    for row in vision.rows:
        table.add_row(
            row.task, row.method, f"{row.trainable_parameters:,}", f"{row.file_bytes / 1024:,.0f}",
            f"{row.training_seconds:.0f}", f"{row.score:.1f} {row.measure}",
        )  # fmt: skip
    return table
