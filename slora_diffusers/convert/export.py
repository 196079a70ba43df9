"""Export an adapter as the ordinary LoRA that it equals: `lora_A = A`, `lora_B_m = s W_m B` for each projection m."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.fuse import base_weights
from ..core.change import reading
from ..core.components import adapted, is_pipeline, per_component
from ..core.layer import SerialLoraPair
from ..core.offload import Storage
from ..core.sites import Slot, find_slots, unwrap
from ..core.state import Weights, check_weights, modules_of, names_with_weights, pairs_of, registry_of, weight_at
from ..core.tensors import check_dtype
from ..errors import AdapterStateError, SerialLoraError
from ..files.fingerprint import describe_base
from ..files.format import library_version
from .layouts.write import Target, as_kohya, check_folder, check_format, how_to_load, unread_by_diffusers, write_lora
from .lowrank import LowRank, Products, Sized, Track, check_rank, silently, sizes, truncate

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What storing in a dtype loses of a matrix anyway, relatively."""

_OUT = ".base_layer.out_proj"


@dataclass(frozen=True, kw_only=True)
class ExportReport(Sized):
    """What `export_lora` wrote.

    Args:
        files: The files.
        format: "diffusers", "peft" or "kohya".
        adapters: {component: {adapter: weight}}.
        modules: Number of modules that the LoRA sits on.
        load: The calls that load it, one for each file.
    """

    files: tuple[Path, ...]
    format: str
    adapters: dict[str, dict[str, Weights]]
    modules: int
    load: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.format} LoRA on {self.modules} modules: {self.size()}"


def export_lora(
    model_or_pipe: Any,
    save_directory: str | os.PathLike[str],
    adapter_names: str | Sequence[str] | None = None,
    format: str = "diffusers",
    *,
    weights: Weights | Sequence[Weights] | None = None,
    rank: int | str | None = None,
    dtype: torch.dtype | None = None,
    weight_name: str | None = None,
    track: Track = silently,
) -> ExportReport:
    """Write the ordinary LoRA that equals the adapters: `dW_m = (s W_m B) A` for each projection m of a pair.

    It holds for this base alone, whose name and fingerprint go into the file. It is made from the base's own weights
    also while adapters are fused. Several adapters become one LoRA of the summed rank, with their weights in it.

    Args:
        model_or_pipe: A model with adapters, or a pipeline with such components.
        save_directory: Folder; made if it is not there.
        adapter_names: Which adapters; `None` takes the active ones, or those that are fused, with their weights.
        format: "diffusers" (`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights`, and another file
            for what takes a call of its own, such as Wan 2.2's second transformer), "peft"
            (`adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`; a folder for each
            component of a pipeline), or "kohya" (the original module names, for ComfyUI and sd-scripts).
        weights: One weight for all named adapters, or one for each, as `set_serial_lora` takes them; `None` keeps those
            that are set, else 1.
        rank: Truncate every module to this rank by SVD; "auto" takes the least rank of each that loses no more than
            `dtype` rounds away; `None` is exact. The report has the error.
        dtype: Dtype to store; `None` is fp32.
        weight_name: Name of the file, instead of the format's own.
        track: Goes through the pairs, showing progress.

    Returns:
        Files, ranks, parameters, and the error of the truncation.

    Raises:
        SerialLoraError: If there is nothing to export, the format does not reach a part of it, or a base weight is
            quantized or offloaded; nothing is written then.
    """
    check_rank(rank)
    check_dtype(dtype)
    check_folder(save_directory, "save_directory")
    models, pipeline = adapted(model_or_pipe, required=False), model_or_pipe if is_pipeline(model_or_pipe) else None
    chosen = _chosen(model_or_pipe, models, adapter_names, weights)
    models = {component: models[component] for component in chosen}
    _check_no_modules(models, chosen)
    target = _target_of(format, models, pipeline, chosen)
    with reading(*models.values()):
        lora: Products = {c: equivalent_lora(model, chosen[c], format, track) for c, model in models.items()}
    lora = as_kohya(lora, target) if format == "kohya" else lora
    lora, error, errors = truncate(lora, rank, track, ROUNDING.get(dtype or torch.float32, 1e-6))
    lora = _storable(lora, dtype)
    files = write_lora(lora, Path(save_directory), format, target, weight_name)
    load = how_to_load(format, target, Path(save_directory), weight_name)
    parts = [part for modules in lora.values() for part in modules.values()]
    return ExportReport(
        files=tuple(files), format=format, adapters=chosen, modules=len(parts), load=load, **sizes(parts, error, errors)
    )


