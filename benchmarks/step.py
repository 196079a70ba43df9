"""Forward and train step on real-width blocks: the base, Serial LoRA live and fused, PEFT's LoRA, in turns in one run.

    python -m benchmarks.step

The blocks stand for a slice from the middle of SD3-medium and of DiT-XL/2. Their inputs need a gradient, as behind
other adapted blocks, so the base's train step (forward and backward to the inputs) is what any adapter pays at least.
LoRA sits on q, k, v and the output projection (and SD3's added ones), Serial LoRA on the attention's inputs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from benchmarks.blocks import CASES, PRECISIONS, RANK, Case, Precision, Subject, subjects, trainable
from benchmarks.harness import CLOCKS, RESULTS, Timer, compare, machine, write_results
from benchmarks.tracing import kernels, saved_bytes, time_per_operation
from slora_diffusers import save_serial_lora


def measure(case: Case, precision: Precision, timer: Timer) -> dict[str, Any]:
    """One case in one precision: times over the base's and over PEFT's, and what does not vary from run to run."""
    every = subjects(case, precision)
    trained = {name: subject for name, subject in every.items() if name != "serial_fused"}
    results: dict[str, Any] = {
        "forward": compare(timer.alternate({name: s.forward for name, s in every.items()}), ("base", "peft")),
        "forward_kernels": {name: kernels(s.forward) for name, s in every.items()},
    }
    if precision.trains:
        results |= {
            "train": compare(timer.alternate({name: s.train_step for name, s in trained.items()}), ("base", "peft")),
            "train_kernels": {name: kernels(s.forward_backward) for name, s in trained.items()},
            "train_profile": time_per_operation({name: s.train_step for name, s in trained.items()}),
            "saved_bytes": {name: saved_bytes(s.loss, s.model.parameters()) for name, s in trained.items()},
            "adapter": {name: adapter_size(s) for name, s in trained.items() if s.optimizer is not None},
        }
    return results


def adapter_size(subject: Subject) -> dict[str, int]:
    """Parameters of an adapter, bytes of its optimizer's state after a step, bytes of its file (fp32)."""
    assert subject.optimizer is not None
    state = [v for values in subject.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return {
        "parameters": sum(p.numel() for p in trainable(subject.model)),
        "optimizer_bytes": sum(v.numel() * v.element_size() for v in state),
        "file_bytes": file_bytes(subject.model),
    }


def file_bytes(model: nn.Module) -> int:
    """Size of the file that the adapter's own library writes."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "_serial_lora"):
            return save_serial_lora(model, folder).stat().st_size
        path = Path(folder) / "adapter_model.safetensors"
        save_file(get_peft_model_state_dict(model, adapter_name="default"), path)
        return path.stat().st_size


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="How often everything is timed.")
    parser.add_argument("--threads", type=int, default=1, help="Threads that torch may use.")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="'cpu' leaves out what other programs take.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--heads", type=int, help="Fewer attention heads, for a quick try.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of step.json.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, write, and return the path of the results."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    timer = Timer(options.rounds, clock=options.clock)
    cases: dict[str, Any] = {}
    for name in options.cases:
        case = replace(CASES[name], **({"heads": options.heads} if options.heads else {}))
        size = {"width": case.width, "blocks": case.blocks, "batch": case.batch, "tokens": case.tokens}
        cases[name] = {"size": size, "precisions": {}}
        for precision in options.precisions:
            print(f"{name}, {precision} ...", flush=True)
            cases[name]["precisions"][precision] = measure(case, PRECISIONS[precision], timer)
    settings = {"rank": RANK, "rounds": options.rounds, "clock": options.clock}
    return write_results("step", {"machine": machine(), "settings": settings, "cases": cases}, options.output)


if __name__ == "__main__":
    print(main())
