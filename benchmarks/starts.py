"""What benchmarks/vit.py measured, seed by seed: differences with intervals, and accuracy against trained parameters.

python -m benchmarks.starts       # docs/images/vit_light.png and vit_dark.png, from benchmarks/results/*.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, read_results
from benchmarks.vit import best_rate

DIGITS = "vit_classification_16shot"
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
AGAINST = {"plain": "the usual start", "lora-r2": "LoRA, r = 2", "lora-r8": "LoRA, r = 8"}
ROWS = {
    "serial-r8": "Serial LoRA, r = 8",
    "serial-r8-gradient": "Serial LoRA, r = 8, gradient",
    "lora-r2": "LoRA, r = 2",
    "lora-r2-gradient": "LoRA, r = 2, gradient",
    "lora-r8": "LoRA, r = 8",
    "serial-r8+output": "Serial LoRA, r = 8, with outputs",
    "serial-r8+output-gradient": "Serial LoRA, r = 8, with outputs, gradient",
}
LINES = {  # of the plot: its methods, by number of parameters
    "LoRA": ("lora-r2", "lora-r4", "lora-r8"),
    "Serial LoRA": ("serial-r8", "serial-r32"),
    "Serial LoRA, inputs and outputs": ("serial-r4+output", "serial-r8+output", "serial-r16+output"),
    "Serial LoRA, gradient start": ("serial-r8-gradient", "serial-r8+output-gradient"),
    "LoRA, gradient start": ("lora-r2-gradient",),
}
COLOURS = ("#e6862e", "#3b82c4", "#2a9d72", "#c0417f", "#a8912a")
MARKERS = "osD*P"
THEMES = {"light": ("#ffffff", "#24292f", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#30363d")}


def scores(results: Mapping[str, Any], method: str) -> dict[int, float]:
    """{seed: test score} of a method at its best rate."""
    runs = [r for r in results["runs"] if r["method"] == method]
    if not any(r["tuning"] for r in runs):
        return {}
    rate = best_rate(runs, method)
    return {r["seed"]: r["score"] for r in runs if not r["tuning"] and r["rate"] == rate}


def interval(values: Any, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of one value per seed, and its 95 % interval: percentiles of means over seeds drawn with replacement."""
    values = np.asarray(values, np.float64)
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def difference(results: Mapping[str, Any], method: str, against: str) -> tuple[float, float, float] | None:
    """Mean over the seeds that both have of how much better one is, and its interval; None below three seeds."""
    ours, theirs = scores(results, method), scores(results, against)
    common = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in common]) if len(common) > 2 else None


def starts_table(folder: Path = RESULTS) -> str:
    """Per method, on 16 digits of each class: accuracy, and the paired differences to the usual start and to LoRA."""
    lines = ["| | Seeds | Rate | Accuracy | " + " | ".join(f"minus {name}" for name in AGAINST.values()) + " |"]
    lines.append("| --- | --: | --: | --: |" + " --: |" * len(AGAINST))
    results = read_results(DIGITS, folder)
    for method, label in ROWS.items():
        own = scores(results, method)
        others = (method.removesuffix("-gradient") if key == "plain" else key for key in AGAINST)
        cells = [_shown(None if other == method else difference(results, method, other)) for other in others]
        rate, mean = best_rate(results["runs"], method), np.mean(list(own.values()))
        lines.append("| " + " | ".join([label, str(len(own)), f"{rate:g}", f"{mean:.1f}", *cells]) + " |")
    return "\n".join(lines)


def _shown(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*found)


def plot(path: Path, theme: str, folder: Path = RESULTS) -> Path:
    """Draw accuracy against trained parameters at 16 shots, a line per method with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = read_results(DIGITS, folder)
    paper, ink, grid = THEMES[theme]
    figure, axes = plt.subplots(figsize=(7.2, 4.6), facecolor=paper)
    axes.set_facecolor(paper)
    for (label, methods), colour, marker in zip(LINES.items(), COLOURS, MARKERS, strict=True):
        found = [(m, interval(list(own.values()))) for m in methods if len(own := scores(results, m)) > 2]
        if found:
            x = [results["summary"][m]["parameters"] / 1000 for m, _ in found]
            mean, low, high = np.array([values for _, values in found]).T
            x = np.array(x) * 1.025 ** (list(LINES).index(label) - 2)  # side by side where the numbers are equal
            settings = {"color": colour, "marker": marker, "markersize": 12 if marker in "*P" else 7, "capsize": 3}
            axes.errorbar(x, mean, (mean - low, high - mean), label=label, linewidth=2, elinewidth=1.2, **settings)
    full = results["summary"].get("full")
    if full:
        axes.axhline(full["mean"], color=ink, linestyle=":", linewidth=1)
        settings = {"textcoords": "offset points", "color": ink, "ha": "right", "fontsize": 8}
        axes.annotate("full fine-tuning, 22 M, 10 seeds", (147.5, full["mean"]), (-40, -11), **settings)
    axes.set_xscale("log", base=2)
    axes.set_xticks([73.7, 147.5, 294.9], ["74 k", "147 k", "295 k"])
    axes.set_xlabel("trained parameters", color=ink)
    axes.set_ylabel("test accuracy, %", color=ink)
    axes.set_title(
        "DINOv2-S, 16 digits of each class: mean and 95 % interval over 20 seeds (gradient, with outputs: 9)",
        color=ink,
        fontsize=9,
    )
    axes.tick_params(colors=ink, which="both")
    axes.minorticks_off()
    axes.grid(color=grid, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grid)
    axes.legend(frameon=False, labelcolor=ink, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    figure.tight_layout()
    figure.savefig(path, facecolor=paper, dpi=160)
    plt.close(figure)
    return path


def main() -> None:
    """Draw both, and print the table."""
    for theme in THEMES:
        print(plot(IMAGES / f"vit_{theme}.png", theme))
    print(starts_table())


if __name__ == "__main__":
    main()
