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
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from diffusers import DiTPipeline
from rich.console import Console
from rich.table import Table

from slora_diffusers.demo.adapt import GUIDANCE, Quality, evaluate, generate, load_base
from slora_diffusers.demo.glyphs import NEW_STYLES
from slora_diffusers.demo.methods import ADAPTER, METHODS, RANK, fine_tuning

TUNED_ON, SHOWN = "calligraphic", "bold-calligraphic"
GRID = {"full fine-tuning": (1e-4, 3e-4)}
ADAPTER_GRID = (3e-3, 1e-2)


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


def fine_tune(name: str, style: str, seed: int, rate: float) -> Run:
    """Fine-tunes the base with one method on the seen letters of `style` and measures the others."""
    tuning, face = fine_tuning(load_base(), name, seed, learning_rate=rate), NEW_STYLES[style]
    for _ in tuning.run(face):
        pass
    quality = evaluate(tuning.pipe, generate(tuning.pipe, range(4)), face)
    trained = sum(p.numel() for p in tuning.parameters)
    return Run(name, style, rate, seed, trained, tuning.size(), tuning.seconds, quality)


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
    parser.add_argument("--styles", nargs="+", choices=NEW_STYLES, default=[SHOWN])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it likes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo_quality.json"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console, styles = Console(), [TUNED_ON] if args.grid else args.styles
    cases = [
        (name, style, seed, rate)
        for style in styles
        for name in args.methods
        for rate in (GRID.get(name, ADAPTER_GRID) if args.grid else (METHODS[name].setting.learning_rate,))
        for seed in range(args.seeds)
    ]
    runs = []
    for number, (name, style, seed, rate) in enumerate(cases, 1):
        runs.append(fine_tune(name, style, seed, rate))
        console.print(
            f"{number}/{len(cases)} {style}, {name} at {rate:g}, seed {seed}: {runs[-1].quality}", highlight=False
        )
    bases = {style: measure_base(style) for style in styles}
    for style, base in bases.items():
        console.print(table([run for run in runs if run.style == style], base, NEW_STYLES[style].name))
    output = args.output.with_stem(args.output.stem + "_grid") if args.grid else args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    results = {
        "bases": {style: asdict(base) for style, base in bases.items()},
        "runs": [asdict(run) for run in runs],
        "threads": torch.get_num_threads(),
    }
    settings = {"rank": RANK, **asdict(ADAPTER), "guidance": GUIDANCE, "shown": SHOWN}
    output.write_text(json.dumps({"settings": settings, **versions, **results}, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {output}")


if __name__ == "__main__":
    main()
