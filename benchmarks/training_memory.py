"""What training SD3-medium keeps in memory: activations saved for the backward pass, and the optimizer's states.

    python -m benchmarks.training_memory

The whole transformer, 24 blocks at their real width, runs on fake tensors: every operation is dispatched, under the
same autocast as in training, and every tensor that autograd saves is counted, but nothing is computed. So the numbers
are exact for this version of torch on any machine. Optimizer states are real: each optimizer takes one step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import RESULTS, machine, write_results
from benchmarks.tracing import saved_bytes
from slora_diffusers import SerialLoraConfig, SerialLoraError
from slora_diffusers.training.methods import ADAPTERS
from slora_diffusers.training.optim import make_optimizer, parameter_groups
from slora_diffusers.training.precision import trainable

SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
TEXT_TOKENS = 77 + 77
OPTIMIZERS = ("adamw", "adamw8bit", "schedulefree", "prodigy")


def build(adapter: str, rank: int) -> nn.Module:
    """SD3-medium in bf16 with an adapter in fp32, as the recipe trains it, on the meta device."""
    with torch.device("meta"):
        model: Any = SD3Transformer2DModel(**SD3_MEDIUM)
        model = model.to(torch.bfloat16)
        ADAPTERS[adapter].attach(model, SerialLoraConfig(rank=rank))
    return model.train()


def to_fake_cpu(model: nn.Module) -> None:
    """Replace tensors of the meta device by fake ones that claim to be on the CPU, so that its autocast acts."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def activation_bytes(adapter: str, rank: int, side: int, batch: int, checkpointing: bool) -> int:
    """Bytes that autograd saves for one sample size, on fake tensors."""
    model: Any = build(adapter, rank)
    with FakeTensorMode():
        to_fake_cpu(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = torch.zeros(batch, 16, side // 8, side // 8, dtype=torch.bfloat16)
        text = torch.zeros(batch, TEXT_TOKENS, 4096, dtype=torch.bfloat16)
        pooled = torch.zeros(batch, 2048, dtype=torch.bfloat16)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x, text, pooled, torch.ones(batch)).sample.float().square().mean()

        return saved_bytes(loss, [*model.parameters(), *model.buffers()])


def optimizer_bytes(name: str, shapes: Sequence[torch.Size]) -> int | str:
    """Bytes of an optimizer's state for parameters of these shapes, after a step; or why it could not be made."""
    parameters = [(f"{index}", nn.Parameter(torch.zeros(shape))) for index, shape in enumerate(shapes)]
    try:
        optimizer = make_optimizer(name, parameter_groups(parameters, 1e-4), (0.9, 0.999), 0.0, 1e-8)
    except SerialLoraError as error:
        return str(error)
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in states)


def measure(rank: int, side: int, batch: int) -> dict[str, Any]:
    """Both adapters: parameters, saved activations with and without gradient checkpointing, optimizer states."""
    results: dict[str, Any] = {}
    for adapter in ("serial", "lora"):
        shapes = [parameter.shape for _, parameter in trainable([build(adapter, rank)])]
        results[adapter] = {
            "parameters": sum(shape.numel() for shape in shapes),
            "activations": activation_bytes(adapter, rank, side, batch, checkpointing=False),
            "activations_checkpointed": activation_bytes(adapter, rank, side, batch, checkpointing=True),
            "optimizer": {name: optimizer_bytes(name, shapes) for name in OPTIMIZERS},
        }
    return results


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, in MB."""
    serial, lora = results["serial"], results["lora"]
    rows = [("trained parameters (fp32)", 4 * serial["parameters"], 4 * lora["parameters"])]
    for name, title in (("activations", "saved activations"), ("activations_checkpointed", "with checkpointing")):
        rows.append((title, serial[name], lora[name]))
    rows += [(f"states of {name}", serial["optimizer"][name], lora["optimizer"][name]) for name in OPTIMIZERS]
    lines = ["| MB | Serial LoRA | PEFT's LoRA | ratio |", "|---|---|---|---|"]
    for title, ours, theirs in rows:
        if isinstance(ours, str):
            lines.append(f"| {title} | not installed | not installed | |")
        else:
            lines.append(f"| {title} | {ours / 1e6:,.1f} | {theirs / 1e6:,.1f} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print the table, write the results and give their path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024, help="Side of the image in pixels.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of training_memory.json.")
    options = parser.parse_args(argv)
    results = measure(options.rank, options.side, options.batch)
    print(table(results))
    settings = {"rank": options.rank, "side": options.side, "batch": options.batch, "precision": "bf16 autocast"}
    return write_results("training_memory", {"machine": machine(), "settings": settings, **results}, options.output)


if __name__ == "__main__":
    print(main())
