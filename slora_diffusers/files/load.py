"""Load an adapter into a model, all or nothing."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters.attach import add_loaded
from ..config import SerialLoraConfig
from ..core.sites import Slot, find_slots, is_chosen, unwrap
from ..core.state import Registry, check_new_name, pairs_of, registry_of
from ..errors import AdapterFileError, AdapterStateError
from .fingerprint import describe_base, warn_of_other_base
from .format import (
    AdapterTensors,
    check_finite,
    check_hub_arguments,
    read_adapter,
)
from .save import component_name

logger = logging.getLogger("diffusers.slora_diffusers")  # a child of diffusers' own: its verbosity holds here too

Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What `load_serial_lora` loaded, and (with `strict=False`) what it passed over."""

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
    """A checked load that has not touched the model yet."""

    model: nn.Module
    registry: Registry
    config: SerialLoraConfig
    matrices: list[tuple[Slot, Tensor, Tensor]]
    report: LoadReport

    def apply(self, weight: float) -> LoadReport:
        """Add the adapter to the model, active with this weight beside those that are active already."""
        add_loaded(self.model, self.registry, self.report.adapter_name, self.matrices, self.config, weight)
        passed_over = self.report.missing or self.report.unexpected or self.report.mismatched
        logger.log(logging.WARNING if passed_over else logging.INFO, "Loaded %s", self.report)
        return self.report


def load_serial_lora(
    model: nn.Module,
    source: Source,
    adapter_name: str | None = None,
    weight: float = 1.0,
    strict: bool = True,
    config: SerialLoraConfig | None = None,
    **hub: Any,
) -> LoadReport:
    """Load an adapter into a model; it becomes active beside those that are active already.

    Everything is read and checked before the model is touched. The base, its devices and its hooks stay as they are.

    Args:
        model: The base the adapter was trained on.
        source: File, folder, Hub id, or state dict.
        adapter_name: Its name from here on; `None` takes the first free one of default, default_1, ...
        weight: Weight w in `x~ = x + sum_i w_i s_i B_i A_i x`.
        strict: Whether keys that are missing, unexpected or of a wrong shape are an error; if not, what fits is
            loaded and the report says what did not.
        config: Settings to use instead of the file's; for a plain state dict, which has none.
        **hub: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        The numbers of sites, pairs and parameters, and what was passed over.

    Raises:
        SerialLoraError: If the file cannot be read or does not fit; the model is as it was.
        TypeError: If a keyword argument is unknown.
    """
    check_hub_arguments(hub)
    registry = registry_of(model, create=True)
    name = free_name(registry) if adapter_name is None else adapter_name
    check_new_name(registry, name)
    check_weight(weight)
    tensors = read_adapter(source, **hub)
    names = tensors.component_names()
    component = component_name(model)
    if component not in names and len(names) == 1:
        component = names[0]  # a pipeline's name for this model, such as text_encoder
    plan = plan_load(model, tensors, component, name, strict, config)
    tensors.warn_of_rest([component])
    return plan.apply(weight)


def plan_load(
    model: nn.Module,
    tensors: AdapterTensors,
    component: str,
    name: str,
    strict: bool = True,
    config: SerialLoraConfig | None = None,
) -> Plan:
    """Check one component of an adapter against a model; see `load_serial_lora`."""
    registry = registry_of(model, create=True)
    check_new_name(registry, name)
    matrices = _group(tensors, component)
    check_finite({f"{key}.lora_{part}": t for key, both in matrices.items() for part, t in both.items()})
    header = tensors.metadata.get("components", {}).get(component, {})
    if config is None:
        config = _config_of(header, matrices, bool(tensors.metadata))
    slots = {slot.key: slot for slot in find_slots(model)}
    expected = {key for key, slot in slots.items() if is_chosen(slot, config)} if "config" in header else set(matrices)
    missing = sorted(expected - set(matrices)) + [key for key, both in matrices.items() if len(both) < 2]
    unexpected = sorted(set(matrices) - set(slots))
    fitting = {key: slots[key] for key in slots if key in matrices and len(matrices[key]) == 2}
    mismatched = _mismatches(fitting, matrices, config)
    if strict and (missing or unexpected or mismatched):
        raise AdapterFileError(_misfit_message(model, header, missing, unexpected, list(mismatched.values()), slots))
    chosen = [(slot, matrices[k]["A"], matrices[k]["B"]) for k, slot in fitting.items() if k not in mismatched]
    if not chosen:
        raise AdapterFileError(_misfit_message(model, header, missing, unexpected, list(mismatched.values()), slots))
    _check_capacity(model, registry, chosen)
    theirs = header.get("base", {})
    if theirs.get("fingerprint"):
        warn_of_other_base("adapter", theirs, describe_base(model, list(slots.values())), stacklevel=4)
    report = LoadReport(
        name,
        len({slot.path for slot, _, _ in chosen}),
        len(chosen),
        sum(A.numel() + B.numel() for _, A, B in chosen),
        tuple(missing),
        tuple(unexpected),
        tuple(mismatched.values()),
    )
    return Plan(model, registry, config, chosen, report)


def free_name(registry: Registry) -> str:
    """The first of default, default_1, ... that is not taken."""
    names = ("default", *(f"default_{i}" for i in range(1, len(registry.configs) + 1)))
    return next(name for name in names if name not in registry.configs)


def check_weight(weight: Any) -> None:
    """Raise AdapterStateError unless the weight of an adapter is a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise AdapterStateError(f"weight must be a finite number; got {weight!r}.")


def _group(tensors: AdapterTensors, component: str) -> dict[str, dict[str, Tensor]]:
    """{`<site>.serial_lora.<pair>`: {"A": ..., "B": ...}} of one component; odd keys keep their whole name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first, _, rest = key.partition(".")
        if first != component:
            continue
        for part in "AB":
            if rest.endswith(f".lora_{part}.weight") and "serial_lora." in rest:
                found.setdefault(rest.removesuffix(f".lora_{part}.weight"), {})[part] = tensor
                break
        else:
            found.setdefault(rest, {})
    if not any(found.values()):
        shown = ", ".join(list(tensors)[:3]) or "no key at all"
        raise AdapterFileError(
            f"The source has no key of the component {component!r}. Expected keys like "
            f"'{component}.<path of the attention>.serial_lora.<pair>.lora_A.weight'; found {shown} "
            f"(components {tensors.component_names()}). An ordinary LoRA is turned into a Serial LoRA by "
            "compress_lora()."
        )
    return found


def _config_of(
    header: Mapping[str, Any], matrices: Mapping[str, Mapping[str, Tensor]], from_file: bool
) -> SerialLoraConfig:
    if "config" in header:
        return SerialLoraConfig.from_dict(header["config"])
    warnings.warn(
        f"The {'file' if from_file else 'state dict'} carries no config, so its scale is unknown: every pair is taken "
        "with alpha = rank (s = 1). Pass config=SerialLoraConfig(...) if it was trained with another.",
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
    header: Mapping[str, Any],
    missing: list[str],
    unexpected: list[str],
    mismatched: list[str],
    slots: Mapping[str, Slot],
) -> str:
    base = header.get("base", {})
    lines = [f"The adapter does not fit {type(unwrap(model)).__name__}; nothing was loaded."]
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", mismatched)):
        if keys:
            lines.append(f"{len(keys)} {what}: {'; '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}.")
    if base:
        lines.append(f"It was trained on {base.get('class')} {base.get('name') or ''}".rstrip() + ".")
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
