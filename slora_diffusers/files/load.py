"""Load an adapter into a model or a pipeline, all or nothing."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import put_in
from ..config import SerialLoraConfig
from ..core.change import changing
from ..core.components import adapted, component_name, components_of, for_each, free_name, is_pipeline
from ..core.offload import device_of
from ..core.sites import Slot, find_slots, is_chosen, unwrap
from ..core.state import Registry, check_new_name, pairs_of, registry_of
from ..errors import AdapterFileError, AdapterStateError
from .fingerprint import describe_base, warn_of_other_base
from .format import AdapterFile, Base, Component
from .storage import check_finite, check_hub_arguments

logger = logging.getLogger("diffusers.slora_diffusers")  # a child of diffusers' own: its verbosity holds here too

Source = str | os.PathLike[str] | Mapping[str, Tensor] | AdapterFile


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
    """A checked load that has not touched the model yet: the matrices are copies, on the device they go to."""

    model: nn.Module
    config: SerialLoraConfig
    matrices: list[tuple[Slot, Tensor, Tensor]]
    report: LoadReport


def load_serial_lora(
    model: Any,
    source: Source,
    adapter_name: str | None = None,
    weight: float = 1.0,
    strict: bool = True,
    config: SerialLoraConfig | None = None,
    **hub: Any,
) -> Any:
    """Load an adapter into a model or a pipeline; it becomes active beside those that are active already.

    Everything is read and checked before a model is touched. The base, its devices and its hooks stay as they are.

    Args:
        model: The base the adapter was trained on; or a pipeline, whose components get what was made for them, all
            or none.
        source: File, folder, Hub id, or state dict.
        adapter_name: Its name from here on; `None` takes the first free one of default, default_1, ...
        weight: Weight w in `x~ = x + sum_i w_i s_i B_i A_i x`.
        strict: Whether keys that are missing, unexpected or of a wrong shape are an error; if not, what fits is
            loaded and the report says what did not.
        config: Settings to use instead of the file's; for a plain state dict, which has none.
        **hub: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        The numbers of sites, pairs and parameters, and what was skipped; of a pipeline {component: these}.

    Raises:
        SerialLoraError: If the file cannot be read or does not fit; nothing has changed then.
        TypeError: If a keyword argument is unknown.
    """
    check_hub_arguments(hub)
    check_weight(weight)
    models = components_of(model)
    name = free_name(adapted(model, required=False)) if adapter_name is None else adapter_name
    if not is_pipeline(model):
        check_new_name(registry_of(model, create=True), name)
    file = AdapterFile.read(source, **hub)
    parts = _parts_for(model, models, file, strict)
    plans = {c: plan_load(models[c], part, name, strict, config, component=c) for c, part in parts.items()}
    file.warn_of_rest([key for key, part in file.components.items() if any(part is taken for taken in parts.values())])
    apply_plans(list(plans.values()), weight)
    return for_each(model, {component: plan.report for component, plan in plans.items()})


def apply_plans(plans: Sequence[Plan], weight: float | None) -> None:
    """Add the adapters of checked loads to their models, all or none.

    Args:
        plans: One for each model.
        weight: The new adapter's, active beside those that are active already; None leaves it inactive.
    """
    with changing(*(plan.model for plan in plans)) as change:
        for plan in plans:
            registry, name = registry_of(plan.model, create=True), plan.report.adapter_name
            check_new_name(registry, name)  # once more: another thread may have been here since the check
            active = dict(registry.active) if weight is None else {**registry.active, name: weight}
            put_in(change, plan.model, registry, name, plan.matrices, plan.config, active, trainable=False)
    for plan in plans:
        skipped = plan.report.missing or plan.report.unexpected or plan.report.mismatched
        logger.log(logging.WARNING if skipped else logging.INFO, "Loaded %s", plan.report)


def plan_load(
    model: nn.Module,
    part: Component,
    name: str,
    strict: bool = True,
    config: SerialLoraConfig | None = None,
    component: str | None = None,
) -> Plan:
    """Check one component of an adapter against a model; see `load_serial_lora`."""
    registry = registry_of(model, create=True)
    check_new_name(registry, name)
    matrices = part.pairs()
    if not any(matrices.values()):
        raise _no_component(component or component_name(model), AdapterFile({component or "": part}))
    check_finite({f"{key}.lora_{which}": t for key, both in matrices.items() for which, t in both.items()})
    if config is None:
        config = part.config or _guessed_config(matrices)
    slots = {slot.key: slot for slot in find_slots(model)}
    chosen_by_file = part.config is not None
    expected = {key for key, slot in slots.items() if is_chosen(slot, config)} if chosen_by_file else set(matrices)
    missing = sorted(expected - set(matrices)) + [key for key, both in matrices.items() if len(both) < 2]
    unexpected = sorted(set(matrices) - set(slots))
    fitting = {key: slots[key] for key in slots if key in matrices and len(matrices[key]) == 2}
    mismatched = _mismatches(fitting, matrices, config)
    chosen = [(slot, matrices[k]["A"], matrices[k]["B"]) for k, slot in fitting.items() if k not in mismatched]
    if not chosen or (strict and (missing or unexpected or mismatched)):
        wrong = list(mismatched.values())
        raise AdapterFileError(_misfit_message(model, part.base, missing, unexpected, wrong, slots))
    _check_capacity(model, registry, chosen)
    if part.base.fingerprint:
        warn_of_other_base("adapter", part.base, describe_base(model, list(slots.values())), stacklevel=4)
    report = LoadReport(
        name,
        len({slot.path for slot, _, _ in chosen}),
        len(chosen),
        sum(A.numel() + B.numel() for _, A, B in chosen),
        tuple(missing),
        tuple(unexpected),
        tuple(mismatched.values()),
    )
    return Plan(model, config, [(slot, *_copies(slot, A, B)) for slot, A, B in chosen], report)


def check_weight(weight: Any) -> None:
    """Raise AdapterStateError unless the weight of an adapter is a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise AdapterStateError(f"weight must be a finite number; got {weight!r}.")


