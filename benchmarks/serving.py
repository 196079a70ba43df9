"""How many requests with adapters of their own a model serves: mixed batches here, against one adapter at a time.

    python -m benchmarks.serving

All requests are there at once, in a random order of their adapters; a batch holds eight at most. Mixed batches take
them as they come. The others serve one adapter at a time, the longest waiting request's, and join those that share it:
here by making it active, in PEFT by hotswap into one loaded adapter, or by merging into the weights and out again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import Tensor, nn

import slora_diffusers as sld
from benchmarks.blocks import CASES, RANK, Case
from benchmarks.harness import CLOCKS, RESULTS, machine, write_results
from slora_diffusers.demo.adapt import load_base

BATCH = 8
TARGETS = r"to_q|to_k|to_v|to_out\.0"
Forward = Callable[[nn.Module, int], Any]


@dataclass(frozen=True)
class Subject:
    """A model to serve: how it is built, one step of a batch of it, and what PEFT's LoRA adapts in it."""

    build: Callable[[], nn.Module]
    step: Forward
    targets: str


@dataclass(frozen=True)
class Server:
    """One way to serve.

    Args:
        serving: From the adapters of a batch to what its steps run in.
        mixes: Whether a batch may hold several adapters.
        bytes_each: Bytes that an adapter takes while it is held.
    """

    model: nn.Module
    serving: Callable[[Sequence[int]], AbstractContextManager[Any]]
    mixes: bool
    bytes_each: int

    def batches(self, adapters: Sequence[int]) -> Iterator[list[int]]:
        """The requests' numbers, batch by batch, the longest waiting first."""
        waiting = list(range(len(adapters)))
        while waiting:
            first = adapters[waiting[0]]
            batch = [i for i in waiting if self.mixes or adapters[i] == first][:BATCH]
            waiting = [i for i in waiting if i not in batch]
            yield batch

    @torch.no_grad()
    def serve(self, adapters: Sequence[int], step: Forward, steps: int, clock: str) -> dict[str, float]:
        """Serve one request per entry; returns rates by both clocks, latencies by one, and the number of batches."""
        wall, cpu, start = time.perf_counter(), time.process_time(), CLOCKS[clock]()
        ended, count = [], 0
        for batch in self.batches(adapters):
            with self.serving([adapters[i] for i in batch]):
                for _ in range(steps):
                    step(self.model, len(batch))
            ended += [CLOCKS[clock]() - start] * len(batch)
            count += 1
        taken, used = time.perf_counter() - wall, time.process_time() - cpu
        cuts = statistics.quantiles(ended, n=20, method="inclusive")
        rates = {"requests_per_s": len(adapters) / taken, "requests_per_cpu_s": len(adapters) / used}
        return {**rates, "p50": cuts[9], "p95": cuts[18], "batches": count}


def serial_servers(subject: Subject, count: int) -> dict[str, Server]:
    """Serial LoRA: mixed batches, and one adapter at a time."""
    model = subject.build()
    for i in range(count):
        sld.add_serial_lora(model, sld.SerialLoraConfig(rank=RANK), f"a{i}")
    _draw(model)
    size = sum(p.nbytes for p in sld.serial_lora_parameters(model, "a0"))

    @contextmanager
    def one(adapters: Sequence[int]) -> Iterator[None]:
        sld.set_serial_lora(model, f"a{adapters[0]}")
        yield

    def mixed(adapters: Sequence[int]) -> AbstractContextManager[Any]:
        return sld.serial_lora_batch(model, [f"a{i}" for i in adapters])

    sld.set_serial_lora(model, [])
    return {"mixed": Server(model, mixed, True, size), "one at a time": Server(model, one, False, size)}


