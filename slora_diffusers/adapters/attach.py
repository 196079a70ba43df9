"""Put pairs into any model, and choose which adapters are active: add, set, delete, unload."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config import SerialLoraConfig
from ..core.hooks import FIRST_ARGUMENT, ModelCall, attach, detach
from ..core.layer import SerialLoraPair
from ..core.offload import device_of, follow_group_offload, lifted_offload
from ..core.pair import new_matrices
from ..core.sites import Slot, find_slots, lora_equivalent, select_slots, unwrap
from ..core.state import (
    Registry,
    Weights,
    check_active,
    check_known,
    check_new_name,
    check_not_fused,
    check_room,
    names_with_weights,
    pairs_of,
    parameters_of,
    registry_of,
    weight_at,
)
from ..errors import AdapterStateError
from .save_pretrained import SavePretrained

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


def add_serial_lora(model: nn.Module, config: SerialLoraConfig, adapter_name: str = "default") -> AddReport:
    """Freeze the base and add one trainable pair per input, `x~ = (I + s B A) x`, active from now on.

    A (r, d) and B (d, r) are fp32 whatever the base's dtype, and B = 0: the output is the base's, to the bit.

    Args:
        model: Any model that a record covers, or that contains one.
        config: Rank, scale, inputs and sites.
        adapter_name: Name of the adapter, a Python identifier.

    Returns:
        The numbers of sites, pairs and parameters, and the parameters of a LoRA of the same rank on these
        attentions' q, k, v and output projections.

    Raises:
        ArchitectureError: If no record covers the model.
        SerialLoraError: If the name is taken, the config matches nothing, or adapters are fused.
    """
    registry = registry_of(model, create=True)
    check_new_name(registry, adapter_name)
    if registry.capacity is not None:
        raise AdapterStateError(
            "The model has capacity reserved for swapping adapters, and its fixed operands do not train. Call "
            "unload_serial_lora() before adding an adapter to train."
        )
    slots = select_slots(model, config)
    for name, parameter in unwrap(model).named_parameters():
        if ".serial_lora." not in f".{name}":
            parameter.requires_grad_(False)
    for slot in slots:
        device = device_of(slot.projections[0].owner, slot.projections[0].attribute)
        A, B = new_matrices(config.rank_of(slot.path, slot.key), slot.features, config.init, device)
        _add_matrices(slot, registry, adapter_name, A, B, config, trainable=True)
    finish_adding(model, registry, adapter_name, config, weight=1.0)
    parameters = sum(p.numel() for p in parameters_of(model, adapter_name))
    sites = len({slot.path for slot in slots})
    return AddReport(adapter_name, sites, len(slots), parameters, lora_equivalent(model, slots, config))


def set_serial_lora(
    model: nn.Module, adapter_names: str | Sequence[str], weights: Weights | Sequence[Weights] | None = None
) -> None:
    """Make exactly these adapters active: `x~ = x + sum_i w_i s_i B_i A_i x`.

    Args:
        model: A model with adapters.
        adapter_names: One name or several; an empty list leaves the base.
        weights: One weight for all, or one per name (default 1). A weight is a number, or {regular expression of
            a site, anchored at both ends: number}, where sites that nothing matches keep 1.

    Raises:
        AdapterStateError: If a name is unknown, a pattern matches no site, or adapters are fused.
    """
    chosen = names_with_weights(adapter_names, weights)
    check_active(model, chosen)
    activate(model, chosen)


def delete_serial_lora(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Remove adapters and free their memory; the last one takes its hooks along.

    Raises:
        AdapterStateError: If a name is unknown or adapters are fused.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    registry = registry_of(model)
    check_known(registry, names)
    check_not_fused(registry, "delete an adapter")
    if set(names) == set(registry.configs) and registry.capacity is None:
        unload_serial_lora(model)
        return
    pairs = pairs_of(model).values()
    for pair in pairs:
        for name in names:
            if name in pair.scaling:
                pair.remove(name)
    for name in names:
        del registry.configs[name]
        registry.active.pop(name, None)
    if registry.capacity is None and not all(pair.scaling for pair in pairs):
        _drop_empty_sites(model)


def unload_serial_lora(model: nn.Module) -> None:
    """Remove every adapter, hook and trace; the model is the base again.

    As with diffusers' `unload_lora_weights`, weights that are fused stay fused, and the originals are let go: call
    `unfuse_serial_lora` first to get the base back.
    """
    model = unwrap(model)
    if getattr(model, "_serial_lora", None) is None:
        return
    if (fused := registry_of(model).fused) is not None:
        logger.info("Unloaded %s; its fused weights stay in %s.", list(fused.weights), type(model).__name__)
    detach_all(model)
    for module in [m for m in model.modules() if "serial_lora" in m._modules]:
        del module._modules["serial_lora"]
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), ModelCall):
                del hooks[key]
                for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(model, flags).pop(key, None)
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), SavePretrained):
            del vars(module)["save_pretrained"]
    del model._serial_lora


def reserve_serial_lora(
    model: nn.Module, capacity: tuple[int, int], inputs: Sequence[str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Reserve room for swapping adapters without recompiling; call it before `torch.compile`.

    Every site gets operands of the fixed shapes (R, d) and (d, R), with R = max_rank * max_adapters. Loading, setting
    and deleting adapters then changes values in place, and no shape, guard or graph.

    Args:
        model: Any model that a record covers, compiled or about to be.
        capacity: (largest rank of an adapter, largest number of active adapters).
        inputs: Names of the inputs to reserve for; `None` takes all but the optional ones.
        dtype: Dtype of the operands; `None` takes the model's own.

    Raises:
        SerialLoraError: If the capacity is not two whole numbers of at least 1, or adapters are fused.
    """
    if len(capacity) != 2 or not all(isinstance(n, int) and n >= 1 for n in capacity):
        raise AdapterStateError(f"capacity must be (max_rank, max_adapters), both at least 1; got {capacity!r}.")
    registry = registry_of(model, create=True)
    check_not_fused(registry, "reserve capacity")
    room = capacity[0] * capacity[1]
    slots = select_slots(model, SerialLoraConfig(inputs=inputs))
    held = {key for key, pair in pairs_of(model).items() if pair.scaling}
    if missing := sorted(held - {slot.key for slot in slots}):
        raise AdapterStateError(f"The adapters already there use pairs that `inputs` leaves out: {missing[:3]}.")
    for pair in pairs_of(model).values():
        check_room(pair, pair.weights, room)
    _register(model, registry)
    registry.capacity = capacity
    for slot in slots:
        weight = slot.projections[0].weight
        plain = weight.is_floating_point() and weight.element_size() > 1
        kind = dtype or (weight.dtype if plain else getattr(unwrap(model), "dtype", torch.float32))
        like = torch.empty(0, dtype=kind, device=device_of(slot.projections[0].owner, slot.projections[0].attribute))
        ensure_pair(slot, registry).reserve(room, like)
    attach_all(model)