def _parts_for(target: Any, models: Mapping[str, nn.Module], file: AdapterFile, strict: bool) -> dict[str, Component]:
    """{component of the target: its part of the file}."""
    parts = file.components
    if not is_pipeline(target):
        (component,) = models
        if component not in parts and len(parts) == 1:
            return {component: next(iter(parts.values()))}  # a pipeline's name for this model, such as text_encoder
        if component not in parts:
            raise _no_component(component, file)
        return {component: parts[component]}
    if list(parts) == ["model"] and "transformer" in models:
        raise AdapterFileError(
            "The source was saved from a bare model that is not diffusers' own (component 'model'); load it into "
            "that model with load_serial_lora(model, source)."
        )
    known = [name for name in parts if name in models]
    if not known or (strict and len(known) < len(parts)):
        raise AdapterFileError(
            f"The adapter is for the components {list(parts)}, but {type(target).__name__} has {sorted(models)}. Load "
            "it into a pipeline that has them" + (", or pass strict=False." if known else ".")
        )
    return {name: parts[name] for name in known}


def _no_component(component: str, file: AdapterFile) -> AdapterFileError:
    keys = [f"{name}.{key}" for name, part in file.components.items() for key in part.tensors]
    return AdapterFileError(
        f"The source has no key of the component {component!r}. Expected keys like "
        f"'{component}.<path of the attention>.serial_lora.<pair>.lora_A.weight'; found "
        f"{', '.join(keys[:3]) or 'no key at all'} (components {list(file.components)}). An ordinary LoRA is turned "
        "into a Serial LoRA by compress_lora()."
    )


def _copies(slot: Slot, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices where they go: copies, for a state dict's tensors may be another model's own parameters."""
    device = device_of(slot.projections[0].owner, slot.projections[0].attribute)
    device = "cpu" if device.type == "meta" else device  # a base that has no numbers yet must not take theirs
    kinds = [torch.float32 if matrix.element_size() == 1 else matrix.dtype for matrix in (A, B)]  # float8 has no sums
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


def _check_capacity(model: nn.Module, registry: Registry, chosen: list[tuple[Slot, Tensor, Tensor]]) -> None:
    if registry.capacity is None:
        return
    room, pairs = registry.capacity[0] * registry.capacity[1], pairs_of(model)
    for slot, A, _ in chosen:
        pair = pairs.get(slot.key)
        if pair is None or pair.stacked_A is None:
            raise AdapterStateError(
                f"No capacity is reserved at {slot.key}, which the adapter uses. Reserve it with "
                "reserve_serial_lora(inputs=...) before compiling."
            )
        used = sum(pair.matrices(name)[0].shape[0] for name in pair.weights)
        if used + A.shape[0] > room:
            raise AdapterStateError(
                f"The adapter's rank {A.shape[0]} beside {used} of the active adapters exceeds the reserved capacity "
                f"of {room} at {slot.key}. Set or delete some first, or reserve more before compiling."
            )
