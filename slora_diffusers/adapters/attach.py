"""How adapters get into a model and out of it: pairs, hooks, registry. The verbs are in the modules beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..core.change import Change, pass_gate
from ..core.compiled import forget_compiled
from ..core.hooks import FIRST_ARGUMENT, Followed, ModelCall, attach, detach
from ..core.layer import SerialLoraPair
from ..core.names import CONTAINER, is_of_pair, split_place
from ..core.offload import follow_group_offload, lifted_offload
from ..core.parts import SerialLoraPart, ensure_part, follow_parts, parts_of, stop_relaying
from ..core.sites import Slot, find_slots, unwrap
from ..core.state import (
    Registry,
    Weights,
    adapter_checksum,
    check_new_name,
    keep_call,
    pairs_of,
    registry_of,
    weight_at,
)
from .save_pretrained import SavePretrained


def put_in(
    change: Change,
    model: nn.Module,
    name: str,
    matrices: Sequence[tuple[Slot, Tensor, Tensor]],
    config: SerialLoraConfig,
    weight: float | None,
    trainable: bool,
    modules: Mapping[str, nn.Module],
) -> None:
    """Add an adapter whose A and B are given, inside a change; all has been checked and computed.

    Args:
        change: The change in progress.
        model: The model.
        name: Name of the adapter.
        matrices: A (r, d) and B (d, r) of every slot, on the device of what they go beside.
        config: Its settings.
        weight: Its weight beside the adapters that are active already; None leaves it inactive.
        trainable: Whether the matrices ask for gradients.
        modules: {path: its copy of the module there}.

    Raises:
        AdapterStateError: If another thread has taken the name, or fused, since that was checked.
    """
    root = unwrap(model)
    registry = register(model)
    check_new_name(registry, name)
    registry.configs[name] = config
    change.on_failure(lambda: follow_group_offload(root))
    new_hooks = False
    for slot, A, B in matrices:
        pair = ensure_pair(slot, registry)
        new_hooks |= not pair.scaling
        with lifted_offload(pair):
            pair.add(name, A, B, config.scaling_of(slot.path, A.shape[0]), config.dropout, trainable)
    for path, module in modules.items():
        part = ensure_part(root, path, registry.call)
        new_hooks |= not part.names
        part.add(name, module)
    if trainable:  # untrained yet: nothing would be lost
        registry.saved[name] = adapter_checksum(root, name)
    follow_group_offload(root)
    activate(model, registry.active if weight is None else {**registry.active, name: weight})
    if new_hooks and registry.capacity is None:
        attach_all(model)


def take_out(model: nn.Module, name: str) -> None:
    """Remove one adapter's matrices from every pair, and its modules; what is empty then stays."""
    registry = registry_of(model)
    for part in parts_of(model).values():
        if name in part.names:
            part.remove(name)
    for pair in pairs_of(model).values():
        if name in pair.scaling:
            with lifted_offload(pair):
                pair.remove(name)
    del registry.configs[name]
    registry.active.pop(name, None)


def freeze_base(model: nn.Module) -> None:
    """Let nothing of the model train but its pairs."""
    for name, parameter in unwrap(model).named_parameters():
        if not is_of_pair(name):
            parameter.requires_grad_(False)


def ensure_pair(slot: Slot, registry: Registry) -> SerialLoraPair:
    """The pair at a place of the model, made (without any adapter) if it is not there."""
    if CONTAINER not in slot.module._modules:
        slot.module.serial_lora = nn.ModuleDict()
    container = slot.module.get_submodule(CONTAINER)
    assert isinstance(container, nn.ModuleDict)
    if slot.pair.name not in container:
        pair = SerialLoraPair(slot.features, registry.call)
        pair.train(slot.module.training)
        container[slot.pair.name] = pair
    pair = container[slot.pair.name]
    assert isinstance(pair, SerialLoraPair)
    return pair


