"""What training keeps in memory: the most bytes at a time in the ways that there are, saved activations, optimizers.

    python -m benchmarks.training_memory

Whole transformers at their real width take a whole step (forward, backward, AdamW) on fake tensors: every operation is
dispatched, under the same autocast as in training, and every tensor that is made or that autograd saves is counted, but
nothing is computed. So the numbers are exact for this version of torch on any machine; a GPU's allocator and libraries
come on top. What bitsandbytes stores is counted from its formats. Optimizer states are real: each takes one step.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.harness import RESULTS, machine, read_results, write_results
from benchmarks.published import PUBLISHED
from benchmarks.tracing import PeakBytes, saved_bytes
from slora_diffusers import SerialLoraConfig, SerialLoraError
from slora_diffusers.training.methods import ADAPTERS
from slora_diffusers.training.optim import make_optimizer, parameter_groups
from slora_diffusers.training.precision import trainable
from slora_diffusers.training.residence import Homes

MODELS = {
    "SD3-medium": PUBLISHED["SD3-medium"],
    "SD3.5-large": PUBLISHED["SD3.5-large"],
    "PixArt-Sigma": (PUBLISHED["PixArt-XL"][0], {**PUBLISHED["PixArt-XL"][1], "use_additional_conditions": False}),
    "Flux.1-dev": PUBLISHED["Flux.1-dev"],
}
CPU = torch.device("cpu")  # fake tensors claim to be there, so that its autocast acts
SD3_TOKENS, PIXART_TOKENS, FLUX_TOKENS = 77 + 77, 300, 512
OPTIMIZERS = ("adamw", "adamw8bit", "schedulefree", "prodigy")


WAYS: dict[str, dict[str, bool]] = {
    "bf16": {},
    "--gradient_checkpointing": {"checkpointing": True},
    "and --quantize fp8": {"checkpointing": True, "narrow": True},
    "and --offload blocks": {"checkpointing": True, "blocks": True},
    "and both": {"checkpointing": True, "narrow": True, "blocks": True},
    "--offload blocks alone": {"blocks": True},
}
# Bytes per weight: codes, and a scale in 8 bits for 64 of them, whose own scales are in 32 for 256; or one per row.
BITSANDBYTES = {"and --quantize int8": 1.0, "and --quantize nf4": 0.5 + (1 + 4 / 256) / 64}


def build(adapter: str, rank: int, name: str = "SD3-medium") -> nn.Module:
    """A transformer in bf16 with an adapter in fp32, as its recipe trains it, on the meta device."""
    class_name, config = MODELS[name]
    with torch.device("meta"):
        model: Any = getattr(diffusers, class_name)(**config).to(torch.bfloat16)
        ADAPTERS[adapter].attach(model, SerialLoraConfig(rank=rank))
    return model.train()


def arguments(model: Any, side: int, batch: int) -> dict[str, Any]:
    """One forward's arguments, for images of `side` pixels."""
    zeros = lambda *shape: torch.zeros(batch, *shape, dtype=torch.bfloat16)  # noqa: E731
    config, latents, time = model.config, side // 8, torch.ones(batch)
    if hasattr(config, "guidance_embeds"):  # Flux: tokens of 2 x 2 latents
        tokens = (latents // 2) ** 2
        return {
            "hidden_states": zeros(tokens, 64), "encoder_hidden_states": zeros(FLUX_TOKENS, 4096),
            "pooled_projections": zeros(768), "timestep": time, "guidance": time,
            "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(FLUX_TOKENS, 3),
        }  # fmt: skip
    if hasattr(config, "pooled_projection_dim"):
        text = zeros(SD3_TOKENS, config.joint_attention_dim)
        return {
            "hidden_states": zeros(config.in_channels, latents, latents), "encoder_hidden_states": text,
            "pooled_projections": zeros(config.pooled_projection_dim), "timestep": time,
        }  # fmt: skip
    return {
        "hidden_states": zeros(config.in_channels, latents, latents), "timestep": time,
        "encoder_hidden_states": zeros(PIXART_TOKENS, config.caption_channels),
        "encoder_attention_mask": torch.ones(batch, PIXART_TOKENS),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def loss_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """A scalar of one forward, in the precision of training."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(**inputs).sample.float().square().mean()


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
    """Bytes that autograd saves of SD3-medium for one sample size, on fake tensors."""
    model: Any = build(adapter, rank)
    with FakeTensorMode():
        to_fake_cpu(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        inputs = arguments(model, side, batch)
        return saved_bytes(lambda: loss_of(model, inputs), [*model.parameters(), *model.buffers()])


def peak_bytes(
    model: Any, side: int, batch: int, checkpointing: bool = False, narrow: bool = False, blocks: bool = False
) -> int:
    """The most bytes at a time on the device in a later step: weights, activations, gradients, optimizer states.

    Args:
        model: An adapted model, of fake tensors or real ones, which is changed.
        side: Side of the image in pixels.
        batch: Images in a batch.
        checkpointing: Recompute the blocks' activations.
        narrow: Hold weights in fp8.
        blocks: Keep the frozen blocks on the CPU.
    """
    if checkpointing:
        model.enable_gradient_checkpointing()
    homes = Homes(model, CPU, blocks=blocks, narrow=narrow).names if blocks or narrow else []
    elsewhere = {name for name in homes if "blocks" in name} if blocks else set()
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    held = [tensor for name, tensor in tensors.items() if name not in elsewhere]
    inputs = arguments(model, side, batch)
    trained = [parameter for _, parameter in trainable([model])]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that its states are there
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    with PeakBytes([*held, *states, *tree_leaves(inputs)], [tensors[name] for name in elsewhere]) as peak:
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak.peak


def peaks(rank: int, side: int, batch: int) -> dict[str, dict[str, dict[str, int]]]:
    """{model: {way: {adapter: bytes}}}, with what encoders and VAE would take beside it."""
    results: dict[str, dict[str, dict[str, int]]] = {}
    for name in MODELS:
        found: dict[str, dict[str, int]] = {}
        for way, settings in WAYS.items():
            found[way] = {}
            for adapter in ("serial", "lora"):
                model = build(adapter, rank, name)
                with FakeTensorMode():
                    to_fake_cpu(model)
                    found[way][adapter] = peak_bytes(model, side, batch, **settings)
                del model
                gc.collect()
        linears = [m for m in build("serial", rank, name).modules() if isinstance(m, nn.Linear)]
        numbers = sum(linear.weight.numel() for linear in linears)
        for way, size in BITSANDBYTES.items():
            before = found["--gradient_checkpointing"]
            found[way] = {adapter: before[adapter] - round((2 - size) * numbers) for adapter in before}
        found["beside"] = dict.fromkeys(("serial", "lora"), beside_bytes(name))
        print(name, {way: {a: f"{b / 1e9:.2f}" for a, b in each.items()} for way, each in found.items()}, flush=True)
        results[name] = found
    return results


def beside_bytes(name: str) -> int:
    """Bytes of a transformer's text encoders in bf16 and its VAE in fp32, in their published shapes."""
    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        )
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=width // 64,
                    projection_dim=width,
                )
            )
            for width, layers in ((768, 12), (1280, 32))
        ]
        few = name == "PixArt-Sigma"
        settings: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4 if few else 16,
            "use_quant_conv": few, "use_post_quant_conv": few,
        }  # fmt: skip
        vae = AutoencoderKL(**settings)
    encoders: list[nn.Module] = [t5, *([] if few else clips[:1] if name.startswith("Flux") else clips)]
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    return 2 * sum(map(count, encoders)) + 4 * count(vae)


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