def add_loaded(
    model: nn.Module,
    registry: Registry,
    adapter_name: str,
    matrices: Sequence[tuple[Slot, torch.Tensor, torch.Tensor]],
    config: SerialLoraConfig,
    weight: float,
) -> None:
    """Add an adapter whose A and B are given; everything has been checked, nothing is initialised at random."""
    for slot, A, B in matrices:
        device = device_of(slot.projections[0].owner, slot.projections[0].attribute)
        # Copies: a state dict's tensors may be another model's own parameters.
        A, B = (matrix.detach().to(device, copy=True) for matrix in (A, B))
        _add_matrices(slot, registry, adapter_name, A, B, config, trainable=False)
    finish_adding(model, registry, adapter_name, config, weight)


def _add_matrices(
    slot: Slot,
    registry: Registry,
    name: str,
    A: torch.Tensor,
    B: torch.Tensor,
    config: SerialLoraConfig,
    trainable: bool,
) -> None:
    pair = ensure_pair(slot, registry)
    with lifted_offload(pair):
        pair.add(name, A, B, config.scaling_of(slot.path, A.shape[0]), config.dropout, trainable)


def ensure_pair(slot: Slot, registry: Registry) -> SerialLoraPair:
    """The pair at a place of the model, made (without any adapter) if it is not there."""
    if "serial_lora" not in slot.module._modules:
        slot.module.serial_lora = nn.ModuleDict()
    container = slot.module.get_submodule("serial_lora")
    assert isinstance(container, nn.ModuleDict)
    if slot.pair.name not in container:
        pair = SerialLoraPair(slot.features, registry.call)
        pair.train(slot.module.training)
        container[slot.pair.name] = pair
    pair = container[slot.pair.name]
    assert isinstance(pair, SerialLoraPair)
    return pair