def register(model: nn.Module) -> Registry:
    """The registry of a model; written on it, with the hooks of the whole model, where it has none."""
    model = unwrap(model)
    registry = registry_of(model, create=True)
    if getattr(model, "_serial_lora", None) is not None:
        return registry
    call = ModelCall(registry)
    model.register_forward_pre_hook(call.before, with_kwargs=True)
    model.register_forward_hook(call.after, always_call=True)
    registry.call.turn = pass_gate(model, registry.call.turn)
    for module in model.modules():  # a model inside, such as a vision tower, can be saved by itself
        if hasattr(type(module), "save_pretrained"):
            vars(module)["save_pretrained"] = SavePretrained(module, registry)
    model._serial_lora = registry  # pyright: ignore[reportArgumentType]
    return registry


def remove_all(model: nn.Module) -> None:
    """Remove every adapter, hook and trace."""
    model, registry = unwrap(model), registry_of(model)
    detach_all(model)
    for module in [m for m in model.modules() if CONTAINER in m._modules]:
        del module._modules[CONTAINER]
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), ModelCall):
                del hooks[key]
                for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(model, flags).pop(key, None)
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), SavePretrained):
            del vars(module)["save_pretrained"]
    if registry.call.entered:
        keep_call(model, registry.call)
    del model._serial_lora


def activate(model: nn.Module, chosen: Mapping[str, Weights]) -> None:
    """Set the weight of every adapter at every site; all has been checked."""
    registry_of(model).active = dict(chosen)
    for key, pair in pairs_of(model).items():
        path, _ = split_place(key)
        pair.activate({name: weight_at(path, weight) for name, weight in chosen.items()})
    for path, part in parts_of(model).items():
        part.activate({name: weight_at(path, weight) for name, weight in chosen.items()})


def attach_all(model: nn.Module) -> None:
    """Hook every site that has a pair."""
    followed: list[Followed] = []
    for module, reads, path in _hooked(model):
        hook = attach(module, reads)
        if path is not None:
            followed.append(Followed(*path, hook))
    registry_of(model).followed = followed + follow_parts(model)
    forget_compiled(unwrap(model))


def detach_all(model: nn.Module) -> None:
    """Remove the hook of every site: the forward is the base's own."""
    registry_of(model).followed = []
    for module in unwrap(model).modules():
        detach(module)
        stop_relaying(module)
    forget_compiled(unwrap(model))


def drop_empty_sites(model: nn.Module) -> None:
    """Take out the pairs, and the places for modules, that hold no adapter any more, and their hooks."""
    for module in [m for m in unwrap(model).modules() if CONTAINER in m._modules]:
        container = module.get_submodule(CONTAINER)
        for name, held in list(container.named_children()):
            if _is_empty(held):
                del container._modules[name]
        if not container._modules:
            del module._modules[CONTAINER]
    detach_all(model)
    attach_all(model)


def has_empty_sites(model: nn.Module) -> bool:
    """Whether `drop_empty_sites` would find something."""
    return any(_is_empty(held) for held in (*pairs_of(model).values(), *parts_of(model).values()))


def _is_empty(held: nn.Module) -> bool:
    return (isinstance(held, SerialLoraPair) and not held.scaling) or (
        isinstance(held, SerialLoraPart) and not held.names
    )


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, SerialLoraPair], tuple[nn.Module, str] | None]]:
    """(module, {argument: pair}, how to find the module again) of every hook.

    A pair without inputs of its own reads what its projections read. Those Linears are replaced by others (PEFT,
    quantizers), so they are found by their site, which holds the pair, and their path from there.
    """
    pairs = pairs_of(model)
    reads: dict[int, tuple[nn.Module, dict[str, SerialLoraPair], tuple[nn.Module, str] | None]] = {}
    for slot in find_slots(model):
        if (pair := pairs.get(slot.key)) is None:
            continue
        if slot.pair.inputs:
            reads.setdefault(id(slot.module), (slot.module, {}, None))[1].update(dict.fromkeys(slot.pair.inputs, pair))
            continue
        for projection in slot.projections:
            path = (slot.module, projection.name) if projection.owner is not slot.module else None
            reads.setdefault(id(projection.owner), (projection.owner, {}, path))[1][FIRST_ARGUMENT] = pair
    return iter(reads.values())