def _target_of(
    format: str, models: Mapping[str, nn.Module], pipeline: Any, chosen: Mapping[str, dict[str, Weights]]
) -> Target:
    """Where the LoRA goes: the format reaches it, and what no loader reads there is warned of."""
    target = Target(models, pipeline, _origin(models, chosen))
    check_format(format, target)
    _warn_of_no_loader(format, target)
    return target


def _check_no_modules(models: Mapping[str, nn.Module], chosen: Mapping[str, Iterable[str]]) -> None:
    for component, names in chosen.items():
        if whole := sorted({path for name in names for path in modules_of(models[component]).get(name, [])}):
            raise SerialLoraError(
                f"No LoRA can hold the modules that the adapter brings whole (modules_to_save): {', '.join(whole)} of "
                f"{component}. Fuse it and save the model, or pass the adapter's own file on (save_serial_lora)."
            )


def _storable(lora: Products, dtype: torch.dtype | None) -> Products:
    """The products as loaders take them, in a dtype.

    Raises:
        AdapterStateError: If one is not finite there.
    """
    _follow_attention(lora)
    if dtype is not None:
        lora = {c: {path: part.to(dtype) for path, part in modules.items()} for c, modules in lora.items()}
    _check_finite(lora)
    return lora


def _follow_attention(lora: Products) -> None:
    """PEFT wants one rank for both parts of nn.MultiheadAttention; the output's is zero, of any rank."""
    for modules in lora.values():
        for path in [path for path in modules if f"{path}{_OUT}" in modules]:
            A, B, r = modules[f"{path}{_OUT}"].A, modules[f"{path}{_OUT}"].B, modules[path].rank
            modules[f"{path}{_OUT}"] = LowRank(A.new_zeros(r, A.shape[1]), B.new_zeros(B.shape[0], r))


def _origin(models: Mapping[str, nn.Module], chosen: Mapping[str, Mapping[str, Weights]]) -> dict[str, Any]:
    adapters = {component: {name: _plain(w) for name, w in names.items()} for component, names in chosen.items()}
    components = {c: {"base": describe_base(model).to_json(), "adapters": adapters[c]} for c, model in models.items()}
    return {"library_version": library_version(), "components": components}


def equivalent_lora(
    model: nn.Module, weights: Mapping[str, Weights], format: str = "diffusers", track: Track = silently
) -> dict[str, LowRank]:
    """{path of a module: dW} such that the base with these equals the model with adapters of these weights."""
    pairs, storage, base = pairs_of(model), Storage(unwrap(model)), base_weights(model, "export")
    found: dict[str, LowRank] = {}
    for slot in track([s for s in find_slots(model) if s.key in pairs], "Multiplying with the base's weights"):
        pair = pairs[slot.key]
        names = [name for name in sorted(weights) if name in pair.scaling]
        gains = {name: weight_at(slot.path, weights[name]) * pair.scaling[name] for name in names}
        gains = {name: gain for name, gain in gains.items() if gain}
        if gains:
            found |= _slot_lora(slot, pair, base(slot), gains, storage, format)
    if not found:
        raise AdapterStateError(f"The adapters {sorted(weights)} have no effect: every weight is 0.")
    return found