def peft_servers(subject: Subject, count: int) -> dict[str, Server]:
    """PEFT's LoRA on q, k, v and the output: hotswap into one adapter, and merge and unmerge of loaded ones."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=rf".*\.({subject.targets})")
    swapped, merged = subject.build(), subject.build()
    inject_adapter_in_model(config, swapped, "default")
    states = []
    for _ in range(count):
        _draw(swapped)
        states.append({k: v.clone() for k, v in swapped.state_dict().items() if "lora_" in k})
    for i in range(count):
        inject_adapter_in_model(config, merged, f"a{i}")
    _draw(merged)
    layers = [module for module in merged.modules() if isinstance(module, BaseTunerLayer)]
    size = sum(tensor.nbytes for tensor in states[0].values())

    @contextmanager
    def hotswap(adapters: Sequence[int]) -> Iterator[None]:
        hotswap_adapter_from_state_dict(swapped, states[adapters[0]], "default", config)
        yield

    @contextmanager
    def fuse(adapters: Sequence[int]) -> Iterator[None]:
        for layer in layers:
            layer.set_adapter(f"a{adapters[0]}")
            layer.merge(adapter_names=[f"a{adapters[0]}"])
        try:
            yield
        finally:
            for layer in layers:
                layer.unmerge()

    return {
        "PEFT, hotswap": Server(swapped, hotswap, False, size),
        "PEFT, fuse and unfuse": Server(merged, fuse, False, size),
    }


def _draw(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=1e-2)
    model.requires_grad_(False)


def _blocks(case: Case) -> Subject:
    streams = tuple(torch.randn(BATCH, n, case.width) for n in case.tokens)

    def step(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
        return case.run(model, tuple(stream[:batch] for stream in streams))

    return Subject(lambda: case.build(case).eval(), step, case.lora_targets)


def _built_in() -> Subject:
    """The built-in base's transformer, with guidance: twice the samples."""
    base = load_base().transformer
    latents = torch.randn(2 * BATCH, base.config.in_channels, base.config.sample_size, base.config.sample_size)

    def step(model: nn.Module, batch: int) -> Tensor:
        labels = torch.arange(2 * batch) % 26
        return model(latents[: 2 * batch], timestep=torch.full_like(labels, 500), class_labels=labels).sample

    return Subject(lambda: load_base().transformer.eval(), step, TARGETS)


def subjects(blocks: int) -> dict[str, Subject]:
    """The built-in base, and real-width blocks of DiT-XL and SD3."""
    cases = {name: _blocks(replace(case, blocks=blocks)) for name, case in CASES.items()}
    return {"built-in base": _built_in(), **cases}


def measure(
    subject: Subject, counts: Sequence[int], steps: Sequence[int], requests: int, rounds: int, clock: str
) -> dict[str, Any]:
    """Medians by steps, number of adapters and way to serve, all ways in turns in every round."""
    most = max(counts)
    servers = {**serial_servers(subject, most), **peft_servers(subject, most)}
    for server in servers.values():
        server.serve(list(range(min(2, most))), subject.step, 1, clock)  # warm
    table: dict[str, Any] = {}
    results = {"bytes_each": {name: server.bytes_each for name, server in servers.items()}, "steps": table}
    for number in steps:
        for count in counts:
            adapters = [i % count for i in range(requests)]
            random.Random(0).shuffle(adapters)
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for i in range(rounds):
                names = list(servers)
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    taken[name].append(servers[name].serve(adapters, subject.step, number, clock))
            table.setdefault(str(number), {})[str(count)] = {name: _medians(rows) for name, rows in taken.items()}
    return results


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, write, and return the path of the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--subjects", nargs="*", help="Some of the models; all by default. Others' results stay.")
    parser.add_argument("--adapters", nargs="*", type=int, default=[1, 4, 16, 64], help="Numbers of adapters.")
    parser.add_argument("--steps", nargs="*", type=int, default=[4, 20], help="Sampling steps of a request.")
    parser.add_argument("--requests", type=int, default=64, help="Number of requests.")
    parser.add_argument("--rounds", type=int, default=3, help="How often every way is timed.")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="cpu", help="Of the latencies; 'cpu' leaves others' work out."
    )
    parser.add_argument("--blocks", type=int, default=1, help="Real-width blocks.")
    parser.add_argument("--threads", type=int, default=1, help="Threads that torch may use.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of serving.json.")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    known = subjects(options.blocks)
    names = options.subjects or list(known)
    path = options.output / "serving.json"
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}  # each case is measured by itself
    for name in names:
        settings = {"batch": BATCH, "rank": RANK} | {
            k: getattr(options, k) for k in ("requests", "rounds", "blocks", "clock")
        }
        measured = measure(
            known[name], options.adapters, options.steps, options.requests, options.rounds, options.clock
        )
        cases[name] = {"machine": machine(), "settings": settings, **measured}
        write_results("serving", {"cases": cases}, options.output)
    return path


if __name__ == "__main__":
    print(main())
