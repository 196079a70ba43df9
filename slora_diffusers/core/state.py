"""What a model remembers about its adapters, and the checks that come before any change."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import SerialLoraConfig, matches
from ..errors import AdapterStateError
from .calls import CallState, named_by
from .hooks import Followed
from .layer import SerialLoraPair
from .names import matrix_name, split_place, tensor_name
from .offload import Storage
from .parts import check_one_each, parts_of
from .sites import Projection, unwrap
from .tensors import checksum

Weights = float | Mapping[str, float]
"""The weight of an adapter: a number, or {regular expression of a site: number}."""


@dataclass(frozen=True)
class Replaced:
    """One weight that a fuse replaced.

    Args:
        projection: Where it is.
        original: The very tensor that it held, to be put back.
        fused: A (R, d) and B (d, R) of what was merged, by which the fused weight can be made again; or the tensor
            itself, of a module that an adapter replaces whole.
        dtype: Dtype of the fused weight.
        checksum: Of its content; whoever changes the weight later changes that.
    """

    projection: Projection
    original: Tensor
    fused: tuple[Tensor, ...]
    dtype: torch.dtype
    checksum: tuple[int, int]

    def again(self) -> Tensor:
        """What the fuse wrote."""
        return self.fused[0] if len(self.fused) == 1 else self.projection.fused(self.original, *self.fused)


@dataclass
class Fused:
    """What a fuse replaced."""

    weights: dict[str, Weights]
    scale: float
    originals: list[Replaced]


@dataclass
class Registry:
    """Everything that a model remembers about its adapters, besides the pairs themselves."""

    call: CallState = field(default_factory=CallState)
    configs: dict[str, SerialLoraConfig] = field(default_factory=dict)
    active: dict[str, Weights] = field(default_factory=dict)
    fused: Fused | None = None
    capacity: tuple[int, int] | None = None
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)  # checksum of each adapter when it was last saved
    followed: list[Followed] = field(default_factory=list)  # hooks on modules that others may replace


_CALLS: weakref.WeakKeyDictionary[nn.Module, CallState] = weakref.WeakKeyDictionary()
"""Blocks that are open on models without adapters; they hold for those that come."""


def call_of(model: nn.Module) -> CallState:
    """The calls in progress on a model, whether or not it has adapters now."""
    registry = getattr(unwrap(model), "_serial_lora", None)
    return registry.call if registry is not None else _CALLS.setdefault(unwrap(model), CallState())


def keep_call(model: nn.Module, call: CallState) -> None:
    """Have the blocks that are open on a model hold for adapters that come after it has lost all."""
    call.fused = False
    _CALLS[model] = call


def registry_of(model: nn.Module, create: bool = False) -> Registry:
    """The model's record of its adapters.

    Raises:
        AdapterStateError: If there is none and `create` is not set.
    """
    model = unwrap(model)
    registry = getattr(model, "_serial_lora", None)
    if registry is None and create:
        _check_no_other(model)
        # Written on the model with its first pair, once everything has been checked.
        call = _CALLS.get(model)
        registry = Registry(call) if call is not None and call.entered else Registry()
    if registry is None:
        raise AdapterStateError(
            f"{type(model).__name__} has no Serial LoRA adapter. Add one with add_serial_lora() or load_serial_lora()."
        )
    return registry


def _check_no_other(model: nn.Module) -> None:
    """Raise AdapterStateError if a model within this one, or one that this is part of, has adapters of its own."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if "_serial_lora" in vars(module):
            raise AdapterStateError(
                f"{name!r} of {kind} has adapters of its own, and both would claim the same pairs: give the verbs that "
                "model, or call unload_serial_lora() on it first."
            )
        if isinstance(module, SerialLoraPair):
            raise AdapterStateError(
                f"{kind} is part of a model that has adapters, at {name!r} among others: give the verbs that whole "
                "model, or call unload_serial_lora() on it first."
            )


