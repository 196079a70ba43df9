"""Recognise a base: a short sample of its weights that survives a change of dtype, but not of training."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.fuse import base_weights
from ..core.sites import Slot, find_slots, unwrap
from ..core.tensors import is_plain

SAMPLES = 64


def fingerprint(weights: Sequence[Tensor]) -> str | None:
    """Up to 64 elements of the adapted weights, evenly spread, as base64 of little-endian float32.

    Args:
        weights: The base's weights, (out, d) each.

    Returns:
        The text, or None where the weights are quantized, offloaded or on the meta device: there is nothing to read.
    """
    plain = [W for W in weights if is_plain(W) or hasattr(W, "full_tensor")]
    if not plain or len(plain) != len(weights):
        return None
    chosen = [plain[i * len(plain) // SAMPLES] for i in range(SAMPLES)] if len(plain) >= SAMPLES else plain
    each = -(-SAMPLES // len(chosen))
    with torch.no_grad():
        values = [W.detach()[:: max(1, W.shape[0] // each), W.shape[1] // 3][:each].float() for W in chosen]
        if len({v.device for v in values}) > 1:  # device_map
            values = [v.cpu() for v in values]
        sample = torch.cat([_full(v) for v in values])[: 2 * SAMPLES].cpu()
    return base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode("ascii")


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, each possibly rounded to fp16 or bf16."""
    a, b = (torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) for text in (one, other))
    if a.shape != b.shape:
        return False
    # bf16 keeps 8 bits: a relative error of 2^-9 each way, and twice that between two roundings.
    return bool(((a - b).abs() <= 2.0**-7 * a.abs() + 1e-6).all())


def warn_of_other_base(what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], stacklevel: int) -> None:
    """Warn if what was trained on one base goes into another; each is told by class, name and fingerprint."""
    if theirs.get("fingerprint") and ours["fingerprint"] and not same_base(theirs["fingerprint"], ours["fingerprint"]):
        warnings.warn(
            f"The {what} was trained on {theirs.get('class')} {theirs.get('name') or '(no name)'}, but is loaded into "
            f"{ours['class']} {ours['name'] or '(no name)'}, whose weights differ: the results will not be the same.",
            stacklevel=stacklevel + 1,
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor under FSDP2


def describe_base(model: nn.Module, slots: Sequence[Slot] | None = None) -> dict[str, str | None]:
    """The base's class, name and fingerprint; `slots` are those of `find_slots`, where they are at hand."""
    model = unwrap(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    weights = [W for group in base_weights(model, find_slots(model) if slots is None else slots) for W in group]
    return {"class": type(model).__name__, "name": name, "fingerprint": fingerprint(weights)}
