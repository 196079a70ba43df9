"""Merge adapters into the weights, `W' = W (I + sum_i w_i s_i B_i A_i)`, and put the very weights back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.hooks import check_scale
from ..core.layer import SerialLoraPair
from ..core.sites import Projection, Slot, find_slots, unwrap
from ..core.state import Fused, Registry, Weights, check_known, check_not_fused, pairs_of, registry_of, weight_at
from ..core.tensors import is_finite, is_plain
from ..errors import AdapterStateError
from .attach import attach_all, detach_all

# diffusers' fuse_qkv_projections() keeps a second copy of these weights, which has to follow.
_QKV_COPIES = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@torch.no_grad()
def fuse_serial_lora(model: nn.Module, adapter_names: str | Sequence[str] | None = None, scale: float = 1.0) -> None:
    """Merge the active adapters into the projections: `W' = W (I + scale sum_i w_i s_i B_i A_i)`, biases unchanged.

    The forward is the base's own from here on, without hooks. The original tensors are kept, so memory grows by the
    weights that are fused until `unfuse_serial_lora`, or `unload_serial_lora`, which makes the fuse permanent. All
    weights are computed, in fp32 or better, and checked before the first is replaced.

    Args:
        model: A model with adapters.
        adapter_names: Names to fuse, all active ones among them; `None` takes the active ones.
        scale: Factor on all of them.

    Raises:
        AdapterStateError: If a name is unknown, adapters are fused already, others would stay live beside the fused
            ones, a weight is quantized or offloaded, or a fused weight is not finite; nothing has changed then.
    """
    registry = registry_of(model)
    check_not_fused(registry, "fuse")
    scale = check_scale(scale, registry.call)
    names = list(registry.active) if adapter_names is None else adapter_names
    names = [names] if isinstance(names, str) else list(names)
    check_known(registry, names)
    if not names:
        raise AdapterStateError(
            f"There is nothing to fuse: no adapter is active. Name some of {sorted(registry.configs)}, or make them "
            "active with set_serial_lora()."
        )
    if rest := sorted(set(registry.active) - set(names)):
        raise AdapterStateError(
            f"Fusing {names} would leave {rest} active beside fused weights, where adapters would multiply instead of "
            f"add. Fuse them all, or call set_serial_lora({names}) first."
        )
    weights = {name: registry.active.get(name, 1.0) for name in names}
    pairs = pairs_of(model)
    slots = [slot for slot in find_slots(model) if slot.key in pairs]
    fused = [both for slot in slots for both in _fused_weights(slot, pairs[slot.key], weights, scale)]
    originals = [(projection, projection.weight.data) for projection, _ in fused]
    for projection, W in fused:
        projection.write(W)
    registry.fused = Fused(weights, scale, originals)
    registry.call.fused = True
    detach_all(model)
    _refresh_qkv_copies(model)


@torch.no_grad()
def unfuse_serial_lora(model: nn.Module) -> None:
    """Put the original weights back, to the bit, and the adapters live again as they were before the fuse.

    Raises:
        AdapterStateError: If nothing is fused.
    """
    registry = registry_of(model)
    if registry.fused is None:
        raise AdapterStateError("Nothing is fused. Call fuse_serial_lora() first.")
    for projection, W in registry.fused.originals:
        now = projection.weight
        projection.write(
            W.to(now.device, now.dtype)
        )  # the model may have moved since; the same tensor where it has not
    registry.fused = None
    registry.call.fused = False
    attach_all(model)
    _refresh_qkv_copies(model)


def base_weights(model: nn.Module, slots: Sequence[Slot]) -> list[list[Tensor]]:
    """The base's weights (out, d) of every slot's projections, whether or not they are fused at the moment."""
    registry: Registry | None = getattr(unwrap(model), "_serial_lora", None)
    fused = registry.fused.originals if registry is not None and registry.fused is not None else []
    originals = {(id(p.owner), p.attribute): W for p, W in fused}
    return [[originals.get((id(p.owner), p.attribute), p.weight) for p in slot.projections] for slot in slots]


def _fused_weights(
    slot: Slot, pair: SerialLoraPair, weights: Mapping[str, Weights], scale: float
) -> list[tuple[Projection, Tensor]]:
    gains = {
        name: scale * weight_at(slot.path, weights[name]) * pair.scaling[name]
        for name in sorted(weights)
        if name in pair.scaling
    }
    gains = {name: gain for name, gain in gains.items() if gain}
    fused = []
    for projection in slot.projections if gains else ():
        check_plain(slot, projection, "fuse")
        W = pair.fused_weight(projection.weight.data, gains)
        if not is_finite(W):
            raise AdapterStateError(
                f"Fusing would make the weight {slot.path}.{projection.name} not finite: an adapter of "
                f"{sorted(gains)}, or the base's weight itself, holds NaN or infinity there, or the product "
                f"overflows {W.dtype}. Nothing was changed."
            )
        fused.append((projection, W))
    return fused


def check_plain(slot: Slot, projection: Projection, what: str) -> None:
    """Raise AdapterStateError unless a weight is an ordinary matrix of floats, here and now."""
    W = projection.weight
    name = f"{slot.path}.{projection.name}"
    if W.is_meta:
        raise AdapterStateError(
            f"Cannot {what}: the weight {name} is offloaded, not in memory. Take the hooks off first "
            "(pipe.remove_all_hooks(), or accelerate's remove_hook_from_module(model, recurse=True))."
        )
    if hasattr(projection.owner, "base_layer") and not getattr(projection.owner, "merged", False):
        raise AdapterStateError(
            f"Cannot {what}: {name} carries a LoRA of PEFT, which reads x~ while the serial adapter is live and would "
            "read x afterwards. Fuse or unload that LoRA first (pipe.fuse_lora(), pipe.unload_lora_weights())."
        )
    if not is_plain(W):
        raise AdapterStateError(
            f"Cannot {what}: the weight {name} is stored as {type(W).__name__} of {W.dtype}, not as an ordinary "
            "matrix. Keep the adapter live (it trains and runs on a quantized base as it is), or load the base "
            "unquantized to fuse."
        )


def _refresh_qkv_copies(model: nn.Module) -> None:
    for site in {id(slot.module): slot.module for slot in find_slots(model)}.values():
        if not getattr(site, "fused_projections", False):
            continue
        for copy, parts in _QKV_COPIES.items():
            linear = getattr(site, copy, None)
            if linear is not None and all(getattr(site, part, None) is not None for part in parts):
                linear.weight.data = torch.cat([getattr(site, part).weight.data for part in parts])
