"""What the tests do to a tiny model over and over: add an adapter that has an effect, run it, take its traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import slora_diffusers as sl
from slora_diffusers.files.format import AdapterFile
from slora_diffusers.files.storage import AdapterTensors
from tests.tiny.models import TinyModel, flat_tensors


def add_random_adapter(
    model: nn.Module, adapter_name: str = "default", seed: int = 1, std: float = 0.3, **config: Any
) -> None:
    """Add an adapter whose A and B are normal noise that follows from the seed."""
    sl.add_serial_lora(model, sl.SerialLoraConfig(**{"rank": 4, "alpha": 6, **config}), adapter_name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sl.serial_lora_parameters(model, adapter_name):
        parameter.data = torch.randn(parameter.shape, generator=generator) * std
    model.requires_grad_(False)


@torch.no_grad()
def output_of(model: nn.Module, tiny: TinyModel, **more: Any) -> Tensor:
    """The output of one forward on the tiny model's inputs, flat."""
    return torch.cat([t.flatten() for t in flat_tensors(model(**{**tiny.arguments(), **more}))])


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an adapter could leave behind: keys, module types, hooks, attributes."""
    modules = dict(model.named_modules())
    return {
        "keys": list(model.state_dict()),
        "types": {name: type(module) for name, module in modules.items()},
        "hooks": {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in modules.items()},
        "flags": {n: (len(m._forward_pre_hooks_with_kwargs), len(m._forward_hooks_always_called))
                  for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
    }  # fmt: skip


def read_adapter(source: Any, **hub: Any) -> AdapterTensors:
    """The keys, tensors and header of an adapter's file."""
    return AdapterFile.read(source, **hub).state_dict()
