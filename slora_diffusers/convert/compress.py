"""Compress a LoRA of any kind into the Serial LoRA of a chosen rank that comes nearest to it; see `closed_form`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters.fuse import base_weights
from ..core.calls import ONE_VERB, alone
from ..core.change import reading
from ..core.components import adapted, components_of, free_name, is_pipeline
from ..core.sites import Slot, find_slots
from ..core.state import check_new_name, registry_of
from ..errors import AdapterFileError, SerialLoraError
from ..files.fingerprint import describe_base
from ..files.format import library_version
from ..files.load import apply_plans
from ..files.plan import Plan, plan_load
from ..files.storage import write_safetensors
from .closed_form import RIDGE, SiteError, compress_slot
from .layouts.read import Part, ReadLora, name_of, read_lora, some
from .layouts.write import Target, check_folder, unread_by_diffusers, write_lora
from .lowrank import Products, Track, check_rank, silently
from .pairs import as_adapter
from .plots import plot_errors

REST_PREFIX = "rest_of_"
KEPT_NAME = "rest_as_it_was.safetensors"
LARGE = 100.0
"""Amplification beyond which the 8 bits of bf16 no longer hold x and M x together."""


@dataclass(frozen=True)
class CompressReport:
    """What `compress_lora` made of a LoRA.

    Args:
        adapter_name: Name of the new adapter.
        sites: Every pair with its error.
        relative_error: Over all that the pairs carry: sqrt(sum ||S M - D||^2 / sum ||D||^2).
        total_error: The same, counting what no pair carries as lost.
        not_carried: Modules of the LoRA that no pair carries.
        ignored: Keys, and modules, of the LoRA that are not understood, kept beside as they were.
        rest: Files of the LoRA that holds what is not carried, if it was asked for.
        unplaced: Modules of the LoRA that are of components which are not here: in no result.
        parameters: Parameters of the adapter.
        lora_parameters: Parameters of the LoRA's carried part.
        kinds: {LoRA, DoRA, LoHa, LoKr or OFT: number of modules}.
    """

    adapter_name: str
    sites: tuple[SiteError, ...]
    relative_error: float
    total_error: float
    not_carried: tuple[str, ...]
    ignored: tuple[str, ...]
    rest: tuple[Path, ...]
    unplaced: tuple[str, ...]
    parameters: int
    lora_parameters: int
    kinds: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.adapter_name}: {len(self.sites)} pairs, {self.parameters:,} parameters "
            f"({self.parameters / max(1, self.lora_parameters):.2f} of the LoRA's {self.lora_parameters:,}), relative "
            f"error {self.relative_error:.2e}"
        ]
        worst = max(self.sites, key=lambda site: site.amplification)
        if worst.amplification > LARGE:
            lines.append(
                f"{worst.key} changes its input by up to {worst.amplification:.3g} times its size, where the base "
                "hardly reads it: run this adapter in fp32, or compress with a larger ridge"
            )
        if self.not_carried:
            kept = "kept as a LoRA beside it" if self.rest else f"lost: {self.total_error:.2e} with them"
            lines.append(f"{len(self.not_carried)} modules are not carried ({kept}): {some(self.not_carried)}")
        if self.unplaced:
            fate = "kept as they were" if self.rest else "dropped"
            lines.append(f"{len(self.unplaced)} modules are not in this model, and {fate}: {some(self.unplaced)}")
        if self.ignored:
            lines.append(f"{len(self.ignored)} keys are not understood, and kept as they were: {some(self.ignored)}")
        return "\n".join(lines)


def compress_lora(
    model: Any,
    lora_source: Any,
    rank: int,
    *,
    adapter_name: str | None = None,
    inputs: Sequence[str] | None = None,
    ridge: float = RIDGE,
    keep_rest: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    weight_name: str | None = None,
    track: Track = silently,
    **hub: Any,
) -> CompressReport:
    """Add to a model the Serial LoRA that comes nearest to a LoRA, and say how near.

    Pairs in front of projections that give no more features than they read (an attention's output projection) get
    an ordinary LoRA's own rank, for there the result is exact wherever the weights have full rank: dW = W M with
    M = W^+ dW. Work goes pair by pair in float64, on the CPU's or the weights' device. Everything is read, computed
    and written before the adapter is added.

    Args:
        model: The base, or a pipeline with it; its weights must not be quantized.
        lora_source: File, folder, Hub id or state dict of a LoRA, DoRA, LoHa, LoKr or OFT in the layout of any trainer
            that diffusers or ComfyUI reads.
        rank: Rank of the pairs.
        adapter_name: Name of the new adapter; `None` takes the first free one. It is active afterwards.
        inputs: Names of the pairs to use; `None` takes all that the LoRA has a part for, the optional ones included.
        ridge: Root of the ridge's weight, as a fraction of S's root-mean-square singular value. Directions of the
            input that the base reads more weakly than that are not amplified.
        keep_rest: Folder for what no pair carries, as an ordinary LoRA; load it beside the adapter. Keys that are not
            understood are kept there as they were.
        plot: Path of a picture of the error against the rank.
        weight_name: Name of the LoRA's file in its folder or repository.
        track: Goes through the pairs, showing progress.
        **hub: `revision`, `token` and so on, for a LoRA on the Hub.

    Raises:
        SerialLoraError: If the LoRA cannot be read, holds what is not understood (without `keep_rest`), or has no part
            that the model's pairs can carry; nothing has changed then.

    Source: Eckart and Young for the closed form; the ridge is Tikhonov's.
    """
    _check_given(rank, ridge, keep_rest, plot)
    models, pipeline = components_of(model), model if is_pipeline(model) else None
    lora = read_lora(lora_source, models, weight_name, pipeline, **hub)
    work = _work_of(lora, models, inputs)
    _check_understood(lora, lora_source, models, keep_rest)
    _new_name(adapter_name, model, models, work)  # said before the minutes that it takes
    with reading(*models.values()):
        pairs, sites = _compress_all(track(work, f"Compressing to rank {rank}"), models, lora, rank, ridge)
    rest = _rest_of(lora, work)
    with ONE_VERB, nullcontext():
        plans = _plans(pairs, models, _new_name(adapter_name, model, models, work))
        files = [] if keep_rest is None else _write_rest(rest, lora, Path(keep_rest), models, pipeline)
        if plot is not None:
            plot_errors(sites, rank, Path(plot))
        report = _report(plans, sites, lora, rest, files)
        apply_plans(plans, weight=1.0)  # last, when nothing else can fail
    return report


def check_arguments(rank: int, ridge: float = RIDGE) -> None:
    """Raise SerialLoraError for a rank or a ridge that `compress_lora` would not take."""
    check_rank(rank, auto=False)
    if rank is None:
        raise SerialLoraError("rank must be a whole number of at least 1; got None.")
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < 1:
        raise SerialLoraError(f"ridge must lie between 0 and 1; got {ridge!r}.")


def _check_given(
    rank: int, ridge: float, keep_rest: str | os.PathLike[str] | None, plot: str | os.PathLike[str] | None
) -> None:
    check_arguments(rank, ridge)
    if keep_rest is not None:
        check_folder(keep_rest, "keep_rest")
    if plot is not None:
        check_folder(Path(plot).parent, "the folder of the plot")


@alone
def _new_name(given: str | None, model: Any, models: Mapping[str, nn.Module], work: Iterable[tuple[str, Slot]]) -> str:
    """The new adapter's name, checked to be free in every component that it goes into."""
    name = given or free_name(adapted(model, required=False))
    for component in dict.fromkeys(component for component, _ in work):
        check_new_name(registry_of(models[component], create=True), name)
    return name


def _plans(pairs: Products, models: Mapping[str, nn.Module], name: str) -> list[Plan]:
    """The compressed pairs of each component as an adapter, checked against its model."""
    return [plan_load(models[c], as_adapter(models[c], found), name) for c, found in pairs.items()]


def _work_of(lora: ReadLora, models: Mapping[str, nn.Module], inputs: Sequence[str] | None) -> list[tuple[str, Slot]]:
    """(component, slot) of all pairs that carry some of the LoRA."""
    work = [(c, slot) for c, parts in lora.parts.items() for slot in slots_with_parts(models[c], parts, inputs)]
    if not work:
        raise AdapterFileError(_nothing_message(models, lora, inputs))
    return work


def _compress_all(
    work: Iterable[tuple[str, Slot]], models: Mapping[str, nn.Module], lora: ReadLora, rank: int, ridge: float
) -> tuple[Products, list[SiteError]]:
    """The pairs of all slots, by component, and how far each is from the LoRA."""
    weights = {component: base_weights(models[component], "compress") for component in lora.parts}
    pairs: Products = {}
    sites = []
    for component, slot in work:
        pair, site = _compress(slot, weights[component](slot), lora.parts[component], rank, ridge)
        pairs.setdefault(component, {})[slot.key] = pair
        sites.append(replace(site, key=f"{component}.{slot.key}"))
    return pairs, sites


def _compress(slot: Slot, weights: Sequence[Tensor], parts: Mapping[str, Part], rank: int, ridge: float) -> Any:
    """The pair of one slot; at the LoRA's own rank where that is exact."""
    own = {p.name: parts[path] for p in slot.projections if (path := slot.called(p)) in parts}
    changes = {name: part.change() for name, part in own.items()}
    heights = sum(change.B.shape[0] for change in changes.values())
    exact = slot.pair.optional and heights <= slot.features and len(own) == len(slot.projections)
    plain = all(part.is_plain for part in own.values())
    return compress_slot(slot, weights, changes, None if exact and plain else rank, ridge)


def slots_with_parts(model: nn.Module, parts: Mapping[str, Part], inputs: Sequence[str] | None) -> list[Slot]:
    """The places of a model whose pairs can carry some of a LoRA's parts."""
    try:
        slots = find_slots(model)
    except SerialLoraError:
        return []  # a component that no record covers: what the LoRA has there is not carried
    names = {slot.pair.name for slot in slots}
    if inputs is not None and (unknown := sorted(set(inputs) - names)):
        raise SerialLoraError(f"inputs={list(inputs)} names {unknown}, but {type(model).__name__} has {sorted(names)}.")
    return [
        slot
        for slot in slots
        if (inputs is None or slot.pair.name in inputs) and any(slot.called(p) in parts for p in slot.projections)
    ]


def _rest_of(lora: ReadLora, work: Iterable[tuple[str, Slot]]) -> Products:
    """What no pair carries, by component, at the rank that it needs."""
    carried = {(component, slot.called(p)) for component, slot in work for p in slot.projections}
    rest: Products = {}
    for component, parts in lora.parts.items():
        for path, part in parts.items():
            if (component, path) not in carried:
                change = part.change()
                rest.setdefault(component, {})[path] = change if part.is_plain else change.thin()
    return rest


def _write_rest(
    rest: Products, lora: ReadLora, folder: Path, models: Mapping[str, nn.Module], pipeline: Any
) -> list[Path]:
    """Write what no pair carries as a LoRA, and what has no place here as it was."""
    files = []
    if rest:
        components = {c: {"base": describe_base(models[c]).to_json() if _has_slots(models[c]) else {}} for c in rest}
        origin = {"library_version": library_version(), "components": components}
        target = Target({c: models[c] for c in rest}, pipeline, origin)
        format = "diffusers" if unread_by_diffusers(target) == [] else "peft"
        files += write_lora(rest, folder, format, target, None, prefix=REST_PREFIX)
    left = [key for module in (*lora.elsewhere, *lora.unknown) for key in lora.tensors if _is_of(key, module.name)]
    if kept := {key: lora.tensors[key] for key in (*left, *lora.rest)}:
        write_safetensors(folder / KEPT_NAME, kept, {})
        files.append(folder / KEPT_NAME)
    return files


def _is_of(key: str, module: str) -> bool:
    return key.startswith(f"{module}.") or key.startswith(f"{module}_lora.")


def _has_slots(model: nn.Module) -> bool:
    try:
        return bool(find_slots(model))
    except SerialLoraError:
        return False


def _report(
    plans: Sequence[Plan], sites: list[SiteError], lora: ReadLora, rest: Products, files: list[Path]
) -> CompressReport:
    whole = sum(site.norm**2 for site in sites)
    lost = sum((site.relative_error * site.norm) ** 2 for site in sites)
    left = sum(part.norm() ** 2 for modules in rest.values() for part in modules.values())
    return CompressReport(
        plans[0].report.adapter_name,
        tuple(sites),
        (lost / whole) ** 0.5 if whole else 0.0,
        ((lost + left) / (whole + left)) ** 0.5 if whole + left else 0.0,
        tuple(f"{component}.{path}" for component, modules in rest.items() for path in modules),
        (*lora.rest, *(module.name for module in lora.unknown)),
        tuple(files),
        tuple(module.name for module in lora.elsewhere),
        sum(plan.report.parameters for plan in plans),
        sum(p.numel for c, parts in lora.parts.items() for path, p in parts.items() if path not in rest.get(c, {})),
        lora.kinds(),
    )


def _check_understood(
    lora: ReadLora, source: Any, models: Mapping[str, nn.Module], keep_rest: str | os.PathLike[str] | None
) -> None:
    """Raise AdapterFileError for a file that would be half read, unless the rest is kept."""
    unknown = [module.name for module in lora.unknown]
    if keep_rest is not None or (not unknown and not lora.rest):
        return
    kinds = ", ".join(dict.fromkeys(type(m).__name__ for c, m in models.items() if c in lora.parts))
    parts = [f"{len(lora.rest)} keys are not understood ({some(lora.rest)})"] if lora.rest else []
    parts += [f"{len(unknown)} modules are not in {kinds} ({some(unknown)})"] if unknown else []
    raise AdapterFileError(
        f"{name_of(source)} would be half read: {' and '.join(parts)}. Pass keep_rest=<folder> (--keep-rest) to keep "
        "them beside the result as they are, or check that the LoRA is for this base; its pipeline knows more names "
        "than a model alone."
    )


def _nothing_message(models: Mapping[str, nn.Module], lora: ReadLora, inputs: Sequence[str] | None) -> str:
    modules = [f"{c}.{path}" for c, found in lora.parts.items() for path in found]
    modules += [module.name for module in (*lora.elsewhere, *lora.unknown)]
    kinds = ", ".join(type(m).__name__ for m in models.values())
    chosen = f" with inputs={list(inputs)}" if inputs is not None else ""
    return (
        f"No pair of {kinds}{chosen} can carry any of the LoRA's {len(modules)} modules, such as {some(modules)}. "
        "Check that the LoRA is for this base."
    )
