"""Write an ordinary LoRA as diffusers, PEFT and kohya-style tools read it.

Every scale is in the matrices already, so each format says alpha = rank: a factor of 1, which no loader applies twice.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.sites import unwrap
from ...errors import SerialLoraError
from ...files.storage import write_safetensors
from ..lowrank import LowRank, Products, below_each_other
from .names import linears_of, original_names

FORMATS = ("diffusers", "peft", "kohya")
DIFFUSERS_NAME, PEFT_NAME = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Target:
    """Where a LoRA goes: the models by component, whether they are a pipeline's, and what to say of them.

    Args:
        models: {component: model}.
        pipeline: The pipeline, or None for a bare model.
        origin: JSON of where the LoRA comes from, by component.
    """

    models: Mapping[str, nn.Module]
    pipeline: Any
    origin: dict[str, Any]


def check_format(format: str, target: Target) -> None:
    """Raise SerialLoraError for a format that is unknown, or whose stock loader would leave a part out."""
    if format not in FORMATS:
        raise SerialLoraError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    if format == "kohya":
        known = {place.component for place in original_names(target.models).values()}
        unread = sorted(set(target.models) - known)
    elif format == "diffusers":
        # Where diffusers loads no LoRA at all, the file is still what other tools read; export_lora warns.
        loads = hasattr(target.pipeline, "_lora_loadable_modules")
        unread = unread_by_diffusers(target) if loads else [c for c in target.models if c == "model"]
    else:
        unread = []
    if unread:
        raise SerialLoraError(
            f"The stock loaders of format={format!r} do not read {unread} here ({_kinds(target, unread)}). Export with "
            "format='peft', which PEFT loads into any model."
        )


def unread_by_diffusers(target: Target) -> list[str]:
    """The components that stock diffusers would load no LoRA into."""
    if target.pipeline is None:
        return [c for c, m in target.models.items() if not hasattr(unwrap(m), "load_lora_adapter")]
    return sorted(set(target.models) - set(getattr(target.pipeline, "_lora_loadable_modules", ())))


def as_kohya(lora: Products, target: Target) -> Products:
    """The LoRA under ComfyUI's names, with the projections that are one Linear there below each other."""
    renamed: dict[str, LowRank] = {}
    left = {(component, path) for component, modules in lora.items() for path in modules}
    for name, place in original_names(target.models).items():
        own = lora.get(place.component, {})
        if not any(path in own for path in place.paths):
            continue
        if len(place.paths) == 1:
            ((path, rows),) = place.paths.items()
            renamed[name] = LowRank(own[path].A, own[path].B[rows.argsort()])
        else:
            parts = [own.get(path) for path in place.paths]
            renamed[name] = below_each_other(parts, [rows.numel() for rows in place.paths.values()])
        left -= {(place.component, path) for path in place.paths}
    if left:
        raise SerialLoraError(
            f"ComfyUI and kohya's tools have no name for {', '.join(sorted(path for _, path in left)[:3])}. Export "
            "with format='diffusers' or format='peft'."
        )
    return {"": renamed}


def write_lora(
    lora: Products, folder: Path, format: str, target: Target, weight_name: str | None, prefix: str = ""
) -> list[Path]:
    """Write a LoRA whose modules are named as the format wants them; gives the files."""
    if format == "peft":
        bare = target.pipeline is None
        folders = {component: folder if bare else folder / component for component in lora}
        return [
            path
            for component, modules in lora.items()
            for path in _write_peft(modules, folders[component], component, target, weight_name)
        ]
    metadata = {"serial_lora_export": json.dumps(target.origin)}
    name = weight_name or prefix + DIFFUSERS_NAME
    if format == "kohya":
        path = folder / name
        write_safetensors(path, _kohya_tensors(lora[""]), metadata)
        return [path]
    tensors, config = {}, {}
    for component, modules in lora.items():
        tensors |= {f"{component}.{key}": tensor for key, tensor in _tensors(modules).items()}
        settings = _peft_settings(modules, target.models.get(component))
        config |= {f"{component}.{key}": value for key, value in settings.items()}
    metadata["lora_adapter_metadata"] = json.dumps(config, sort_keys=True)
    write_safetensors(folder / name, tensors, metadata)
    return [folder / name]


def _tensors(modules: Mapping[str, LowRank], prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for path, part in modules.items():
        tensors[f"{prefix}{path}.lora_A.weight"] = part.A.clone()  # a file holds no tensor twice
        tensors[f"{prefix}{path}.lora_B.weight"] = part.B.clone()
    return tensors


def _kohya_tensors(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for name, part in modules.items():
        tensors[f"{name}.lora_down.weight"] = part.A.clone()
        tensors[f"{name}.lora_up.weight"] = part.B.clone()
        tensors[f"{name}.alpha"] = torch.tensor(float(part.rank))
    return tensors


def _write_peft(
    modules: Mapping[str, LowRank], folder: Path, component: str, target: Target, weight_name: str | None
) -> list[Path]:
    origin = target.origin["components"].get(component, {})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": origin.get("base", {}).get("name"),
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        **_peft_settings(modules, target.models.get(component)),
    }
    path = folder / (weight_name or PEFT_NAME)
    write_safetensors(path, _tensors(modules, "base_model.model."), {"serial_lora_export": json.dumps(target.origin)})
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [path, folder / PEFT_CONFIG]


def _peft_settings(modules: Mapping[str, LowRank], model: nn.Module | None) -> dict[str, Any]:
    """The fields of a LoraConfig that say which modules, and of what rank."""
    ranks = {path: part.rank for path, part in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT matches the ends of names; `^` holds a pattern to one module.
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "target_modules": _targets(list(modules), model),
    }


def _targets(paths: list[str], model: nn.Module | None) -> list[str] | str:
    """The modules as a list, or as one expression where an end of another module's name would match too."""
    every = linears_of(model) if model is not None else {}
    ambiguous = any(other.endswith(f".{path}") for path in paths for other in every)
    return "|".join(re.escape(path) for path in paths) if ambiguous else paths


def _kinds(target: Target, components: list[str]) -> str:
    owner = type(target.pipeline).__name__ if target.pipeline is not None else "a bare model"
    return f"{owner}, {', '.join(type(target.models[c]).__name__ for c in components)}"