def finish_adding(model: nn.Module, registry: Registry, name: str, config: SerialLoraConfig, weight: float) -> None:
    """Record a new adapter, activate it beside those that are active, and hook the sites that had none."""
    _register(model, registry)
    registry.configs[name] = config
    follow_group_offload(unwrap(model))
    activate(model, {**registry.active, name: weight})
    if registry.capacity is None and any(set(pair.scaling) == {name} for pair in pairs_of(model).values()):
        attach_all(model)


def _register(model: nn.Module, registry: Registry) -> None:
    """Write the registry and the hooks of the whole model on a model that has none."""
    model = unwrap(model)
    if getattr(model, "_serial_lora", None) is None:
        model._serial_lora = registry  # pyright: ignore[reportArgumentType]
        call = ModelCall(registry.call)
        model.register_forward_pre_hook(call.before, with_kwargs=True)
        model.register_forward_hook(call.after, always_call=True)
        for module in model.modules():  # a model inside, such as a vision tower, can be saved by itself
            if hasattr(type(module), "save_pretrained"):
                vars(module)["save_pretrained"] = SavePretrained(module)


def activate(model: nn.Module, chosen: Mapping[str, Weights]) -> None:
    """Set the weight of every adapter at every site; all has been checked."""
    registry = registry_of(model)
    registry.active = dict(chosen)
    for key, pair in pairs_of(model).items():
        path = key.partition(".serial_lora.")[0]
        pair.activate({name: weight_at(path, weight) for name, weight in chosen.items()})


def attach_all(model: nn.Module) -> None:
    """Hook every site that has a pair."""
    for module, reads in _hooked(model):
        attach(module, reads)
    _forget_compiled()


def detach_all(model: nn.Module) -> None:
    """Remove the hook of every site: the forward is the base's own."""
    for module in unwrap(model).modules():
        detach(module)
    _forget_compiled()


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, SerialLoraPair]]]:
    pairs = pairs_of(model)
    reads: dict[int, tuple[nn.Module, dict[str, SerialLoraPair]]] = {}
    for slot in find_slots(model):
        if slot.key in pairs:
            # A pair without inputs of its own reads what its projections read.
            modules = [slot.module] if slot.pair.inputs else [projection.owner for projection in slot.projections]
            for module in modules:
                names = slot.pair.inputs or (FIRST_ARGUMENT,)
                reads.setdefault(id(module), (module, {}))[1].update(dict.fromkeys(names, pairs[slot.key]))
    return iter(reads.values())


def _forget_compiled() -> None:
    """Drop compiled graphs: torch.compile does not guard on hooks and would go on with the forward of before."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and getattr(eval_frame, "cached_backends", None):
        torch.compiler.reset()


def _drop_empty_sites(model: nn.Module) -> None:
    for module in [m for m in unwrap(model).modules() if "serial_lora" in m._modules]:
        container = module.get_submodule("serial_lora")
        for name, pair in list(container.named_children()):
            if isinstance(pair, SerialLoraPair) and not pair.scaling:
                del container._modules[name]
        if not container._modules:
            del module._modules["serial_lora"]
    detach_all(model)
    attach_all(model)
