"""The one table of the README: Serial LoRA beside LoRA, from `benchmarks/results/*.json` and the records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import starts
from benchmarks.harness import RESULTS, read_results

MODEL = "SD3-medium"
WITH_OUTPUTS = ("hidden_states", "encoder_hidden_states", "attention_output")
METHODS = {"serial-r8": "serial", "serial-r8+output": "outputs", "lora-r8": "lora"}


def front_table(parameters: Mapping[str, int], folder: Path = RESULTS) -> str:
    """One row for each thing that one asks first.

    Args:
        parameters: Of SD3-medium at rank 16, by "serial", "outputs" and "lora".
        folder: Where the results are.
    """
    step, lifecycle = read_results("step", folder), read_results("lifecycle", folder)
    quality = read_results(starts.DIGITS, folder)
    sizes, load = lifecycle["file_bytes"], lifecycle["verbs"]["load (0 there)"]
    trained = step["cases"][MODEL]["precisions"]["bf16 autocast"]["train"]
    accuracy = {column: starts.interval(list(starts.scores(quality, m).values())) for m, column in METHODS.items()}
    minus = {c: starts.difference(quality, m, "lora-r8") for m, c in METHODS.items() if c != "lora"}
    rows = {
        f"trained parameters, {MODEL}, rank 16": {name: f"{n:,}" for name, n in parameters.items()},
        f"file of it, bf16 ({sizes['serial'] / sizes['lora']:.0%})": {n: f"{b / 1e6:.1f} MB" for n, b in sizes.items()},
        "accuracy, DINOv2-S, rank 8, 16 digits of each class (95 % interval)": {
            name: "{:.1f} % ({:.1f} to {:.1f})".format(*found) for name, found in accuracy.items()
        },
        "minus LoRA's, same seeds": {n: "{:+.1f} ({:+.1f} to {:+.1f})".format(*d) for n, d in minus.items() if d},
        "train step over the base's, bf16 (quartiles)": {
            ours: "{:+.1f} % ({:+.1f} to {:+.1f})".format(*_percent(trained[theirs]["over_base"]))
            for ours, theirs in (("serial", "serial"), ("lora", "peft"))
        },
        f"load into a full-size {MODEL}": {n: f"{t['seconds']['median'] * 1e3:.0f} ms" for n, t in load.items()},
        "loaded by": {
            "serial": "this library; others load the LoRA that `export_lora` writes",
            "lora": "diffusers where the pipeline has `load_lora_weights`, PEFT, ComfyUI",
        },
    }
    lines = ["|  | Serial LoRA | with outputs, too | LoRA |", "| --- | --: | --: | --: |"]
    for what, cells in rows.items():
        lines.append(f"| {what} | {' | '.join(cells.get(name, '') for name in ('serial', 'outputs', 'lora'))} |")
    return "\n".join(lines)


def _percent(ratio: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple((ratio[key] - 1) * 100 for key in ("median", "q1", "q3"))
