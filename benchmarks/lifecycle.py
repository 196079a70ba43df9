"""How long the verbs take on a full-size SD3-medium in bf16, beside diffusers' own LoRA, in turns in one run.

    python -m benchmarks.lifecycle

The transformer (24 blocks, 2 billion weights drawn at random) is one and the same for both; every round takes it
through a whole life of nine adapters with one library, then with the other. Both read a bf16 file of rank 16, from
the page cache: LoRA on q, k, v and the output projections of both streams, Serial LoRA on both inputs.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import nn

import slora_diffusers as sld
from benchmarks.blocks import CASES, RANK
from benchmarks.harness import CLOCKS, RESULTS, Timer, compare, machine, write_results

ADAPTERS = tuple(f"adapter_{i}" for i in range(9))


@dataclass(frozen=True)
class Library:
    """The verbs of one library, on one model and one adapter file.

    Args:
        load: Add the file's adapter under a name.
        swap: Put the file's adapter in the place of the one of that name.
        activate: Make these adapters active with these weights.
        fuse: Merge one active adapter into the weights.
        unfuse: Take it out again.
        delete: Remove adapters.
        clean: Remove whatever is left.
        file_bytes: Size of the file.
    """

    load: Callable[[str], Any]
    swap: Callable[[str], Any]
    activate: Callable[[list[str], list[float]], Any]
    fuse: Callable[[str], Any]
    unfuse: Callable[[], Any]
    delete: Callable[[list[str]], Any]
    clean: Callable[[], Any]
    file_bytes: int

    def life(self, timer: Timer) -> dict[str, float]:
        """{verb: seconds} of nine adapters' life, which leaves the model as it was."""
        seconds: dict[str, float] = {}
        for i, name in enumerate(ADAPTERS):
            taken = timer.time(lambda name=name: self.load(name))
            if i in (0, 4, 8):
                seconds[f"load ({i} there)"] = taken
        first, last = ADAPTERS[0], ADAPTERS[-1]
        steps: Mapping[str, Callable[[], Any]] = {
            "set 9 adapters": lambda: self.activate(list(ADAPTERS), [0.5] * len(ADAPTERS)),
            "set 1 of 9 adapters": lambda: self.activate([first], [1.0]),
            "fuse": lambda: self.fuse(first),
            "unfuse": self.unfuse,
            "swap": lambda: self.swap(first),
            "delete 1 of 9": lambda: self.delete([last]),
            "delete all 8": lambda: self.delete(list(ADAPTERS[:-1])),
        }
        for verb, step in steps.items():
            seconds[verb] = timer.time(step)
        self.clean()
        return seconds


def build(layers: int, heads: int) -> SD3Transformer2DModel:
    """SD3-medium's transformer in bf16, with random weights."""
    config: dict[str, Any] = {"num_layers": layers, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config, pos_embed_max_size=192).eval().requires_grad_(False)
    nn.Module.to(model, torch.bfloat16).to_empty(device="cpu")  # diffusers' own `to` warns of empty lists
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.uniform_(tensor, -0.02, 0.02)
    return model


def serial_library(model: SD3Transformer2DModel, folder: Path) -> Library:
    """Serial LoRA's verbs."""
    sld.add_serial_lora(model, sld.SerialLoraConfig(rank=RANK))
    _draw_zeros(model)
    path = sld.save_serial_lora(model, folder, dtype=torch.bfloat16)
    sld.unload_serial_lora(model)

    def swap(name: str) -> None:
        sld.delete_serial_lora(model, name)
        sld.load_serial_lora(model, folder, name)

    return Library(
        load=lambda name: sld.load_serial_lora(model, folder, name),
        swap=swap,
        activate=lambda names, weights: sld.set_serial_lora(model, names, weights),
        fuse=lambda name: sld.fuse_serial_lora(model, name),
        unfuse=lambda: sld.unfuse_serial_lora(model),
        delete=lambda names: sld.delete_serial_lora(model, names),
        clean=lambda: sld.unload_serial_lora(model),
        file_bytes=path.stat().st_size,
    )


def stock_library(model: SD3Transformer2DModel, folder: Path) -> Library:
    """diffusers' verbs, which are PEFT's, with the settings that its pipelines use."""
    targets = rf"transformer_blocks\..*\.({CASES['SD3-medium'].lora_targets})"
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    _draw_zeros(model)
    nn.Module.to(model, torch.bfloat16)
    model.save_lora_adapter(folder)
    model.unload_lora()
    (path,) = folder.glob("*.safetensors")

    def load(name: str, **more: Any) -> None:
        options = {"prefix": None, "low_cpu_mem_usage": True, "weight_name": path.name}
        model.load_lora_adapter(folder, adapter_name=name, **options, **more)

    return Library(
        load=load,
        swap=lambda name: load(name, hotswap=True),
        activate=model.set_adapters,
        fuse=lambda name: model.fuse_lora(adapter_names=[name]),
        unfuse=model.unfuse_lora,
        delete=model.delete_adapters,
        clean=model.unload_lora,
        file_bytes=path.stat().st_size,
    )


def _draw_zeros(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=1e-3)
    model.requires_grad_(False)


def measure(libraries: Mapping[str, Library], timer: Timer) -> dict[str, Any]:
    """{verb: {library: seconds and ratio to diffusers' LoRA}} over all rounds."""
    seconds: dict[str, dict[str, list[float]]] = {}
    names = list(libraries)
    for i in range(timer.warmup + timer.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for verb, taken in libraries[name].life(timer).items():
                if i >= timer.warmup:
                    seconds.setdefault(verb, {}).setdefault(name, []).append(taken)
    return {verb: compare(taken, ("lora",)) for verb, taken in seconds.items()}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, write, and return the path of the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="How many lives of each library are timed.")
    parser.add_argument("--threads", type=int, default=1, help="Threads that torch may use.")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="'cpu' leaves out what other programs take.")
    parser.add_argument("--layers", type=int, default=24, help="Fewer blocks, for a quick try.")
    parser.add_argument("--heads", type=int, default=24, help="Fewer attention heads, for a quick try.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of lifecycle.json.")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    model = build(options.layers, options.heads)
    with tempfile.TemporaryDirectory() as folder:
        libraries = {
            "serial": serial_library(model, Path(folder) / "serial"),
            "lora": stock_library(model, Path(folder) / "lora"),
        }
        verbs = measure(libraries, Timer(options.rounds, clock=options.clock))
    settings = {"rank": RANK, "rounds": options.rounds, "clock": options.clock, "layers": options.layers}
    results = {
        "machine": machine(),
        "settings": settings | {"parameters": sum(p.numel() for p in model.parameters())},
        "file_bytes": {name: library.file_bytes for name, library in libraries.items()},
        "verbs": verbs,
    }
    return write_results("lifecycle", results, options.output)


if __name__ == "__main__":
    print(main())
