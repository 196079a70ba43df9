"""The life of an adapter on a model or a pipeline: add, set, delete, unload, and room reserved for swapping."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import SerialLoraConfig
from ..core.calls import ONE_VERB, alone
from ..core.change import changing
from ..core.components import adapted, check_known, denoisers_of, for_each, held_by, per_component
from ..core.offload import Storage
from ..core.pair import GRADIENT, new_matrices
from ..core.parts import copied, find_modules, parts_of
from ..core.sites import Slot, lora_equivalent, select_slots, unwrap
from ..core.state import (
    Registry,
    Weights,
    check_active,
    check_modules,
    check_new_name,
    check_not_fused,
    check_not_inside,
    check_reserved,
    check_room,
    check_trains,
    names_with_weights,
    pairs_of,
    registry_of,
    tensors_of,
)
from ..core.tensors import check_dtype
from ..errors import AdapterStateError
from .attach import (
    activate,
    attach_all,
    drop_empty_sites,
    ensure_pair,
    freeze_base,
    has_empty_sites,
    put_in,
    register,
    remove_all,
    take_out,
)

logger = logging.getLogger("diffusers.slora_diffusers")  # a child of diffusers' own: its verbosity holds here too


@dataclass(frozen=True)
class AddReport:
    """What `add_serial_lora` made: sites, pairs, their parameters, and those of a LoRA of the same rank there."""

    adapter_name: str
    sites: int
    pairs: int
    parameters: int
    lora_parameters: int

    def __str__(self) -> str:
        return (
            f"{self.adapter_name}: {self.pairs} pairs on {self.sites} sites, {self.parameters:,} parameters "
            f"({self.parameters / self.lora_parameters:.2f} of a LoRA's {self.lora_parameters:,})"
        )


@alone
def add_serial_lora(model: Any, config: SerialLoraConfig, adapter_name: str = "default") -> Any:
    """Freeze the base and add one trainable pair per input, `x~ = (I + s B A) x`, active from now on.

    A (r, d) and B (d, r) are fp32 whatever the base's dtype, and B = 0: the output is the base's, to the bit.

    Args:
        model: Any model that a record covers, or that contains one; or a pipeline, over its transformers.
        config: Rank, scale, inputs and sites.
        adapter_name: Name of the adapter: letters, digits, "_" and "-".

    Returns:
        The numbers of sites, pairs and parameters, and the parameters of a LoRA of the same rank on these
        attentions' q, k, v and output projections; of a pipeline {component: these}.

    Raises:
        ArchitectureError: If no record covers the model.
        SerialLoraError: If the name is taken, the config matches nothing, or adapters are fused.
    """
    models = denoisers_of(model)
    made = {component: _new_adapter(one, config, adapter_name) for component, one in models.items()}
    copies = {component: _new_modules(one, config, adapter_name) for component, one in models.items()}
    if config.init == GRADIENT:  # recorded once it is true
        config = replace(config, init="kaiming")
        logger.warning("%s starts as kaiming until initialize_serial_lora() is called, before training.", adapter_name)
    with ONE_VERB, changing(*models.values()) as change:
        for component, matrices in made.items():
            freeze_base(models[component])
            put_in(change, models[component], adapter_name, matrices, config, 1.0, True, copies[component])
    reports = {}
    for component, matrices in made.items():
        slots = [slot for slot, _, _ in matrices]
        parameters = sum(A.numel() + B.numel() for _, A, B in matrices)
        parameters += sum(p.numel() for copy in copies[component].values() for p in copy.parameters())
        equivalent = lora_equivalent(models[component], slots, config)
        sites = len({slot.path for slot in slots})
        reports[component] = AddReport(adapter_name, sites, len(slots), parameters, equivalent)
    return for_each(model, reports)


@alone
def set_serial_lora(
    model: Any, adapter_names: str | Sequence[str], weights: Weights | Sequence[Weights] | None = None
) -> None:
    """Make exactly these adapters active: `x~ = x + sum_i w_i s_i B_i A_i x`.

    Args:
        model: A model with adapters; or a pipeline, over the components that have the adapters.
        adapter_names: One name or several; an empty list leaves the base.
        weights: One weight for all, or one per name (default 1). A weight is a number, or {regular expression of
            a site, anchored at both ends: number}, where sites that nothing matches keep 1; of a pipeline also
            {component: weight}, e.g. `{"transformer": 1.0, "transformer_2": 0.5}`.

    Raises:
        AdapterStateError: If a name is unknown, a pattern matches no site, or adapters are fused.
    """
    chosen = names_with_weights(adapter_names, weights)
    models = adapted(model)
    check_known(models, chosen)
    parts = {name: {c: one for c, one in models.items() if held_by(one, [name])} for name in chosen}
    weights_of = {name: per_component(weight, parts[name]) for name, weight in chosen.items()}
    each = {c: {name: weights_of[name][c] for name in held_by(one, chosen)} for c, one in models.items()}
    for component, one in models.items():
        check_active(one, each[component])
    with ONE_VERB, changing(*models.values()):
        for component, one in models.items():
            activate(one, each[component])


@alone
def delete_serial_lora(model: Any, adapter_names: str | Sequence[str]) -> None:
    """Remove adapters and free their memory; the last one takes its hooks along.

    Args:
        model: A model with adapters; or a pipeline, over the components that have them.
        adapter_names: One name or several.

    Raises:
        AdapterStateError: If a name is unknown or adapters are fused.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    models = adapted(model)
    check_known(models, names)
    models = {component: one for component, one in models.items() if held_by(one, names)}
    for one in models.values():
        check_not_fused(registry_of(one), "delete an adapter")
        check_not_inside(registry_of(one), "delete an adapter", names)
        if set(held_by(one, names)) & set(registry_of(one).active):
            check_reserved(one, "delete an active adapter")
    with ONE_VERB, changing(*models.values()):
        for one in models.values():
            remove_adapters(one, held_by(one, names))


