"""What is asked of a tensor before it is used: is it an ordinary matrix, does it hold numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import SerialLoraError

_SHORT = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_plain(W: Tensor) -> bool:
    """Whether a weight is an ordinary matrix of floats in memory: not quantized, sharded or on the meta device."""
    return type(W.data) is Tensor and not W.is_meta and W.is_floating_point() and W.element_size() > 1 and W.ndim == 2


def checksum(W: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor (out, ...): equal for equal content, wherever it lies; a glance, not a copy.

    Of a matrix that FSDP2 has sharded it is that of the part here: others need not take part.
    """
    W = W.to_local() if hasattr(W, "to_local") else W  # pyright: ignore[reportAttributeAccessIssue]
    out, flat = W.shape[0] if W.ndim else 1, W.detach().contiguous().view(-1)
    row = flat.numel() // max(out, 1) * flat.element_size()  # bytes
    width = math.gcd(row, 8)  # the widest words that a row is made of: ten times as fast
    if flat.storage_offset() * flat.element_size() % width:
        flat = flat.clone()
    rows = flat.view(_WORDS[width]).view(out, row // width).sum(dim=1, dtype=torch.int64)  # (out,), modulo 2^64
    order = torch.arange(1, len(rows) + 1, device=rows.device)
    return int(rows.sum()), int((rows * order).sum())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.element_size() == 1:  # float8 has no sum
        tensor = tensor.float()
    # Either one makes the sum such, in a fraction of the time; a sum that overflows by itself takes the closer look.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_dtype(dtype: Any) -> None:
    """Raise SerialLoraError unless this is a dtype of floats, or None."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    name = str(dtype).removeprefix("torch.")
    meant = getattr(torch, _SHORT.get(name, name), None)
    known = isinstance(meant, torch.dtype) and meant.is_floating_point
    remedy = f"write {meant}" if known else "write torch.bfloat16, torch.float16 or torch.float32"
    raise SerialLoraError(f"dtype must be one of torch's dtypes of floats, or None; got {dtype!r}: {remedy}.")
