"""Where tensors are while something else moves the model: accelerate's hooks and diffusers' group offloading.

A pair needs no hook of its own. Its operands follow the input's device (see `core.layer.SerialLoraPair`), so an adapter
loads into an offloaded model without a hook being lifted or a weight being moved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def real_tensor(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module, from accelerate's store where sequential offloading left a meta tensor in its place."""
    tensor = getattr(module, name)
    if tensor.is_meta and (hook := _offload_hook(module)) is not None and hook.weights_map is not None:
        return hook.weights_map[name]
    return tensor


def is_offloaded(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module is a placeholder for one that accelerate keeps elsewhere."""
    return getattr(module, name).is_meta and _offload_hook(module) is not None


def device_of(module: nn.Module, name: str) -> torch.device:
    """The device for what goes beside a tensor of a module: its own, or the CPU where it is offloaded."""
    return torch.device("cpu") if is_offloaded(module, name) else getattr(module, name).device


@contextmanager
def lifted_offload(module: nn.Module) -> Iterator[None]:
    """Take accelerate's hook off one module while its parameters change, and put its like back."""
    hook = _offload_hook(module)
    if hook is None:
        yield
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(
            module,
            AlignDevicesHook(
                execution_device=hook.execution_device,
                offload=hook.offload,
                io_same_device=hook.io_same_device,
                offload_buffers=hook.offload_buffers,
                place_submodules=hook.place_submodules,
                skip_keys=hook.skip_keys,
            ),
        )


def follow_group_offload(model: nn.Module) -> None:
    """Let diffusers' group offloading, where it keeps a list of pinned parameters, list those that were added."""
    offloading = sys.modules.get("diffusers.hooks.group_offloading")
    hook = None if offloading is None else offloading._get_top_level_group_offload_hook(model)
    if offloading is not None and hook is not None and hook.config.stream is not None:
        offloading._maybe_remove_and_reapply_group_offloading(model)


def _offload_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a SequentialHook holds several
    return next((h for h in hooks if getattr(h, "offload", False)), None)