def _slot_lora(
    slot: Slot,
    pair: SerialLoraPair,
    base: Sequence[torch.Tensor],
    gains: dict[str, float],
    storage: Storage,
    format: str,
) -> dict[str, LowRank]:
    A: torch.Tensor | None = None  # one for all projections of the pair
    found = {}
    for projection, W in zip(slot.projections, base, strict=True):
        own_A, W_B = pair.as_lora(W, gains, storage)
        A = own_A if A is None else A
        path = slot.called(projection)
        if projection.attribute == "weight":
            found[path] = LowRank(A, W_B)
            continue
        if projection.attribute != "in_proj_weight" or format != "peft":
            raise SerialLoraError(
                f"{path} is a bare parameter, on which a LoRA of format={format!r} cannot sit. "
                + ("Export with format='peft', or fuse" if projection.attribute == "in_proj_weight" else "Fuse")
                + " the adapter: fuse_serial_lora(model)."
            )
        # PEFT adapts nn.MultiheadAttention as a whole: in_proj_weight, and the output projection, which stays.
        found[slot.path] = LowRank(A, W_B)
        zeros = LowRank(A.new_zeros(A.shape[0], slot.features), A.new_zeros(slot.features, A.shape[0]))
        found[f"{slot.path}{_OUT}"] = zeros
    return found


def _chosen(
    model_or_pipe: Any,
    models: Mapping[str, nn.Module],
    adapter_names: str | Sequence[str] | None,
    weights: Weights | Sequence[Weights] | None,
) -> dict[str, dict[str, Weights]]:
    """{component: {adapter: weight}}, without components that have none of the adapters."""
    registries = {component: registry_of(model) for component, model in models.items()}
    if adapter_names is None:
        if weights is not None:
            raise SerialLoraError("weights go with adapter_names; without names, the weights that are set count.")
        chosen: dict[str, dict[str, Weights]] = {}
        for component, registry in registries.items():
            fused = registry.fused
            active = registry.active if fused is None else {n: _times(w, fused.scale) for n, w in fused.weights.items()}
            chosen[component] = dict(active)
    else:
        named = names_with_weights(adapter_names, weights)
        known = {name for registry in registries.values() for name in registry.configs}
        if unknown := sorted(set(named) - known):
            raise AdapterStateError(f"Unknown adapter {unknown}; there are {sorted(known)}.")
        parts = {name: {c: models[c] for c, r in registries.items() if name in r.configs} for name in named}
        given = {name: per_component(weight, parts[name]) for name, weight in named.items()}
        chosen = {
            component: {
                name: registry.active.get(name, 1.0) if weights is None else given[name][component]
                for name in named
                if name in registry.configs
            }
            for component, registry in registries.items()
        }
        if weights is not None:
            for component, each in chosen.items():
                check_weights(models[component], each)
    chosen = {component: names for component, names in chosen.items() if names}
    if not chosen:
        raise AdapterStateError(
            f"{type(model_or_pipe).__name__} has no active adapter to export. Load one with load_serial_lora(), or "
            "name those to export with adapter_names."
        )
    return chosen


def _times(weight: Weights, scale: float) -> Weights:
    if not isinstance(weight, Mapping):
        return weight * scale
    return {**{pattern: w * scale for pattern, w in weight.items()}, ".*": scale}  # what nothing matches has 1


def _plain(weight: Weights) -> Any:
    return dict(weight) if isinstance(weight, Mapping) else weight


def _check_finite(lora: Products) -> None:
    for modules in lora.values():
        for path, part in modules.items():
            if not (torch.isfinite(part.A).all() and torch.isfinite(part.B).all()):
                raise SerialLoraError(
                    f"The LoRA of {path} would hold NaN or infinity: the adapter or the base does, or the product "
                    f"overflows {part.B.dtype}. Nothing was written; export with dtype=torch.float32."
                )


def _warn_of_no_loader(format: str, target: Target) -> None:
    without = [type(unwrap(target.models[component])).__name__ for component in unread_by_diffusers(target)]
    if format == "diffusers" and without:
        warnings.warn(
            f"diffusers has no LoRA loader for {', '.join(without)}: format='peft' is what stock PEFT loads into it.",
            stacklevel=4,
        )
