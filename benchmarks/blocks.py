"""What is measured: a few blocks of a model at their real width, as base, with Serial LoRA and with PEFT's LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from slora_diffusers import SerialLoraConfig, add_serial_lora, fuse_serial_lora

RANK = 16
Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """Blocks from the middle of a model, and the size of what they read.

    Args:
        build: From the case to a model of random weights.
        run: From (model, streams) to the streams behind its blocks.
        heads: Number of attention heads.
        head_dim: Width of a head.
        blocks: Number of blocks.
        batch: Number of samples.
        tokens: Tokens of a sample in every stream.
        lora_targets: Projections that PEFT's LoRA adapts.
    """

    build: Callable[[Case], nn.Module]
    run: Callable[[nn.Module, Streams], Streams]
    heads: int
    head_dim: int
    blocks: int
    batch: int
    tokens: tuple[int, ...]
    lora_targets: str

    @property
    def width(self) -> int:
        """Width d of the tokens."""
        return self.heads * self.head_dim

    def streams(self) -> Streams:
        """Random inputs of the first block, (batch, tokens, width) each."""
        return tuple(torch.randn(self.batch, n, self.width) for n in self.tokens)


def build_sd3(case: Case) -> nn.Module:
    """SD3's joint blocks; the model's last one, which gives no text, is left out."""
    model = SD3Transformer2DModel(
        sample_size=32,
        num_layers=case.blocks + 1,
        attention_head_dim=case.head_dim,
        num_attention_heads=case.heads,
        joint_attention_dim=64,
        caption_projection_dim=case.width,
    )
    model.transformer_blocks = model.transformer_blocks[: case.blocks]
    return model


def run_sd3(model: nn.Module, streams: Streams) -> Streams:
    """All blocks, on an image and a text stream."""
    image, text = streams
    temb = image.detach().mean(dim=1)  # (B, D), the shape of the timestep's embedding
    for block in model.get_submodule("transformer_blocks").children():
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
    return image, text


def build_dit(case: Case) -> nn.Module:
    """DiT's blocks; each has its own embedding of timestep and class."""
    return DiTTransformer2DModel(case.heads, case.head_dim, num_layers=case.blocks)


def run_dit(model: nn.Module, streams: Streams) -> Streams:
    """All blocks, on one stream."""
    (image,) = streams
    labels = torch.zeros(image.shape[0], dtype=torch.long, device=image.device)
    for block in model.get_submodule("transformer_blocks").children():
        image = block(image, timestep=labels, class_labels=labels)
    return (image,)


_LORA_QKVO = r"to_q|to_k|to_v|to_out\.0"
CASES = {
    # 256 x 256 pixels each, with the 77 + 77 text tokens that the training scripts of SD3 use
    "SD3-medium": Case(
        build_sd3, run_sd3, 24, 64, 2, 1, (256, 154), f"{_LORA_QKVO}|add_q_proj|add_k_proj|add_v_proj|to_add_out"
    ),
    "DiT-XL/2": Case(build_dit, run_dit, 16, 72, 4, 1, (256,), _LORA_QKVO),
}


@dataclass(frozen=True)
class Precision:
    """Dtype of the base and of the adapter's matrices, and whether autocast to bf16 is on."""

    base: torch.dtype
    adapter: torch.dtype
    autocast: bool
    trains: bool

    def context(self) -> AbstractContextManager[Any]:
        """What the forward runs in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, autocast=False, trains=True),
    "bf16 autocast": Precision(torch.bfloat16, torch.float32, autocast=True, trains=True),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, autocast=False, trains=False),  # how pipelines generate
}


def variants(case: Case, precision: Precision) -> dict[str, nn.Module]:
    """The same blocks as base, with Serial LoRA live and fused, and with PEFT's LoRA on q, k, v and the output."""
    base = nn.Module.to(case.build(case), precision.base).eval().requires_grad_(False)
    shared = {id(parameter): parameter for parameter in base.parameters()}
    live, peft = (copy.deepcopy(base, dict(shared)) for _ in range(2))
    add_serial_lora(live, SerialLoraConfig(rank=RANK))
    targets = rf"transformer_blocks\..*\.({case.lora_targets})"
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), peft)
    for model in (live, peft):
        for parameter in trainable(model):
            parameter.data = parameter.data.to(precision.adapter)
            if not parameter.any():  # B, which would be zero before the first step
                nn.init.normal_(parameter, std=1e-3)
    fused = copy.deepcopy(live)  # with weights of its own, which the fuse replaces
    fuse_serial_lora(fused)
    return {"base": base, "serial": live, "serial_fused": fused, "peft": peft}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Subject:
    """One variant of one case in one precision: what is timed and counted."""

    case: Case
    precision: Precision
    model: nn.Module
    streams: Streams
    optimizer: torch.optim.Optimizer | None

    @torch.no_grad()
    def forward(self) -> None:
        """One forward as in sampling."""
        with self.precision.context():
            self.case.run(self.model, self.streams)

    def loss(self) -> Tensor:
        """A loss whose gradient reaches every output, and every input: the blocks stand behind other adapted ones."""
        with self.precision.context():
            outputs = self.case.run(self.model, tuple(x.detach().requires_grad_() for x in self.streams))
        return torch.stack([out.float().square().mean() for out in outputs]).sum()

    def forward_backward(self) -> None:
        """Forward and backward: to the inputs, and to the adapter where there is one."""
        self.loss().backward()

    def train_step(self) -> None:
        """Forward, backward and, where there is an adapter, AdamW's step."""
        self.forward_backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def subjects(case: Case, precision: Precision) -> dict[str, Subject]:
    """Every variant of a case, all with the same inputs."""
    torch.manual_seed(0)
    streams = tuple(stream.to(precision.base) for stream in case.streams())
    made = {}
    for name, model in variants(case, precision).items():
        parameters: Sequence[nn.Parameter] = trainable(model) if name in ("serial", "peft") else ()
        made[name] = Subject(case, precision, model, streams, torch.optim.AdamW(parameters) if parameters else None)
    return made
