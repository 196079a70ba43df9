"""What is right on a device: every verb, offloading, xFormers' operator and compiled graphs, against a reference."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import slora_diffusers as sld
from benchmarks.blocks import RANK, Case
from benchmarks.harness import spread

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest error allowed against float64, of the largest value."""


@dataclass(frozen=True)
class Bench:
    """Where to measure, and at which size."""

    device: torch.device
    cases: Mapping[str, Case]
    rounds: int

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def model(self, case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The case's blocks with fixed random weights, on the device."""
        torch.manual_seed(0)
        return nn.Module.to(case.build(case), self.device, dtype).eval().requires_grad_(False)

    def streams(self, case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The blocks' inputs."""
        torch.manual_seed(1)
        return tuple(stream.to(self.device, dtype) for stream in case.streams())

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def times(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """{name: milliseconds (median, quartiles) and, on a GPU, the peak of memory in bytes}, in turns."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        peaks: dict[str, int] = {}
        for i in range(self.rounds + 2):
            for name, call in calls.items():
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                self.sync()
                start = time.perf_counter()
                call()
                self.sync()
                if i >= 2:
                    taken[name].append(1e3 * (time.perf_counter() - start))
                if self.cuda:
                    peaks[name] = torch.cuda.max_memory_allocated()
        return {name: {"ms": spread(ms), "peak_bytes": peaks.get(name)} for name, ms in taken.items()}


def adapters(model: nn.Module, count: int) -> list[str]:
    """Add adapters with fixed random matrices; their names."""
    names = [f"a{i}" for i in range(count)]
    for i, name in enumerate(names):
        sld.add_serial_lora(model, sld.SerialLoraConfig(rank=RANK), name)
        generator = torch.Generator().manual_seed(i)
        for parameter in sld.serial_lora_parameters(model, name):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.requires_grad_(False)
    sld.set_serial_lora(model, names[:1])
    return names


@torch.no_grad()
def output(case: Case, model: nn.Module, streams: tuple[Tensor, ...]) -> Tensor:
    """What is behind the blocks, flat, in float64 on the CPU."""
    return torch.cat([out.flatten().double().cpu() for out in case.run(model, streams)])


def close(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> float:
    """The largest error, of the largest value; AssertionError if it is above the tolerance."""
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, f"{what}: an error of {error:.2g}, where {tolerance:.2g} is allowed"
    return error


def section_verbs(bench: Bench) -> dict[str, Any]:
    """Every verb against the same adapters in float64 on the CPU, in every dtype; unfuse to the bit."""
    errors: dict[str, Any] = {}
    for name, case in bench.cases.items():
        for dtype, tolerance in TOLERANCE.items():
            model, streams = bench.model(case, dtype), bench.streams(case, dtype)
            names = adapters(model, 2)
            exact = copy.deepcopy(model).to("cpu", torch.float64)
            inputs = tuple(stream.cpu().double() for stream in streams)
            found = errors.setdefault(name, {})[str(dtype)] = {}

            def check(verb: str, found: Any = found, run: Any = (case, model, streams, exact, inputs),
                      tolerance: float = tolerance) -> None:  # fmt: skip
                case, model, streams, exact, inputs = run
                found[verb] = close(verb, output(case, model, streams), output(case, exact, inputs), tolerance)

            check("live")
            for one in (model, exact):
                sld.set_serial_lora(one, names, [0.5, -1.0])
            check("set")
            with sld.serial_lora_scale(model, 0.5), sld.serial_lora_scale(exact, 0.5):
                check("scale")
            samples = (names * case.batch)[: case.batch]
            with sld.serial_lora_batch(model, samples), sld.serial_lora_batch(exact, samples):
                check("batch")
            before = [p.detach().clone() for p in model.parameters()]
            sld.fuse_serial_lora(model)
            check("fuse")
            sld.unfuse_serial_lora(model)
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), (
                "unfuse: not bitwise"
            )
            with tempfile.TemporaryDirectory() as folder:
                sld.save_serial_lora(model, folder, names[0])
                for one in (model, exact):
                    sld.delete_serial_lora(one, names)
                    sld.load_serial_lora(one, folder, "again")
            check("load")
            for one in (model, exact):
                sld.unload_serial_lora(one)
            check("unload")
    return errors


def section_offload(bench: Bench) -> dict[str, Any]:
    """diffusers' group offloading, with a stream on a GPU: the output and the verbs are those of a resident model."""
    from diffusers.hooks import apply_group_offloading

    (name, case), *_ = bench.cases.items()
    resident, offloaded, streams = bench.model(case), bench.model(case).cpu(), bench.streams(case)
    names = adapters(resident, 2)
    adapters(offloaded, 2)
    apply_group_offloading(offloaded, onload_device=bench.device, offload_device=torch.device("cpu"),
                           offload_type="leaf_level", use_stream=bench.cuda)  # fmt: skip
    found = {"model": name, "stream": bench.cuda}
    for verb in ("live", "set", "fuse", "unfuse"):
        for one in (resident, offloaded):
            if verb == "set":
                sld.set_serial_lora(one, names[1], 0.5)
            elif verb != "live":
                getattr(sld, f"{verb}_serial_lora")(one)
        found[verb] = close(verb, output(case, offloaded, streams), output(case, resident, streams), 1e-5)
    return found


def section_xformers(bench: Bench) -> dict[str, Any]:
    """xFormers' own operator reads the transformed input: the output is that of PyTorch's attention."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    case = bench.cases["DiT-XL/2"]
    model, streams = bench.model(case, torch.float16), bench.streams(case, torch.float16)
    adapters(model, 1)
    wanted = output(case, model, streams)
    module: Any
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(XFormersAttnProcessor())
    return {"error": close("xformers", output(case, model, streams), wanted, TOLERANCE[torch.float16])}


def section_compiled(bench: Bench) -> dict[str, Any]:
    """fullgraph=True, with CUDA graphs on a GPU, in reserved capacity: mixes and scales compile nothing again."""
    from torch._dynamo.utils import counters

    case = bench.cases["DiT-XL/2"]
    case = replace(case, batch=8)
    plain, reserved, (image,) = bench.model(case), bench.model(case), bench.streams(case)
    names = adapters(plain, 4)
    sld.reserve_serial_lora(reserved, capacity=(RANK, 4))
    for name in names:
        sld.load_serial_lora(reserved, sld.serial_lora_state_dict(plain, name), name)
    blocks: Any = reserved.get_submodule("transformer_blocks")
    options: dict[str, Any] = {"mode": "reduce-overhead"} if bench.cuda else {"backend": "eager"}
    labels = torch.zeros(len(image), dtype=torch.long, device=bench.device)

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x, timestep=labels, class_labels=labels)
        return x

    torch._dynamo.reset()
    counters.clear()
    run, found = torch.compile(forward, fullgraph=True, **options), {}
    with torch.no_grad():
        for _ in range(3):  # compiled, recorded, replayed
            run(image)
        first = counters["stats"]["unique_graphs"]
        mixes = ([*names, *names], [names[0], None] * 4, [(names[1], 0.5), {names[2]: 1.0, names[3]: -1.0}] * 4)
        for i, mix in enumerate(mixes):
            with sld.serial_lora_batch(reserved, mix), sld.serial_lora_batch(plain, mix):
                got, wanted = run(image).double().cpu(), output(case, plain, (image,))
                found[f"mix {i}"] = close(f"mix {i}", got.flatten(), wanted, 1e-4)
        for one in (plain, reserved):
            sld.set_serial_lora(one, names[:2])
        for scale in (1.0, 0.5, 0.0):
            with sld.serial_lora_scale(reserved, scale), sld.serial_lora_scale(plain, scale):
                got, wanted = run(image).double().cpu(), output(case, plain, (image,))
                found[f"scale {scale}"] = close(f"scale {scale}", got.flatten(), wanted, 1e-4)
    again = counters["stats"]["unique_graphs"] - first
    assert again == 0, f"{again} graphs were compiled again"
    return {"cuda_graphs": bench.cuda, "graphs": first, "errors": found}
