"""What several processes share: tensors that FSDP2 has sharded, means over the processes, one value for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard of FSDP2, of which every process must ask; others as they are. No gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether FSDP2 has left a part of the tensor here."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, or into the part of it that is here."""
    if is_sharded(parameter) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = distribute_tensor(value.to(parameter.device), sharded.device_mesh, sharded.placements)
    parameter.copy_(value)


def mean(tensor: Tensor) -> Tensor:
    """The mean over the processes, if there are several."""
    if not several():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def from_first(value: Tensor, device: torch.device) -> Tensor:
    """The first process's value, if there are several: the last bits of what each has computed may differ."""
    if not several():
        return value
    value = value.to(device, torch.float32).contiguous()
    dist.broadcast(value, 0)
    return value


def several() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
