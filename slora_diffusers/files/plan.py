"""What of an adapter's file fits a model, checked and copied before the model is touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..core.components import component_name
from ..core.names import split_tensor
from ..core.offload import Storage
from ..core.parts import copied
from ..core.sites import Slot, find_slots, is_chosen, unwrap
from ..core.state import Registry, check_new_name, check_not_fused, check_reserved, check_trains, pairs_of, registry_of
from ..errors import AdapterFileError, AdapterStateError
from .fingerprint import describe_base, warn_of_other_base
from .format import AdapterFile, Base, Component
from .plan_modules import Modules, plan_modules
from .storage import check_finite


@dataclass(frozen=True)
class LoadReport:
    """What `load_serial_lora` loaded, and (with `strict=False`) what it skipped."""

    adapter_name: str
    sites: int
    pairs: int
    parameters: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.adapter_name}: {self.pairs} pairs on {self.sites} sites, {self.parameters:,} parameters"
        for what in ("missing", "unexpected", "mismatched"):
            text += f"; {len(getattr(self, what))} {what}" if getattr(self, what) else ""
        return text


@dataclass(frozen=True)
class Plan:
    """A checked load that has not touched the model yet: the matrices are copies, on the device they go to.

    `replaces` says that it takes the place of the adapter of that name, `trainable` that it goes on training, and
    `modules` holds its copies of whole modules by their paths.
    """

    model: nn.Module
    config: SerialLoraConfig
    matrices: list[tuple[Slot, Tensor, Tensor]]
    report: LoadReport
    replaces: bool = False
    trainable: bool = False
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


def plan_load(
    model: nn.Module,
    part: Component,
    name: str,
    strict: bool = True,
    config: SerialLoraConfig | None = None,
    component: str | None = None,
    hotswap: bool = False,
    trainable: bool = False,
) -> Plan:
    """Check one component of an adapter against a model; see `load_serial_lora`."""
    registry = registry_of(model, create=True)
    check_name(registry, name, hotswap)
    if trainable:
        check_trains(registry, "loading")
    matrices = part.pairs()
    if not any(matrices.values()):
        raise no_component(component or component_name(model), AdapterFile({component or "": part}))
    check_finite({f"{key}.lora_{which}": t for key, both in matrices.items() for which, t in both.items()})
    check_finite({key: tensor for key, tensor in part.tensors.items() if split_tensor(key) is not None})
    if config is None:
        config = part.config or _guessed_config(matrices)
    slots = {slot.key: slot for slot in find_slots(model)}
    chosen_by_file = part.config is not None
    expected = {key for key, slot in slots.items() if is_chosen(slot, config)} if chosen_by_file else set(matrices)
    missing = sorted(expected - set(matrices)) + [key for key, both in matrices.items() if len(both) < 2]
    unexpected = sorted(set(matrices) - set(slots))
    fitting = {key: slots[key] for key in slots if key in matrices and len(matrices[key]) == 2}
    mismatched = _mismatches(fitting, matrices, config)
    modules = plan_modules(model, part, config if chosen_by_file else None)
    missing += modules.missing
    unexpected += modules.unexpected
    mismatched |= modules.mismatched
    config = replace(config, modules_to_save=list(modules.fitting) or None)
    chosen = [(slot, matrices[k]["A"], matrices[k]["B"]) for k, slot in fitting.items() if k not in mismatched]
    if not chosen or (strict and (missing or unexpected or mismatched)):
        wrong = list(mismatched.values())
        raise AdapterFileError(_misfit_message(model, part.base, missing, unexpected, wrong, slots))
    _check_capacity(model, registry, chosen, besides=name)
    copies = _module_copies(model, part, modules, registry, trainable)
    if part.base.fingerprint:
        warn_of_other_base("adapter", part.base, describe_base(model, list(slots.values())), stacklevel=4)
    report = LoadReport(
        name,
        len({slot.path for slot, _, _ in chosen}),
        len(chosen),
        sum(A.numel() + B.numel() for _, A, B in chosen)
        + sum(p.numel() for copy in copies.values() for p in copy.parameters()),
        tuple(missing),
        tuple(unexpected),
        tuple(mismatched.values()),
    )
    matrices_there = [(slot, *_copies(slot, A, B, trainable)) for slot, A, B in chosen]
    return Plan(model, config, matrices_there, report, hotswap, trainable, copies)


def check_name(registry: Registry, name: str, replaces: bool) -> None:
    """Raise AdapterStateError unless an adapter of that name can be added, or can take the place of the one there."""
    if replaces and name in registry.configs:
        check_not_fused(registry, "replace an adapter")
    else:
        check_new_name(registry, name)


def no_component(component: str, file: AdapterFile) -> AdapterFileError:
    """The error of a file without the part that is asked for."""
    keys = [f"{name}.{key}" for name, part in file.components.items() for key in part.tensors]
    return AdapterFileError(
        f"The source has no key of the component {component!r}. Expected keys like "
        f"'{component}.<path of the attention>.serial_lora.<pair>.lora_A.weight'; found "
        f"{', '.join(keys[:3]) or 'no key at all'} (components {list(file.components)}). An ordinary LoRA is turned "
        "into a Serial LoRA by compress_lora()."
    )


def _module_copies(
    model: nn.Module, part: Component, modules: Modules, registry: Registry, trainable: bool
) -> dict[str, nn.Module]:
    """Of each module that the file brings whole, what the adapter will have in its place."""
    if modules.fitting and registry.capacity is not None:
        raise AdapterStateError(
            f"The adapter brings modules of its own ({', '.join(modules.fitting)}; modules_to_save), for which no room "
            "can be reserved. Call unload_serial_lora() first, which lets the reserved room go."
        )
    storage, given = Storage(unwrap(model)), part.modules()
    return {path: copied(storage, one, path, given[path], trainable) for path, one in modules.fitting.items()}


def _copies(slot: Slot, A: Tensor, B: Tensor, trainable: bool) -> tuple[Tensor, Tensor]:
    """The matrices where they go: copies, for a state dict's tensors may be another model's own parameters."""
    device = "cpu" if slot.device.type == "meta" else slot.device  # a base that has no numbers yet must not take theirs
    # What trains is fp32, and float8 has no sums.
    kinds = [torch.float32 if trainable or matrix.element_size() == 1 else matrix.dtype for matrix in (A, B)]
    A, B = (m.detach().to(device, kind, copy=True).contiguous() for m, kind in zip((A, B), kinds, strict=True))
    return A, B


def _guessed_config(matrices: Mapping[str, Mapping[str, Tensor]]) -> SerialLoraConfig:
    warnings.warn(
        "The source carries no config, so its scale is unknown: every pair is taken with alpha = rank (s = 1). Pass "
        "config=SerialLoraConfig(...) if it was trained with another.",
        stacklevel=4,
    )
    ranks = {key: both["A"].shape[0] for key, both in matrices.items() if "A" in both and both["A"].ndim}
    rank = max(ranks.values(), default=1)
    return SerialLoraConfig(rank=rank, rank_pattern={re.escape(k): r for k, r in ranks.items() if r != rank})


def _mismatches(
    slots: Mapping[str, Slot], matrices: Mapping[str, Mapping[str, Tensor]], config: SerialLoraConfig
) -> dict[str, str]:
    wrong: dict[str, str] = {}
    for key, slot in slots.items():
        A, B = tuple(matrices[key]["A"].shape), tuple(matrices[key]["B"].shape)
        r, d = config.rank_of(slot.path, slot.key), slot.features
        if A != (r, d) or B != (d, r):  # noqa: SIM300 (matrices, not constants)
            wrong[key] = f"{key}: lora_A {A} and lora_B {B}, expected ({r}, {d}) and ({d}, {r})"
    return wrong


def _misfit_message(
    model: nn.Module,
    base: Base,
    missing: list[str],
    unexpected: list[str],
    mismatched: list[str],
    slots: Mapping[str, Slot],
) -> str:
    lines = [f"The adapter does not fit {type(unwrap(model)).__name__}; nothing was loaded."]
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", mismatched)):
        if keys:
            lines.append(f"{len(keys)} {what}: {'; '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}.")
    if base.kind:
        lines.append(f"It was trained on {base.kind} {base.name or ''}".rstrip() + ".")
    lines.append(f"The model has {len(slots)} places, such as {next(iter(slots))}.")
    lines.append("Load it into the base it was made for, or pass strict=False to load what fits.")
    return " ".join(lines)


def _check_capacity(
    model: nn.Module, registry: Registry, chosen: list[tuple[Slot, Tensor, Tensor]], besides: str
) -> None:
    """Raise AdapterStateError unless the matrices fit the reserved room, `besides` being the adapter they replace."""
    if registry.capacity is None:
        return
    check_reserved(model, "load an adapter")
    room, pairs = registry.capacity[0] * registry.capacity[1], pairs_of(model)
    for slot, A, _ in chosen:
        pair = pairs.get(slot.key)
        if pair is None or pair.reserved is None:
            raise AdapterStateError(
                f"No capacity is reserved at {slot.key}, which the adapter uses. Reserve it with "
                "reserve_serial_lora(inputs=...) before compiling."
            )
        used = sum(pair.matrices(name)[0].shape[0] for name in pair.weights if name != besides)
        if used + A.shape[0] > room:
            raise AdapterStateError(
                f"The adapter's rank {A.shape[0]} beside {used} of the active adapters exceeds the reserved capacity "
                f"of {room} at {slot.key}. Set or delete some first, or reserve more before compiling."
            )
