"""A GPU in one command: whether every verb is right there, and what it costs beside PEFT's LoRA.

    python -m benchmarks.gpu                          # at most eight minutes; make benchmark-gpu
    python -m benchmarks.gpu --device cpu --small     # the same code without a GPU, at a toy size

Nothing is downloaded: weights are random, shapes are those of SD3-medium and DiT-XL/2 (a few blocks). Each section
raises what is wrong as a failure in its result; the command ends with an error if there is one. What a machine cannot
run is left out by name, with the reason. Results go to benchmarks/results/gpu_<card>.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import slora_diffusers as sld
from benchmarks.blocks import CASES, RANK, Case, trainable
from benchmarks.gpu_checks import (
    Bench,
    adapters,
    section_compiled,
    section_offload,
    section_verbs,
    section_xformers,
)
from benchmarks.harness import RESULTS, machine, write_results
from slora_diffusers.training.precision import QUANTIZATIONS, quantization_config


def losses_of(model: nn.Module, loss: Callable[[], Tensor], steps: int, scaler: Any = None) -> list[float]:
    """Train the adapter by AdamW for some steps; the losses."""
    optimizer, losses = torch.optim.AdamW(trainable(model), lr=1e-3), []
    for _ in range(steps):
        value = loss()
        (value if scaler is None else scaler.scale(value)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(float(value))
    assert losses[-1] < losses[0], f"the loss did not fall: {losses[0]:.4g} to {losses[-1]:.4g}"
    return losses


def section_quantized(bench: Bench) -> dict[str, Any]:
    """NF4 and int8 bases as `slora train --quantize` loads them: an adapter learns, the base stays to the bit."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base: Any = SD3Transformer2DModel(sample_size=32, num_layers=4)
        base.to(torch.bfloat16).save_pretrained(folder)
        for name in QUANTIZATIONS:
            settings = quantization_config(name, torch.bfloat16)
            model: Any = SD3Transformer2DModel.from_pretrained(
                folder, quantization_config=settings, torch_dtype=torch.bfloat16, device_map={"": bench.device}
            )
            sld.add_serial_lora(model, sld.SerialLoraConfig(rank=RANK))
            before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
            x, text = torch.randn(1, 16, 32, 32), torch.randn(1, 77, 4096)
            inputs = [t.to(bench.device, torch.bfloat16) for t in (x, text, torch.randn(1, 2048))]

            def loss(model: Any = model, inputs: Any = inputs) -> Tensor:
                timestep = torch.full((1,), 500.0, device=bench.device)
                with torch.autocast(bench.device.type, torch.bfloat16):
                    return (model(*inputs, timestep).sample.float() - 1).square().mean()

            losses = losses_of(model, loss, 8)
            same = all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
            assert same, f"{name}: training changed the base"
            found[name] = {"first_loss": losses[0], "last_loss": losses[-1], "bytes": model.get_memory_footprint()}
    return found


def section_scaler(bench: Bench) -> dict[str, Any]:
    """fp16 autocast with a gradient scaler: the adapter's matrices stay fp32, and it learns."""
    case = bench.cases["DiT-XL/2"]
    model, streams = bench.model(case, torch.float16), bench.streams(case, torch.float16)
    sld.add_serial_lora(model, sld.SerialLoraConfig(rank=RANK))

    def loss() -> Tensor:
        with torch.autocast(bench.device.type, torch.float16):
            (out,) = case.run(model, streams)
        return (out.float() - 1).square().mean()

    scaler = torch.amp.GradScaler(bench.device.type)
    losses = losses_of(model, loss, 8, scaler)
    assert {p.dtype for p in trainable(model)} == {torch.float32}, "the adapter is not fp32"
    return {"first_loss": losses[0], "last_loss": losses[-1], "scale": scaler.get_scale()}


