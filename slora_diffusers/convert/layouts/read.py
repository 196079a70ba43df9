"""Read an ordinary LoRA of any common layout: diffusers, PEFT, kohya, and the original models' names."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import AdapterFileError, SerialLoraError
from ...files.format import check_finite, find_file
from ..lowrank import LowRank, Products
from .names import kohya_names, linears_of, out_features
from .write import DIFFUSERS_NAME, PEFT_CONFIG, PEFT_NAME

_DOWN = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down"
_UP = r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
_KEY = re.compile(rf"(?P<module>.+?)\.(?:(?P<A>{_DOWN})|(?P<B>{_UP}))(?:\.(?!weight|bias)\w+)?\.weight")
_OTHER_ADAPTERS = ("lora_magnitude_vector", "dora_scale", "hada_w", "lokr_w", "oft_")
_PREFIXES = ("base_model.model.", "diffusion_model.", "model.diffusion_model.")


@dataclass
class ReadLora:
    """A LoRA sorted by what it sits on.

    Args:
        modules: {component: {path of a module of the model: its dW, the scale in B}}.
        unknown: {name in the file: its dW} of what the model has no module for.
        ignored: Keys that are neither A, B nor alpha of a LoRA (biases, differences of norms).
    """

    modules: Products = field(default_factory=dict)
    unknown: dict[str, LowRank] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def read_lora(source: Any, models: Mapping[str, nn.Module], weight_name: str | None = None, **hub: Any) -> ReadLora:
    """Read a LoRA from a file, a folder, a Hub id or a state dict, for these models.

    Args:
        source: Path, Hub id, or {key: tensor}.
        models: {component: model} that it is for.
        weight_name: Name of the file in a folder or repository; by default the usual ones are tried.
        **hub: `revision`, `token` and so on, as for `hf_hub_download`.

    Raises:
        AdapterFileError: If there is no such file, it holds no LoRA, or an adapter of another kind.
    """
    tensors, settings = _read(source, weight_name, hub)
    if other := next((key for key in tensors for kind in _OTHER_ADAPTERS if kind in key), None):
        raise AdapterFileError(
            f"{_name(source)} is not a plain LoRA (it has {other!r}): DoRA, LoHa, LoKr and OFT are no low-rank sums."
        )
    if any(".serial_lora." in key for key in tensors):
        raise AdapterFileError(
            f"{_name(source)} is a Serial LoRA already: load it with load_serial_lora(), or write the LoRA that it "
            "equals with export_lora()."
        )
    read, parts, alphas = ReadLora(), {}, {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            parts.setdefault(match["module"], {})["A" if match["A"] else "B"] = tensor
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            read.ignored.append(key)
    whole = {name: both for name, both in parts.items() if len(both) == 2}
    read.ignored += [name for name in parts if name not in whole]
    if not whole:
        shown = ", ".join(list(tensors)[:3]) or "no key at all"
        raise AdapterFileError(
            f"{_name(source)} holds no LoRA: no keys such as '<module>.lora_A.weight' and '.lora_B.weight', or "
            f"'.lora_down.weight' and '.lora_up.weight'; found {shown}."
        )
    check_finite({f"{name}.{part}": t for name, both in whole.items() for part, t in both.items()})
    places = _places(models)
    for name, both in whole.items():
        scale = _scale(name, both["A"].shape[0], alphas, settings)
        _place(read, name, LowRank(both["A"].float(), both["B"].float() * scale), models, places)
    return read


def _place(
    read: ReadLora,
    name: str,
    part: LowRank,
    models: Mapping[str, nn.Module],
    places: Mapping[str, tuple[str, tuple[str, ...]]],
) -> None:
    plain = name
    for prefix in _PREFIXES:
        plain = plain.removeprefix(prefix)
    found = next((places[n] for n in (name, plain, f"lora_unet_{plain.replace('.', '_')}") if n in places), None)
    if found is None:
        read.unknown[name] = part
        return
    component, paths = found
    linears = linears_of(models[component])
    heights = [out_features(linears[path]) for path in paths]
    if part.B.shape[0] != sum(heights):
        raise AdapterFileError(
            f"{name} gives {part.B.shape[0]} features, but {', '.join(paths)} of the model {sum(heights)}: the LoRA is "
            "for another model."
        )
    for path, B in zip(paths, part.B.split(heights), strict=True):
        read.modules.setdefault(component, {})[path] = LowRank(part.A, B)


def _places(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{name in a file: (component, paths)} under every name that a module of ours goes by."""
    places: dict[str, tuple[str, tuple[str, ...]]] = {}
    for component, model in reversed(list(models.items())):  # of two that share a name without prefix, the first counts
        for path in linears_of(model):
            older = {path, path.removeprefix("text_model."), f"text_model.{path}"}  # transformers 4 and 5
            for name in older:
                place = component, (path,)
                places[f"{component}.{name}"] = places[name] = place
                places[f"lora_{component}_{name.replace('.', '_')}"] = place
            if component in ("transformer", "model"):
                places[f"lora_unet_{path.replace('.', '_')}"] = place
    with contextlib.suppress(SerialLoraError):  # no other names are known for these models
        places |= kohya_names(models)
    return places


def _scale(name: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """alpha / r: alpha from the file's own key for the module, or from the settings, else r."""
    if name in alphas:
        return alphas[name] / rank
    plain = name.removeprefix("base_model.model.")
    component = next((c for c in settings if c and plain.startswith(f"{c}.")), "")
    if component not in settings:
        return 1.0
    own, path = settings[component], plain.removeprefix(f"{component}.")
    alpha = own.get("lora_alpha") or rank
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):  # as PEFT matches them
            alpha = value
            break
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _read(
    source: Any, weight_name: str | None, hub: dict[str, Any]
) -> tuple[Mapping[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors, and {component, or "" for all: fields of its LoraConfig}."""
    if isinstance(source, Mapping):
        return source, {}
    path = _find(source, weight_name, hub)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        settings: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(header.get("lora_adapter_metadata", "{}")).items():
            component, _, name = key.partition(".")
            settings.setdefault(component, {})[name] = value
        config = _beside(path, source, hub)
        if config is not None:
            settings[""] = json.loads(config.read_text(encoding="utf-8"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path} is not a readable LoRA: {error}.") from error
    if settings.get("", {}).get("use_dora"):
        raise AdapterFileError(f"{path} is a DoRA, which also rescales weights: it is no low-rank sum.")
    return tensors, settings


def _find(source: str | os.PathLike[str], weight_name: str | None, hub: dict[str, Any]) -> Path:
    names = [weight_name] if weight_name else [PEFT_NAME, DIFFUSERS_NAME]
    folder = Path(source)
    if folder.is_dir() and weight_name is None and not any((folder / name).is_file() for name in names):
        there = sorted(folder.glob("*.safetensors"))
        if len(there) == 1:
            return there[0]
    for name in names[:-1]:
        try:
            return find_file(source, weight_name=name, **hub)
        except AdapterFileError:
            continue
    return find_file(source, weight_name=names[-1], **hub)


def _beside(path: Path, source: Any, hub: dict[str, Any]) -> Path | None:
    """The PEFT config in the folder or repository of the weights, if there is one."""
    if path.name == DIFFUSERS_NAME:
        return None
    if (path.parent / PEFT_CONFIG).is_file():
        return path.parent / PEFT_CONFIG
    if Path(source).exists() or path.name != PEFT_NAME:
        return None
    return find_file(source, weight_name=PEFT_CONFIG, **hub)


def _name(source: Any) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)