@alone
def move_serial_lora(model: Any, adapter_names: str | Sequence[str], device: torch.device | str) -> None:
    """Move idle adapters to another device, such as the CPU; made active there, they are copied at every change.

    Args:
        model: A model with adapters; or a pipeline, over the components that have them.
        adapter_names: One name or several; none of them active.
        device: Where their matrices go.

    Raises:
        AdapterStateError: If a name is unknown or active, there is no such device, or the model's hooks move its
            weights themselves; nothing has moved then.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    models = adapted(model)
    check_known(models, names)
    tensors: list[torch.Tensor] = []
    for one in models.values():
        registry = registry_of(one)
        tensors += [tensor for name in held_by(one, names) for tensor in tensors_of(one, name).values()]
        if busy := [name for name in held_by(one, names) if name in registry.active or name in _fused_in(registry)]:
            raise AdapterStateError(f"{busy} are active: set_serial_lora() to others first, and then move these.")
    if any(tensor.is_meta for tensor in tensors):
        raise AdapterStateError(
            "The adapters are offloaded with their model, which moves them itself: nothing to move."
        )
    try:
        moved = [tensor.detach().to(device) for tensor in tensors]
    except (RuntimeError, AssertionError, TypeError) as error:
        raise AdapterStateError(f"The adapters cannot be moved to {device!r}: {error}") from error
    if any(tensor.is_meta for tensor in moved):
        raise AdapterStateError("The device 'meta' keeps no numbers: move the adapters to 'cpu' instead.")
    with ONE_VERB, changing(*models.values()) as change:
        for tensor, there in zip(tensors, moved, strict=True):
            change.on_failure(functools.partial(setattr, tensor, "data", tensor.data))
            tensor.data = there


def _fused_in(registry: Registry) -> Sequence[str]:
    return list(registry.fused.weights) if registry.fused is not None else ()


@alone
def unload_serial_lora(model: Any) -> None:
    """Remove every adapter, hook and trace; the model, or every component of the pipeline, is the base again.

    As with diffusers' `unload_lora_weights`, weights that are fused stay fused, and the originals are let go: call
    `unfuse_serial_lora` first to get the base back.

    Args:
        model: A model, with adapters or without; or a pipeline, over its components.
    """
    models = adapted(model, required=False)
    for one in models.values():
        check_not_inside(registry_of(one), "unload adapters", registry_of(one).configs)
    with ONE_VERB, changing(*models.values()):
        for one in models.values():
            if (fused := registry_of(one).fused) is not None:
                kind = type(unwrap(one)).__name__
                logger.info("Unloaded %s; its fused weights stay in %s.", list(fused.weights), kind)
            remove_all(one)


@alone
def reserve_serial_lora(
    model: Any,
    capacity: tuple[int, int],
    inputs: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    samples: int = 64,
) -> None:
    """Reserve room for swapping adapters without recompiling; call it before `torch.compile`.

    Every site gets operands of the fixed shapes (R, d) and (d, R), with R = max_rank * max_adapters. Loading, setting
    and deleting adapters then changes values in place, and no shape, guard or graph; so do `serial_lora_scale`,
    `disable_serial_lora` and `serial_lora_batch`, whose adapters, all that a batch has together, need the same room.

    Args:
        model: Any model that a record covers, compiled or about to be; or a pipeline, over its transformers.
        capacity: (largest rank of an adapter, largest number of adapters at once).
        inputs: Names of the inputs to reserve for; `None` takes all but the optional ones.
        dtype: Dtype of the operands; `None` takes the model's own.
        samples: Samples of a batch that can have adapters of their own (`serial_lora_batch`).

    Raises:
        SerialLoraError: If capacity or samples are not whole numbers of at least 1, or adapters are fused.
    """
    if len(capacity) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in capacity):
        raise AdapterStateError(f"capacity must be (max_rank, max_adapters), both at least 1; got {capacity!r}.")
    check_dtype(dtype)
    if type(samples) is not int or samples < 1:
        raise AdapterStateError(f"samples must be a whole number of at least 1; got {samples!r}.")
    models = denoisers_of(model)
    room = {component: _room(one, capacity, inputs, dtype) for component, one in models.items()}
    with ONE_VERB, changing(*models.values()):
        for component, places in room.items():
            registry = register(models[component])
            registry.capacity = capacity
            for slot, like in places:
                ensure_pair(slot, registry).reserve(capacity[0] * capacity[1], samples, like)
            attach_all(models[component])


def _new_adapter(
    model: nn.Module, config: SerialLoraConfig, name: str
) -> list[tuple[Slot, torch.Tensor, torch.Tensor]]:
    """Untrained matrices for every slot that the config chooses, beside the model and not yet in it."""
    registry = registry_of(model, create=True)
    check_new_name(registry, name)
    check_trains(registry, "adding")
    return [
        (slot, *new_matrices(config.rank_of(slot.path, slot.key), slot.features, config.init, slot.device))
        for slot in select_slots(model, config)
    ]


def _new_modules(model: nn.Module, config: SerialLoraConfig, name: str) -> dict[str, nn.Module]:
    """{path: a copy} of the modules that the config saves whole."""
    found = find_modules(model, config.modules_to_save or ())
    registry = registry_of(model, create=True)
    if found:
        check_modules(model, {**registry.active, name: 1.0}, {name: list(found)})
    storage = Storage(unwrap(model))
    return {path: copied(storage, module, path, None, trainable=True) for path, module in found.items()}


def _room(
    model: nn.Module, capacity: tuple[int, int], inputs: Sequence[str] | None, dtype: torch.dtype | None
) -> list[tuple[Slot, torch.Tensor]]:
    """Each slot with a tensor of the dtype and device that its operands will have."""
    registry = registry_of(model, create=True)
    check_not_fused(registry, "reserve capacity")
    slots = select_slots(model, SerialLoraConfig(inputs=inputs))
    if parts := parts_of(model):
        raise AdapterStateError(
            f"Adapters of this model bring modules of their own ({', '.join(parts)}; modules_to_save), for which no "
            "room can be reserved: a compiled graph has one module there. Delete them first."
        )
    held = {key for key, pair in pairs_of(model).items() if pair.scaling}
    if missing := sorted(held - {slot.key for slot in slots}):
        raise AdapterStateError(f"The adapters already there use pairs that `inputs` leaves out: {missing[:3]}.")
    Storage(unwrap(model)).check_in_place(unwrap(model), "reserve room")
    rank = capacity[0] * capacity[1]
    for pair in pairs_of(model).values():
        check_room(pair, pair.weights, rank)
    return [(slot, torch.empty(0, dtype=dtype or _dtype(model, slot), device=slot.device)) for slot in slots]


def _dtype(model: nn.Module, slot: Slot) -> torch.dtype:
    """The dtype for operands beside a slot's projections: theirs, or the model's where they are quantized."""
    weight = getattr(slot.projections[0].owner, slot.projections[0].attribute, None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return weight.dtype
    return getattr(unwrap(model), "dtype", torch.float32)


def remove_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Remove adapters of a model inside a change; the last one takes its hooks along."""
    registry = registry_of(model)
    if set(names) == set(registry.configs) and registry.capacity is None:
        remove_all(model)
        return
    for name in names:
        take_out(model, name)
    if registry.capacity is None and has_empty_sites(model):
        drop_empty_sites(model)
