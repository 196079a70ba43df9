"""How well each method carries a new style to letters that it never saw, on the demo's base model.

    python benchmarks/demo_quality.py                   # compare at the settled learning rates
    python benchmarks/demo_quality.py --grid            # the small grid that they were picked from

Every method sees the same images, noise and times in the same order. Learning rates are picked on one new style and
the comparison is made on another, so that nothing is tuned on what is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import DiTPipeline
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from slora_diffusers import SerialLoraConfig, add_serial_lora, save_serial_lora
from slora_diffusers.demo.adapt import FULL, SERIAL, Quality, evaluate, finetune, generate, load_base
from slora_diffusers.demo.glyphs import NEW_STYLES

TUNED_ON, REPORTED_ON = "bold-calligraphic", "calligraphic"
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Prepare = Callable[[nn.Module, int], None]
Save = Callable[[nn.Module, Path], object]


def _serial(*inputs: str) -> Prepare:
    return lambda model, rank: add_serial_lora(model, SerialLoraConfig(rank=rank, inputs=inputs or None)) and None


def _lora(model: nn.Module, rank: int) -> None:
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), model)


def _save_lora(model: nn.Module, folder: Path) -> None:
    save_file(peft.get_peft_model_state_dict(model), folder / "lora.safetensors")


def _save_model(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Method:
    """How a method makes a model trainable, writes what it trained, and the learning rates of its grid."""

    prepare: Prepare
    save: Save
    learning_rate: float
    grid: tuple[float, ...]


ADAPTER_GRID, FULL_GRID = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)
METHODS = {
    "Serial LoRA": Method(_serial(), save_serial_lora, SERIAL.learning_rate, ADAPTER_GRID),
    "Serial LoRA + output": Method(
        _serial("hidden_states", "attention_output"), save_serial_lora, SERIAL.learning_rate, ADAPTER_GRID
    ),
    "LoRA (PEFT)": Method(_lora, _save_lora, 1e-2, ADAPTER_GRID),
    "full fine-tuning": Method(lambda model, rank: None, _save_model, FULL.learning_rate, FULL_GRID),
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning and what came of it."""

    method: str
    style: str
    learning_rate: float
    seed: int
    trainable_parameters: int
    file_bytes: int
    seconds: float
    quality: Quality


def fine_tune(name: str, style: str, rank: int, steps: int, seed: int, learning_rate: float | None = None) -> Run:
    """Fine-tunes the base with one method on the seen letters of `style` and measures the others."""
    method, face, pipe = METHODS[name], NEW_STYLES[style], load_base()
    rate = learning_rate or method.learning_rate
    torch.manual_seed(seed)
    method.prepare(pipe.transformer, rank)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    started = time.time()
    for _ in finetune(pipe, parameters, face, replace(SERIAL, learning_rate=rate, steps=steps, seed=seed)):
        pass
    seconds = time.time() - started
    quality = evaluate(pipe, generate(pipe, range(4)), face)
    with tempfile.TemporaryDirectory() as folder:
        method.save(pipe.transformer, Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return Run(name, style, rate, seed, sum(p.numel() for p in parameters), size, seconds, quality)


def table(runs: list[Run], base: Quality, title: str) -> Table:
    """Medians over seeds, one line per method and learning rate."""
    grid = Table(title=title)
    for heading in (
        "method",
        "rate",
        "trained",
        "file",
        "training",
        "denoising loss",
        "IoU",
        "IoU, seen",
        "right letter",
    ):
        grid.add_column(heading, justify="left" if heading == "method" else "right")
    grid.add_row("base", "", "0", "", "", f"{base.denoising_loss:.4f}", f"{base.iou:.3f}", f"{base.iou_seen:.3f}",
                 f"{base.right_letter:.0%}")  # fmt: skip
    for method, rate in dict.fromkeys((run.method, run.learning_rate) for run in runs):
        group = [run for run in runs if (run.method, run.learning_rate) == (method, rate)]
        middle = {key: statistics.median(asdict(run.quality)[key] for run in group) for key in asdict(base)}
        grid.add_row(
            method, f"{rate:g}", f"{group[0].trainable_parameters:,}", f"{group[0].file_bytes / 1024:,.0f} KiB",
            f"{statistics.median(run.seconds for run in group):.0f} s", f"{middle['denoising_loss']:.4f}",
            f"{middle['iou']:.3f}", f"{middle['iou_seen']:.3f}", f"{middle['right_letter']:.0%}",
        )  # fmt: skip
    return grid


def measure_base(style: str) -> Quality:
    pipe: DiTPipeline = load_base()
    return evaluate(pipe, generate(pipe, range(4)), NEW_STYLES[style])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help=f"try every learning rate on {TUNED_ON!r} instead")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=SERIAL.steps)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo_quality.json"))
    args = parser.parse_args()
    console, style = Console(), TUNED_ON if args.grid else REPORTED_ON
    cases = [
        (name, seed, rate)
        for name in args.methods
        for rate in (METHODS[name].grid if args.grid else (METHODS[name].learning_rate,))
        for seed in range(args.seeds)
    ]
    runs = []
    for number, (name, seed, rate) in enumerate(cases, 1):
        runs.append(fine_tune(name, style, args.rank, args.steps, seed, rate))
        console.print(f"{number}/{len(cases)} {name} at {rate:g}, seed {seed}: {runs[-1].quality}", highlight=False)
    base = measure_base(style)
    console.print(
        table(runs, base, f"{NEW_STYLES[style].name}: letters never seen, rank {args.rank}, {args.steps} steps")
    )
    output = args.output.with_stem(args.output.stem + "_grid") if args.grid else args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    results = {"base": asdict(base), "runs": [asdict(run) for run in runs], "threads": torch.get_num_threads()}
    settings = {"rank": args.rank, **asdict(SERIAL), "steps": args.steps, "style": style}
    output.write_text(json.dumps({"settings": settings, **versions, **results}, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {output}")


if __name__ == "__main__":
    main()
