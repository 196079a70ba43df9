"""Recognise a base: a short sample of its weights that survives a change of dtype, but not of training."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..adapters.fuse import peek_weight
from ..core.processes import is_sharded, whole
from ..core.sites import Slot, find_slots, unwrap
from ..core.tensors import is_plain
from .format import Base

SAMPLES = 64


def describe_base(model: nn.Module, slots: Sequence[Slot] | None = None) -> Base:
    """The base's class, name and fingerprint; `slots` are those of `find_slots`, where they are at hand."""
    model = unwrap(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return Base(type(model).__name__, name, fingerprint(model, find_slots(model) if slots is None else slots))


@torch.no_grad()
def fingerprint(model: nn.Module, slots: Sequence[Slot]) -> str | None:
    """Up to 64 elements of the adapted weights, evenly spread, as base64 of little-endian float32.

    Args:
        model: The base, fused or not.
        slots: Its slots, whose projections are sampled.

    Returns:
        The text, or None where the weights are quantized or on the meta device: there is nothing to read.
    """
    all_of_them = [projection for slot in slots for projection in slot.projections]
    if not all_of_them:
        return None
    few = len(all_of_them) < SAMPLES
    chosen = all_of_them if few else [all_of_them[i * len(all_of_them) // SAMPLES] for i in range(SAMPLES)]
    each = -(-SAMPLES // len(chosen))
    values = []
    peek = peek_weight(model)
    for projection in chosen:
        W = peek(projection)
        if W is None or not (is_plain(W) or is_sharded(W)):
            return None
        values.append(W[:: max(1, W.shape[0] // each), W.shape[1] // 3][:each].float())
    if len({v.device for v in values}) > 1:  # device_map
        values = [v.cpu() for v in values]
    sample = torch.cat([whole(v) for v in values])[: 2 * SAMPLES].cpu()
    return base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode("ascii")


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, each possibly rounded to fp16 or bf16."""
    a, b = (torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) for text in (one, other))
    if a.shape != b.shape:
        return False
    # bf16 keeps 8 bits: a relative error of 2^-9 each way, and twice that between two roundings.
    return bool(((a - b).abs() <= 2.0**-7 * a.abs() + 1e-6).all())


def warn_of_other_base(what: str, theirs: Base, ours: Base, stacklevel: int) -> None:
    """Warn if what was trained on one base goes into another."""
    if theirs.fingerprint and ours.fingerprint and not same_base(theirs.fingerprint, ours.fingerprint):
        warnings.warn(
            f"The {what} was trained on {theirs}, but is loaded into {ours}, whose weights differ: the results will "
            "not be the same.",
            stacklevel=stacklevel + 1,
        )