def pairs_of(model: nn.Module) -> dict[str, SerialLoraPair]:
    """{`<path of the site>.serial_lora.<pair>`: pair} of every pair in the model."""
    found = unwrap(model).named_modules()
    return {name.replace("_orig_mod.", ""): m for name, m in found if isinstance(m, SerialLoraPair)}


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """{key in a file: tensor} of one adapter: its pairs' parameters, and those and the buffers of its modules."""
    matrices = {
        matrix_name(key, which): matrix
        for key, pair in pairs_of(model).items()
        if adapter_name in pair.scaling
        for which, matrix in zip("AB", pair.matrices(adapter_name), strict=True)
    }
    return matrices | {
        tensor_name(path, name): tensor
        for path, part in parts_of(model).items()
        if adapter_name in part.names
        for name, tensor in part.copy_of(adapter_name).state_dict(keep_vars=True).items()
    }


def parameters_of(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters A and B of one adapter, or of all, in the order of the model's modules; its modules' follow."""
    pairs = pairs_of(model).values()
    names = [(pair, name) for pair in pairs for name in pair.scaling if adapter_name in (None, name)]
    matrices = [pair.get_parameter(f"lora_{part}_{name}") for pair, name in names for part in "AB"]
    parts = [(part, name) for part in parts_of(model).values() for name in part.names if adapter_name in (None, name)]
    return matrices + [parameter for part, name in parts for parameter in part.copy_of(name).parameters()]


def modules_of(model: nn.Module) -> dict[str, list[str]]:
    """{adapter: paths of the modules that it has copies of}, without adapters that have none."""
    found: dict[str, list[str]] = {}
    for path, part in parts_of(model).items():
        for name in part.names:
            found.setdefault(name, []).append(path)
    return found


def check_modules(model: nn.Module, weights: Mapping[str, Weights], coming: Mapping[str, Iterable[str]] = {}) -> None:
    """Raise AdapterStateError if two adapters, active with these weights, would both stand in one module's place.

    Args:
        model: The model.
        weights: {adapter: weight} of all that would be active.
        coming: {adapter: paths} of one that is not in the model yet.
    """
    held = {**modules_of(model), **coming}
    there = {n: [p for p in held.get(n, ()) if weight_at(p, weight)] for n, weight in weights.items()}
    for path in [path for paths in there.values() for path in paths]:
        check_one_each(path, there)


def adapter_checksum(model: nn.Module, adapter_name: str) -> tuple[int, int]:
    """What tells one state of an adapter from another: sums over the bits of its tensors in this model."""
    here = [checksum(tensor.detach()) for tensor in tensors_of(model, adapter_name).values() if not tensor.is_meta]
    return sum(one for one, _ in here), sum((i + 1) * other for i, (_, other) in enumerate(here))


def weight_at(path: str, weight: Weights) -> float:
    """The weight of an adapter at one site: the first pattern that matches decides, and 1 where none does."""
    if not isinstance(weight, Mapping):
        return float(weight)
    return next((float(w) for pattern, w in weight.items() if matches(pattern, path)), 1.0)


def names_with_weights(
    adapter_names: str | Sequence[str], weights: Weights | Sequence[Weights] | None
) -> dict[str, Weights]:
    """{name: weight} from one or several names, and one weight for all or one per name."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    each = list(weights) if isinstance(weights, Sequence) else [1.0 if weights is None else weights] * len(names)
    if len(each) != len(names) or len(set(names)) != len(names):
        raise AdapterStateError(f"{len(names)} adapter names {names} need as many weights; got {weights!r}.")
    return dict(zip(names, each, strict=True))


def check_active(model: nn.Module, chosen: Mapping[str, Weights]) -> None:
    """Raise AdapterStateError unless these adapters of the model, with these weights, can be made active now."""
    registry = registry_of(model)
    check_not_fused(registry, "change the active adapters")
    pairs = pairs_of(model)
    check_weights(model, chosen)
    check_modules(model, chosen)
    check_reserved(model, "change the active adapters")
    if registry.capacity is not None:
        for pair in pairs.values():
            check_room(pair, chosen, registry.capacity[0] * registry.capacity[1])


def check_weights(model: nn.Module, chosen: Mapping[str, Weights]) -> None:
    """Raise AdapterStateError unless weights are finite numbers, and each of their patterns matches an adapted site."""
    paths = {split_place(key)[0] for key in pairs_of(model)} | set(parts_of(model))
    for name, weight in chosen.items():
        for pattern, number in weight.items() if isinstance(weight, Mapping) else [(None, weight)]:
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < float("inf"):
                raise AdapterStateError(f"The weight of {name!r} must be a finite number; got {number!r}.")
            if pattern is not None and not any(matches(pattern, path) for path in paths):
                raise AdapterStateError(
                    f"The pattern {pattern!r} in the weights of {name!r} matches none of the {len(paths)} adapted "
                    f"sites, such as {min(paths, default='')!r}. Patterns are anchored at both ends."
                )


def check_reserved(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError if room is reserved that cannot be filled where it is."""
    registry, storage = registry_of(model, create=True), Storage(unwrap(model))
    for pair in pairs_of(model).values() if registry.capacity is not None else ():
        storage.check_in_place(pair, what)


def check_room(pair: SerialLoraPair, names: Mapping[str, Weights], room: int) -> None:
    """Raise AdapterStateError unless the summed rank of these adapters at a pair fits the room reserved there."""
    ranks = {name: pair.matrices(name)[0].shape[0] for name in names if name in pair.scaling}
    if sum(ranks.values()) > room:
        raise AdapterStateError(
            f"The adapters {ranks} (name: rank) have a summed rank of {sum(ranks.values())}, but capacity is reserved "
            f"for {room}. Activate fewer, or reserve more with reserve_serial_lora() before compiling."
        )


def check_not_fused(registry: Registry, what: str) -> None:
    """Raise AdapterStateError while adapters are fused: beside W (I + sBA) a live pair would multiply, not add."""
    if registry.fused is not None:
        raise AdapterStateError(
            f"Cannot {what} while {sorted(registry.fused.weights)} are fused into the weights: adapters add to the "
            "base, not to each other. Call unfuse_serial_lora() first."
        )


def check_not_inside(registry: Registry, what: str, names: Iterable[str] | None = None) -> None:
    """Raise AdapterStateError inside a block of this thread that a change would make wrong in silence.

    Args:
        registry: Of the model.
        what: What would be done: "Cannot {what}".
        names: Adapters that would go away, which no batch may name; None: none may be scaled either.
    """
    call = registry.call.current()
    if named_by(call.samples) & set(names) if names is not None else call.scale != 1 or call.samples is not None:
        raise AdapterStateError(
            f"Cannot {what} inside serial_lora_scale(), disable_serial_lora() or serial_lora_batch(), which choose "
            "adapters for the calls inside. Leave the block first."
        )


def check_trains(registry: Registry, doing: str) -> None:
    """Raise AdapterStateError where capacity is reserved, before `doing` (adding, loading) an adapter to train."""
    if registry.capacity is not None:
        raise AdapterStateError(
            "The model has capacity reserved for swapping adapters, and its fixed operands do not train. Call "
            f"unload_serial_lora() before {doing} an adapter to train."
        )


def check_new_name(registry: Registry, name: str) -> None:
    """Raise AdapterStateError unless the name is free and fit for a parameter's name."""
    if not isinstance(name, str) or not re.fullmatch(r"\w(\w|-)*", name):
        raise AdapterStateError(f"An adapter name is made of letters, digits, '_' and '-'; got {name!r}.")
    if name in registry.configs:
        raise AdapterStateError(
            f"The name {name!r} is taken; the model has {sorted(registry.configs)}. Choose another adapter_name, or "
            "delete_serial_lora() first."
        )
    check_not_fused(registry, "add an adapter")
