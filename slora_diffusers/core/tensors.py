"""What is asked of a tensor before it is used: is it an ordinary matrix, does it hold numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(W: Tensor) -> bool:
    """Whether a weight is an ordinary matrix of floats in memory: not quantized, sharded or on the meta device."""
    return type(W.data) is Tensor and not W.is_meta and W.is_floating_point() and W.element_size() > 1 and W.ndim == 2


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Either one makes the sum such, in a fraction of the time; a sum that overflows by itself takes the closer look.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