def states_table(folder: Path = RESULTS) -> str:
    """What SD3-medium keeps, by kind, as a Markdown table in MB."""
    return table(read_results("training_memory", folder))


def peaks_table(folder: Path = RESULTS) -> str:
    """The most bytes at a time, Serial LoRA's and PEFT's LoRA's, as a Markdown table in GB."""
    found = read_results("training_memory", folder)["peaks"]
    ways = ["bf16", "--gradient_checkpointing", *(way for way in (*WAYS, *BITSANDBYTES) if way.startswith("and "))]
    lines = [f"| GB, Serial LoRA / PEFT's LoRA | {' | '.join(found)} |", "|---|" + "--:|" * len(found)]
    for way in [*ways, "--offload blocks alone"]:
        cells = (f"{each[way]['serial'] / 1e9:.1f} / {each[way]['lora'] / 1e9:.1f}" for each in found.values())
        counted = " (counted)" if way in BITSANDBYTES else ""
        flagged = re.sub(r"--\w+( fp8| nf4| int8| blocks)?", lambda flag: f"`{flag[0]}`", way)
        lines.append(f"| {flagged}{counted} | {' | '.join(cells)} |")
    beside = (f"{each['beside']['serial'] / 1e9:.1f}" for each in found.values())
    lines.append(f"| encoders and VAE, which are not beside it | {' | '.join(beside)} |")
    return "\n".join(lines)


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
    results["peaks"] = peaks(options.rank, options.side, options.batch)
    settings = {"rank": options.rank, "side": options.side, "batch": options.batch, "precision": "bf16 autocast"}
    return write_results("training_memory", {"machine": machine(), "settings": settings, **results}, options.output)


if __name__ == "__main__":
    print(main())
