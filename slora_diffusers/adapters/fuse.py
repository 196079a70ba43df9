"""Merge adapters into the weights, `W' = W (I + sum_i w_i s_i B_i A_i)`, and put the very weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.calls import ONE_VERB, alone
from ..core.change import Change, changing
from ..core.components import adapted, check_known, held_by, names_of
from ..core.hooks import check_scale
from ..core.layer import SerialLoraPair
from ..core.offload import Storage
from ..core.parts import SerialLoraPart, module_at, parts_of, persistent
from ..core.processes import is_sharded
from ..core.sites import Projection, Slot, find_slots, unwrap
from ..core.state import (
    Fused,
    Replaced,
    Weights,
    check_modules,
    check_not_fused,
    check_not_inside,
    pairs_of,
    registry_of,
    weight_at,
)
from ..core.tensors import checksum, is_finite
from ..errors import AdapterStateError
from .attach import attach_all, detach_all

# diffusers' fuse_qkv_projections() keeps a second copy of these weights, which has to follow.
_QKV_COPIES = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@alone
@torch.no_grad()
def fuse_serial_lora(model: Any, adapter_names: str | Sequence[str] | None = None, scale: float = 1.0) -> None:
    """Merge the active adapters into the projections: `W' = W (I + scale sum_i w_i s_i B_i A_i)`, biases unchanged.

    The forward is the base's own from here on, without hooks. The original tensors are kept, so memory grows by the
    weights that are fused until `unfuse_serial_lora`, or `unload_serial_lora`, which makes the fuse permanent. All
    weights are computed, in fp32 or better, and checked before the first is replaced.

    Args:
        model: A model with adapters; or a pipeline, over the components that have them, all or none.
        adapter_names: Names to fuse, all active ones among them; `None` takes the active ones.
        scale: Factor on all of them.

    Raises:
        AdapterStateError: If a name is unknown, adapters are fused already, others would stay live beside the fused
            ones, a weight is quantized or offloaded, or a fused weight is not finite; nothing has changed then.
    """
    models = adapted(model)
    given = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    names = None if given is None else list(given)
    check_known(models, names or ())
    held = {c: registry_of(m).active if names is None else held_by(m, names) for c, m in models.items()}
    models = {component: one for component, one in models.items() if held[component]}
    if not models:
        for one in adapted(model).values():
            check_not_fused(registry_of(one), "fuse")
        raise AdapterStateError(
            f"There is nothing to fuse: no adapter is active. Name some of {sorted(names_of(adapted(model)))}, or make "
            "them active with set_serial_lora()."
        )
    fused = {component: _fused(one, list(held[component]), scale) for component, one in models.items()}
    with ONE_VERB, changing(*models.values()) as change:
        for component, one in models.items():
            _replace(change, one, *fused[component])


@alone
@torch.no_grad()
def unfuse_serial_lora(model: Any) -> None:
    """Put the original weights back, to the bit, and the adapters live again as they were before the fuse.

    Args:
        model: A model, or a pipeline, over the components that are fused.

    Raises:
        AdapterStateError: If nothing is fused, or a weight is no longer the one that the fuse wrote: somebody else's
            change (PEFT's fuse_lora, load_state_dict) would be lost.
    """
    models = {c: one for c, one in adapted(model).items() if registry_of(one).fused is not None}
    if not models:
        raise AdapterStateError("Nothing is fused. Call fuse_serial_lora() first.")
    for one in models.values():
        _check_untouched(one)
    with ONE_VERB, changing(*models.values()) as change:
        for one in models.values():
            registry, storage = registry_of(one), Storage(unwrap(one))
            assert registry.fused is not None
            for replaced in registry.fused.originals:
                p = replaced.projection
                now = storage.data(p.owner, p.attribute)
                change.on_failure(_rewriting(storage, p, now))
                storage.write(p.owner, p.attribute, replaced.original.to(now.device, now.dtype))  # it may have moved
            registry.fused = None
            registry.call.fused = False
            attach_all(one)
            _refresh_qkv_copies(change, one)


def base_weights(model: nn.Module, what: str) -> Callable[[Slot], list[Tensor]]:
    """What gives the base's weights (out, d) of a slot's projections, whether or not they are fused at the moment.

    Args:
        model: The model; where its weights are kept is looked up once, here.
        what: What they are read for, for messages: "Cannot {what}".

    Returns:
        A function of a slot; it raises AdapterStateError if a weight cannot be read as an ordinary matrix.
    """
    storage, originals = Storage(unwrap(model)), _originals(model)

    def read(slot: Slot) -> list[Tensor]:
        for projection in slot.projections:
            _check_no_lora(slot, projection, what)
        kept = [(p, originals.get((id(p.owner), p.attribute))) for p in slot.projections]
        return [
            p.oriented(storage.read(p.owner, p.attribute, what, slot.called(p)) if W is None else W) for p, W in kept
        ]

    return read


def peek_weight(model: nn.Module) -> Callable[[Projection], Tensor | None]:
    """What gives the base's weight (out, d) at a projection, fused or not; None where it cannot be read."""
    storage, originals = Storage(unwrap(model)), _originals(model)

    def peek(projection: Projection) -> Tensor | None:
        key = (id(projection.owner), projection.attribute)
        W = originals.get(key, getattr(projection.owner, projection.attribute, None))
        W = W if key in originals or is_sharded(W) else storage.peek(projection.owner, projection.attribute)
        return W if W is None else projection.oriented(W)

    return peek


def _originals(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    fused = getattr(getattr(unwrap(model), "_serial_lora", None), "fused", None)
    replaced: Sequence[Replaced] = fused.originals if fused is not None else ()
    return {(id(r.projection.owner), r.projection.attribute): r.original for r in replaced}


def _fused(model: nn.Module, names: list[str], scale: float) -> tuple[Fused, list[tuple[Projection, Tensor]]]:
    """What a fuse would write, computed and checked, beside the model and not yet in it."""
    registry = registry_of(model)
    check_not_fused(registry, "fuse")
    check_not_inside(registry, "fuse")
    scale = check_scale(scale, registry.call)
    if rest := sorted(set(registry.active) - set(names)):
        raise AdapterStateError(
            f"Fusing {names} would leave {rest} active beside fused weights, where adapters would multiply instead of "
            f"add. Fuse them all, or call set_serial_lora({names}) first."
        )
    weights = {name: registry.active.get(name, 1.0) for name in names}
    check_modules(model, weights)
    pairs, storage = pairs_of(model), Storage(unwrap(model))
    written: list[tuple[Projection, Tensor]] = []
    originals: list[Replaced] = []
    for slot in find_slots(model):
        pair = pairs.get(slot.key)
        gains = {} if pair is None else _gains(slot, pair, weights, scale)
        for projection in slot.projections if gains else ():
            assert pair is not None
            A, B = pair.stack(gains, storage)
            W = _fused_weight(storage, slot, projection, A, B, sorted(gains))
            original = storage.data(projection.owner, projection.attribute)
            written.append((projection, W))
            originals.append(Replaced(projection, original, (A, B), W.dtype, checksum(W)))
    for path, part in parts_of(model).items() if scale else ():
        owners = [name for name in weights if name in part.names and weight_at(path, weights[name])]
        for projection, W, value in _fused_module(model, storage, path, part, owners):
            original = storage.data(projection.owner, projection.attribute)
            written.append((projection, W))
            originals.append(Replaced(projection, original, (value,), W.dtype, checksum(W)))
    return Fused(weights, scale, originals), written


def _fused_module(
    model: nn.Module, storage: Storage, path: str, part: SerialLoraPart, owners: Sequence[str]
) -> Iterator[tuple[Projection, Tensor, Tensor]]:
    """What the copy of a module that one adapter brings writes over the base's own, tensor by tensor, and its own."""
    if not owners:
        return
    module, copy = module_at(model, path), part.copy_of(owners[0])
    inside = {id(tensor) for tensor in module.parameters()}
    elsewhere = [n for n, t in unwrap(model).named_parameters(remove_duplicate=False) if id(t) in inside]
    if tied := [n for n in elsewhere if not f"{n}.".replace("_orig_mod.", "").startswith(f"{path}.")]:
        raise AdapterStateError(
            f"Cannot fuse: {path!r}, which {owners[0]!r} brings whole (modules_to_save), shares its weight with "
            f"{tied[0]!r}, which the fuse would change, too. Keep the adapter live, or untie them."
        )
    values = {key: (owner, name) for key, owner, name in persistent(copy)}
    for key, owner, name in persistent(module):
        called = f"{path}.{key}"
        storage.check_writable(owner, name, "fuse", called)
        now, value = storage.peek(owner, name), storage.peek(*values[key])
        if now is None or value is None or type(now.data) is not Tensor:
            raise AdapterStateError(f"Cannot fuse: {called} is quantized, or not in memory. Keep the adapter live.")
        W = value.to(now.device, now.dtype, copy=True)
        if not is_finite(W):
            raise AdapterStateError(f"Fusing would make {called} not finite. Nothing was changed.")
        yield Projection(called, owner, name), W, value


def _gains(slot: Slot, pair: SerialLoraPair, weights: Mapping[str, Weights], scale: float) -> dict[str, float]:
    names = [name for name in sorted(weights) if name in pair.scaling]
    gains = {name: scale * weight_at(slot.path, weights[name]) * pair.scaling[name] for name in names}
    return {name: gain for name, gain in gains.items() if gain}


def _fused_weight(
    storage: Storage, slot: Slot, projection: Projection, A: Tensor, B: Tensor, names: list[str]
) -> Tensor:
    owner, attribute, called = projection.owner, projection.attribute, slot.called(projection)
    _check_no_lora(slot, projection, "fuse")
    storage.check_writable(owner, attribute, "fuse", called)
    W = projection.fused(storage.read(owner, attribute, "fuse", called), A, B)
    if not is_finite(W):
        raise AdapterStateError(
            f"Fusing would make the weight {called} not finite: an adapter of {names}, or the base's weight itself, "
            f"holds NaN or infinity there, or the product overflows {W.dtype}. Nothing was changed."
        )
    return W


def _replace(change: Change, model: nn.Module, fused: Fused, written: list[tuple[Projection, Tensor]]) -> None:
    storage, registry = Storage(unwrap(model)), registry_of(model)
    for replaced, (projection, W) in zip(fused.originals, written, strict=True):
        change.on_failure(_rewriting(storage, projection, replaced.original))
        storage.write(projection.owner, projection.attribute, W)
    registry.fused = fused
    registry.call.fused = True
    detach_all(model)
    _refresh_qkv_copies(change, model)


def _rewriting(storage: Storage, projection: Projection, W: Tensor) -> Any:
    return lambda: storage.write(projection.owner, projection.attribute, W)


def _check_untouched(model: nn.Module) -> None:
    """Raise AdapterStateError unless every fused weight is still what the fuse wrote, perhaps in another dtype."""
    registry, storage = registry_of(model), Storage(unwrap(model))
    held = {id(module) for module in unwrap(model).modules()}
    for replaced in registry.fused.originals if registry.fused is not None else ():
        p = replaced.projection
        if id(p.owner) in held:
            storage.check_writable(p.owner, p.attribute, "unfuse", p.name)
        W = storage.peek(p.owner, p.attribute) if id(p.owner) in held else None
        if W is None or not (checksum(W) == replaced.checksum or _is_rounded(W, replaced)):
            raise AdapterStateError(
                f"Cannot unfuse: the weight {p.name} is no longer the one that fuse_serial_lora() wrote; something "
                "else changed it since (PEFT's fuse_lora, load_state_dict, a new layer). Undo that first "
                "(pipe.unfuse_lora()), or let the originals go with unload_serial_lora()."
            )


def _is_rounded(W: Tensor, replaced: Replaced) -> bool:
    """Whether a weight is what the fuse wrote, rounded since to its present dtype, perhaps by way of a shorter one."""
    if W.shape != replaced.original.shape or not W.is_floating_point():
        return False
    then = replaced.again()
    return any(torch.equal(way.to(W.dtype).to(W.device), W) for way in (then, then.half(), then.bfloat16()))


def _check_no_lora(slot: Slot, projection: Projection, what: str) -> None:
    if hasattr(projection.owner, "base_layer") and not getattr(projection.owner, "merged", False):
        raise AdapterStateError(
            f"Cannot {what}: {slot.called(projection)} carries a LoRA of PEFT, which reads x~ while the serial adapter "
            "is live and would read x afterwards. Fuse or unload that LoRA first (pipe.fuse_lora(), "
            "pipe.unload_lora_weights())."
        )


def _refresh_qkv_copies(change: Change, model: nn.Module) -> None:
    storage = Storage(unwrap(model))
    for site in {id(slot.module): slot.module for slot in find_slots(model)}.values():
        if not getattr(site, "fused_projections", False):
            continue
        for copy, parts in _QKV_COPIES.items():
            linear = getattr(site, copy, None)
            if linear is not None and all(getattr(site, part, None) is not None for part in parts):
                change.on_failure(
                    _rewriting(storage, Projection(copy, linear, "weight"), storage.data(linear, "weight"))
                )
                storage.check_writable(linear, "weight", "change", copy)
                W = torch.cat([storage.data(getattr(site, part), "weight") for part in parts])
                storage.write(linear, "weight", W)