def section_costs(bench: Bench) -> dict[str, Any]:
    """Time and peak of memory of a forward and a training step in bf16: base, Serial LoRA, PEFT's LoRA."""
    found: dict[str, Any] = {}
    for name, case in bench.cases.items():
        base = bench.model(case, torch.bfloat16)
        shared = {id(parameter): parameter for parameter in base.parameters()}
        serial, peft = (copy.deepcopy(base, dict(shared)) for _ in range(2))
        sld.add_serial_lora(serial, sld.SerialLoraConfig(rank=RANK))
        targets = rf"transformer_blocks\..*\.({case.lora_targets})"
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), peft)
        models = {"base": base, "serial": serial, "peft": peft}
        for model in (serial, peft):
            for parameter in trainable(model):
                parameter.data = parameter.data.float()
        streams = bench.streams(case, torch.bfloat16)

        def forward(model: nn.Module, case: Case = case, streams: Any = streams) -> None:
            with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
                case.run(model, streams)

        def train(model: nn.Module, case: Case = case, streams: Any = streams) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                outs = case.run(model, tuple(x.detach().requires_grad_() for x in streams))
            torch.stack([out.float().square().mean() for out in outs]).sum().backward()
            model.zero_grad(set_to_none=True)

        found[name] = {
            what: bench.times({n: lambda call=call, model=model: call(model) for n, model in models.items()})
            for what, call in (("forward", forward), ("train", train))
        }
    return found


@torch.no_grad()
def section_mixed(bench: Bench) -> dict[str, Any]:
    """Eight samples with eight adapters in one batch, beside the base's batch and one sample after the other."""
    case = replace(bench.cases["DiT-XL/2"], batch=8)
    base, model = bench.model(case, torch.bfloat16), bench.model(case, torch.bfloat16)
    names, streams = adapters(model, 8), bench.streams(case, torch.bfloat16)

    def mixed() -> None:
        with sld.serial_lora_batch(model, names):
            case.run(model, streams)

    def one_by_one() -> None:
        for i, name in enumerate(names):
            sld.set_serial_lora(model, name)
            case.run(model, tuple(stream[i : i + 1] for stream in streams))

    return bench.times({"base": lambda: case.run(base, streams), "mixed": mixed, "one by one": one_by_one})


def _needs_cuda(bench: Bench) -> str | None:
    return None if bench.cuda else "it needs a GPU"


def _needs(package: str) -> Callable[[Bench], str | None]:
    def reason(bench: Bench) -> str | None:
        missing = None if importlib.util.find_spec(package) else f"{package} is not installed"
        return _needs_cuda(bench) or missing

    return reason


def _nothing(bench: Bench) -> str | None:
    return None


SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], Callable[[Bench], str | None]]] = {
    "verbs": (section_verbs, _nothing),
    "compiled": (section_compiled, _nothing),
    "costs": (section_costs, _nothing),
    "mixed": (section_mixed, _nothing),
    "offload": (section_offload, _nothing),
    "scaler": (section_scaler, _needs_cuda),
    "quantized": (section_quantized, _needs("bitsandbytes")),
    "xformers": (section_xformers, _needs("xformers")),
}
"""Name of a section -> what it does, and why a machine cannot do it (None: it can)."""


def run_section(name: str, bench: Bench, left: float) -> dict[str, Any]:
    """One section's result: what it found, why it was skipped, or what failed; and its seconds."""
    section, reason = SECTIONS[name]
    skipped = reason(bench) or (None if left > 0 else "the time is over (--minutes)")
    if skipped:
        return {"skipped": skipped}
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"found": section(bench)}
    except Exception as error:  # a section that fails must not take the others' results along
        result = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-4)}
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
    return {**result, "seconds": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, write, and return the path of the results; SystemExit if a section failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu.")
    parser.add_argument("--small", action="store_true", help="Blocks of width 16: whether it runs, not how fast.")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=20, help="How often everything is timed.")
    parser.add_argument("--minutes", type=float, default=7.0, help="No section begins after this.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of the results.")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --device cpu --small tries the same code without one")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = {"heads": 2, "head_dim": 8, "blocks": 1} if options.small else {}
    bench = Bench(device, {name: replace(case, **sizes) for name, case in CASES.items()}, options.rounds)
    card = torch.cuda.get_device_name(device) if bench.cuda else "cpu"
    end, results = time.monotonic() + 60 * options.minutes, {}
    for name in options.sections:
        results[name] = run_section(name, bench, end - time.monotonic())
        print(f"{name}: {next(iter(results[name]))} {results[name].get('skipped', '')}", flush=True)
    name = f"gpu_{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}" + ("_small" if options.small else "")
    settings = {"small": options.small, "rounds": options.rounds, "rank": RANK}
    path = write_results(
        name, {"card": card, "machine": machine(), "settings": settings, "sections": results}, options.output
    )
    if failed := [f"{name}: {r['failed']}" for name, r in results.items() if "failed" in r]:
        print(path)
        sys.exit("\n".join(failed))
    return path


if __name__ == "__main__":
    print(main())
