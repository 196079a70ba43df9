"""Parameters that lie in parts on several processes."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard of FSDP2; every process must call. Other tensors come back as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
