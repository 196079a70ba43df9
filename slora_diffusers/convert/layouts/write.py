"""Write an ordinary LoRA as diffusers, PEFT and kohya-style tools read it.

Every scale is in the matrices already, so each format says alpha = rank: a factor of 1, which no loader applies twice.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.sites import unwrap
from ...errors import SerialLoraError
from ...files.storage import write_safetensors
from ..lowrank import LowRank, Products, below_each_other
from .names import Place, linears_of, original_names, original_of

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


# {LoRA loader of diffusers: {a second denoiser: what its call says}}, where one call reads `transformer.` alone.
_SECOND = {
    "WanLoraLoaderMixin": {"transformer_2": "load_into_transformer_2"},
    "SkyReelsV2LoraLoaderMixin": {"transformer_2": "load_into_transformer_2"},
}


@dataclass(frozen=True)
class Call:
    """One call of a loader, which reads one file.

    Args:
        components: What it loads into.
        suffix: End of the file's name, before `.safetensors`.
        prefixes: {component: what its keys begin with}, where that is not its name.
        argument: Keyword argument of `load_lora_weights` that the call needs.
    """

    components: tuple[str, ...]
    suffix: str = ""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    argument: str = ""


def calls_of(format: str, target: Target) -> list[Call]:
    """The loader calls that a LoRA in a format takes: a file that holds more than its loader reads would lose it."""
    if format == "kohya":  # ComfyUI's loader patches one denoiser and its text encoders
        others = [c for c, m in target.models.items() if original_of(m) is not None][1:]
        second = dict.fromkeys(others, "")
    else:
        second = {c: argument for c, argument in _second_of(target.pipeline).items() if c in target.models}
    first = tuple(c for c in target.models if c not in second)
    calls = [Call(first)] if first else []
    return calls + [Call((c,), f"_{c}", {c: "transformer"}, argument) for c, argument in second.items()]


def check_format(format: str, target: Target) -> None:
    """Raise SerialLoraError for a format that is unknown, or whose stock loader would leave a part out."""
    if format not in FORMATS:
        raise SerialLoraError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    if format == "kohya":
        unread = set(target.models)
        for call in calls_of(format, target):
            named = original_names({c: target.models[c] for c in call.components})
            unread -= {place.component for place in named.values()}
    elif format == "diffusers":
        # Where diffusers loads no LoRA at all, the file is still what other tools read; export_lora warns.
        loads = hasattr(target.pipeline, "_lora_loadable_modules")
        unread = unread_by_diffusers(target) if loads else [c for c in target.models if c == "model"]
    else:
        unread = []
    if unread:
        raise SerialLoraError(
            f"The stock loaders of format={format!r} do not read {sorted(unread)} here ({_kinds(target, unread)}). "
            "Export with format='peft', which PEFT loads into any model."
        )


def check_folder(path: str | os.PathLike[str], option: str) -> None:
    """Raise SerialLoraError unless a folder is there or can be made, before anything is computed for it."""
    place = next((part for part in (Path(path), *Path(path).parents) if part.exists()), None)
    if place is not None and not place.is_dir():
        raise SerialLoraError(f"{option} must be a folder; {place} is a file. Give another.")


def unread_by_diffusers(target: Target) -> list[str]:
    """The components that stock diffusers would load no LoRA into."""
    if target.pipeline is None:
        return [c for c, m in target.models.items() if not hasattr(unwrap(m), "load_lora_adapter")]
    known = {*getattr(target.pipeline, "_lora_loadable_modules", ()), *_second_of(target.pipeline)}
    return sorted(set(target.models) - known)


def _second_of(pipeline: Any) -> Mapping[str, str]:
    names = [c.__name__ for c in type(pipeline).__mro__]
    return next((second for name, second in _SECOND.items() if name in names), {})


def as_kohya(lora: Products, target: Target) -> Products:
    """{first component of a call: the LoRA under ComfyUI's names}; what is one Linear there is below each other."""
    renamed: Products = {}
    left = {(component, path) for component, modules in lora.items() for path in modules}
    for call in calls_of("kohya", target):
        own = renamed.setdefault(call.components[0], {})
        for name, place in original_names({c: target.models[c] for c in call.components}).items():
            modules = lora.get(place.component, {})
            if any(path in modules for path in place.paths):
                own[name] = _there(place, modules)
                left -= {(place.component, path) for path in place.paths}
    if left:
        raise SerialLoraError(
            f"ComfyUI and kohya's tools have no name for {', '.join(sorted(path for _, path in left)[:3])}. Export "
            "with format='diffusers' or format='peft'."
        )
    return renamed


def _there(place: Place, modules: Mapping[str, LowRank]) -> LowRank:
    """The change of an original module: its Linears' below each other, each with its rows as they are there."""
    parts, heights = [], []
    for path, rows in place.paths.items():
        part = modules.get(path)
        parts.append(None if part is None else LowRank(part.A, part.B[rows.argsort()]))
        heights.append(rows.numel())
    return below_each_other(parts, heights)


def write_lora(
    lora: Products, folder: Path, format: str, target: Target, weight_name: str | None, prefix: str = ""
) -> list[Path]:
    """Write a LoRA whose modules are named as the format wants them, a file for each call of its loader."""
    if format == "peft":
        bare = target.pipeline is None
        folders = {component: folder if bare else folder / component for component in lora}
        return [
            path
            for component, modules in lora.items()
            for path in _write_peft(modules, folders[component], component, target, weight_name)
        ]
    files = []
    for call in calls_of(format, target):
        metadata = {"serial_lora_export": json.dumps(target.origin)}
        if format == "kohya":
            tensors = _kohya_tensors(lora[call.components[0]])
        else:
            tensors, settings = _diffusers_tensors({c: lora[c] for c in call.components}, call, target)
            metadata["lora_adapter_metadata"] = json.dumps(settings, sort_keys=True)
        path = folder / _named(weight_name or prefix + DIFFUSERS_NAME, call)
        write_safetensors(path, tensors, metadata)
        files.append(path)
    return files


def how_to_load(format: str, target: Target, folder: Path, weight_name: str | None) -> tuple[str, ...]:
    """The calls that load what `write_lora` wrote, a line each."""
    if format == "peft":
        owner = "model" if target.pipeline is None else "pipe.{}"
        where = folder if target.pipeline is None else folder / "{}"
        line = f'PeftModel.from_pretrained({owner}, "{where}")'
        return tuple(line.format(component, component) for component in target.models)
    lines = []
    for call in calls_of(format, target):
        name = _named(weight_name or DIFFUSERS_NAME, call)
        if format == "kohya":
            lines.append(f"ComfyUI's LoraLoader: {folder / name}, for {', '.join(call.components)}")
        elif target.pipeline is None:
            lines.append(f'model.load_lora_adapter("{folder}", weight_name="{name}", prefix="{call.components[0]}")')
        else:
            more = f', weight_name="{name}"' if name != DIFFUSERS_NAME else ""
            more += f", {call.argument}=True" if call.argument else ""
            lines.append(f'pipe.load_lora_weights("{folder}"{more})')
    return tuple(lines)


def _named(name: str, call: Call) -> str:
    stem, dot, ending = name.rpartition(".")
    return f"{stem}{call.suffix}{dot}{ending}" if dot else f"{name}{call.suffix}"


def _diffusers_tensors(lora: Products, call: Call, target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, config = {}, {}
    for component, modules in lora.items():
        prefix = call.prefixes.get(component, component)
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in _tensors(modules).items()}
        settings = _peft_settings(modules, target.models.get(component))
        config |= {f"{prefix}.{key}": value for key, value in settings.items()}
    return tensors, config


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


def _kinds(target: Target, components: Iterable[str]) -> str:
    owner = type(target.pipeline).__name__ if target.pipeline is not None else "a bare model"
    return f"{owner}, {', '.join(type(target.models[c]).__name__ for c in sorted(components))}"
