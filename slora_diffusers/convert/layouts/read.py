"""Read a LoRA of any layout and kind, for the models at hand: what changes which of their modules, and what is left."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...adapters.fuse import peek_weight
from ...config import is_number
from ...core.patterns import check_number
from ...core.sites import Projection
from ...errors import AdapterFileError, AdapterStateError, SerialLoraError
from ...files.storage import check_finite, find_file, unreadable
from ..lowrank import LowRank
from .kinds import Settings, change_of, needs_weight, no_change, obstacle, settings_of, shape_of
from .names import Place, linears_of, places_of, weight_of
from .parts import Module, Parts, sort_keys
from .spellings import find_place, is_of_another_component
from .stock import stock_places
from .write import DIFFUSERS_NAME, PEFT_CONFIG, PEFT_NAME


@dataclass(frozen=True)
class Part:
    """What a LoRA changes of one Linear: some rows of one of its modules.

    Args:
        module: The module in the file.
        settings: Its PEFT settings.
        place: Where the whole module belongs.
        path: The Linear.
        models: The models that the LoRA is for.
    """

    module: Module
    settings: Settings
    place: Place
    path: str
    models: Mapping[str, nn.Module] = field(repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether it is an ordinary LoRA, whose rank is its own."""
        return self.module.label == "LoRA"

    @property
    def numel(self) -> int:
        """Number of parameters, as those of an ordinary LoRA on this Linear alone."""
        numel = {part: tensor.numel() for part, tensor in self.module.tensors.items()}
        rows, height = self.place.paths[self.path].numel(), self.place.height
        if "up" in numel:
            return numel["down"] + numel["up"] * rows // height
        return sum(numel.values()) * rows // height

    def change(self) -> LowRank:
        """dW of the Linear, (out, in) or as the weight of a convolution."""
        model = self.models[self.place.component]
        W = _weight(model, self.place) if needs_weight(self.module) else None
        dW = change_of(self.module, self.settings, W)
        if dW.B.shape[0] != self.place.height:
            raise AdapterFileError(_misfit(self.module, self.place, dW.B.shape[0]))
        check_finite({f"{self.module.name} times its scale": matrix for matrix in (dW.A, dW.B)})
        A, shape = dW.A, weight_of(linears_of(model)[self.path]).shape[1:]
        if len(shape) > 1 and A.ndim == 2 and shape.numel() == A.shape[1]:
            A = A.reshape(-1, *shape)
        return LowRank(A, dW.B[self.place.paths[self.path]])


@dataclass
class ReadLora:
    """A LoRA sorted by what it sits on.

    Args:
        parts: {component: {path of a Linear: its change}}.
        elsewhere: Modules of components that are not among the models.
        unknown: Modules whose name no Linear of the models has.
        rest: Keys that are not part of any module.
        tensors: The file as it is, for keeping what is left.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    elsewhere: list[Module] = field(default_factory=list)
    unknown: list[Module] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """{kind in words: number of modules}."""
        modules = {p.module.name: p.module for parts in self.parts.values() for p in parts.values()}
        labels = [module.label for module in (*modules.values(), *self.elsewhere, *self.unknown)]
        return {label: labels.count(label) for label in dict.fromkeys(labels)}


def read_lora(
    source: Any, models: Mapping[str, nn.Module], weight_name: str | None = None, pipeline: Any = None, **hub: Any
) -> ReadLora:
    """Read a LoRA from a file, a folder, a Hub id or a state dict, for these models.

    Where a module belongs, the pipeline's own converter says first, and the names that are known here else.

    Args:
        source: Path, Hub id, or {key: tensor}.
        models: {component: model} that it is for.
        weight_name: Name of the file in a folder or repository; by default the usual ones are tried.
        pipeline: The pipeline that the models are of, if there is one.
        **hub: `revision`, `token` and so on, as for `hf_hub_download`.

    Raises:
        AdapterFileError: If there is no such file, it holds no LoRA, or one for another model.
    """
    tensors, settings = open_lora(source, weight_name, **hub)
    if reason := next(filter(None, map(obstacle, settings.values())), None):
        raise AdapterFileError(f"{name_of(source)} cannot be read as a LoRA: {reason}.")
    parts = sort_lora(tensors, source)
    if not any(settings.values()) and any(map(_lacks_alpha, parts.modules.values())):
        warnings.warn(
            f"{name_of(source)} is of PEFT and has no {PEFT_CONFIG} beside it, which would say its alpha: it is taken "
            "to be the rank, so that every change counts once.",
            stacklevel=3,
        )
    read = ReadLora(tensors, rest=parts.rest)
    own = places_of(models)
    stock = stock_places(parts.modules.values(), pipeline, models, own)
    for module in parts.modules.values():
        place = stock.get(module.name) or find_place(module.name, own)
        if place is not None:
            _check_fit(module, place, models)
            for path in place.paths:
                part = Part(module, settings_of(module.name, settings), place, path, models)
                if path in read.parts.setdefault(place.component, {}):
                    raise AdapterFileError(f"{name_of(source)} changes {place.component}.{path} twice; it is damaged.")
                read.parts[place.component][path] = part
        elif is_of_another_component(module.name, models):
            read.elsewhere.append(module)
        else:
            read.unknown.append(module)
    return read


def _lacks_alpha(module: Module) -> bool:
    """Whether a module's alpha was in a config that is not here."""
    return module.name.startswith("base_model.model.") and module.alpha is None and module.kind != "diff"


def sort_lora(tensors: Mapping[str, Any], source: Any) -> Parts:
    """A file's modules, checked.

    Raises:
        AdapterFileError: If it holds none, a Serial LoRA, or what is not finite.
    """
    if any(".serial_lora." in key for key in tensors):
        raise AdapterFileError(
            f"{name_of(source)} is a Serial LoRA already: load it with load_serial_lora(), or write the LoRA that it "
            "equals with export_lora()."
        )
    parts = sort_keys(tensors)
    if not parts.modules:
        raise AdapterFileError(
            f"{name_of(source)} holds no LoRA: no keys such as '<module>.lora_A.weight' and '.lora_B.weight', or "
            f"'.lora_down.weight' and '.lora_up.weight'; found {some(parts.rest) or 'no key at all'}."
        )
    for module in parts.modules.values():
        for part, tensor in module.tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                check_finite({module.keys[part]: tensor})  # says what it is instead
            check_finite({module.keys[part]: tensor.float()})  # float8 has no arithmetic of its own
        try:
            shape_of(module)
        except (RuntimeError, IndexError) as error:
            raise no_change(module) from error
    return parts


def open_lora(
    source: Any, weight_name: str | None = None, **hub: Any
) -> tuple[Mapping[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of a file, and {component, or "" for all: fields of its LoraConfig}."""
    if isinstance(source, Mapping):
        return source, {}
    path = find_lora(source, weight_name, **hub)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = _beside(path, source, hub)
        own = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
        settings = _settings(json.loads(header.get("lora_adapter_metadata", "{}")), own)
    except SafetensorError as error:
        raise unreadable(path, error) from error
    except (SerialLoraError, OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a readable LoRA: {error}.") from error
    if network := header.get("ss_network_module"):
        settings.setdefault("", {"network_module": network})
    return tensors, settings


def find_lora(source: str | os.PathLike[str], weight_name: str | None = None, **hub: Any) -> Path:
    """The local path of a LoRA's file."""
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


def name_of(source: Any) -> str:
    """What a message calls a source."""
    return "The state dict" if isinstance(source, Mapping) else str(source)


def some(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _settings(metadata: Any, config: Any) -> dict[str, dict[str, Any]]:
    """{component: settings} of diffusers' metadata, {"": settings} of PEFT's own file; checked to be of their types."""
    if not isinstance(metadata, dict) or not isinstance(config, dict):
        raise ValueError("its settings are not a JSON object")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        component, _, name = key.partition(".")
        settings.setdefault(component, {})[name] = value
    if config:
        settings[""] = config
    for own in settings.values():
        numbers = [own.get("r"), own.get("lora_alpha"), own.get("alpha")]
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = own.get(name) or {}
            if not isinstance(pattern, dict):
                raise ValueError(f"its {name} is not a JSON object")
            check_number(pattern, f"its {name}")
            numbers += pattern.values()
        if not all(n is None or is_number(n) for n in numbers):
            raise ValueError("its ranks and alphas are not all finite numbers")
    return settings


def _beside(path: Path, source: Any, hub: dict[str, Any]) -> Path | None:
    """The PEFT config in the folder or repository of the weights, if there is one."""
    if path.name == DIFFUSERS_NAME:
        return None
    if (path.parent / PEFT_CONFIG).is_file():
        return path.parent / PEFT_CONFIG
    if Path(source).exists() or path.name != PEFT_NAME:
        return None
    return find_file(source, weight_name=PEFT_CONFIG, **hub)


def _check_fit(module: Module, place: Place, models: Mapping[str, nn.Module]) -> None:
    """Raise AdapterFileError if a module's matrices are of another size than its place."""
    shape = shape_of(module)
    if shape is None:
        return
    if shape[0] != place.height:
        raise AdapterFileError(_misfit(module, place, shape[0]))
    weight = weight_of(linears_of(models[place.component])[next(iter(place.paths))])
    sizes = {weight.shape[1], weight.shape[1:].numel()} if weight.is_floating_point() else {shape[1]}
    if shape[1] and shape[1] not in sizes:
        raise AdapterFileError(
            f"{module.name} reads {shape[1]} features, but {some(list(place.paths))} of the model {weight.shape[1]}: "
            "the LoRA is for another model."
        )


def _misfit(module: Module, place: Place, height: int) -> str:
    return (
        f"{module.name} gives {height} features, but {', '.join(place.paths)} of the model {place.height}: the LoRA is "
        "for another model."
    )


def _weight(model: nn.Module, place: Place) -> Tensor:
    """The base's weight of a module, fused or not, its Linears' rows where the module has them."""
    peek, linears = peek_weight(model), linears_of(model)
    W: Tensor | None = None
    for path, rows in place.paths.items():
        own = peek(Projection(path, linears[path], "weight"))
        if own is None or own.is_meta or not own.is_floating_point() or own.element_size() < 2:
            raise AdapterStateError(
                f"The change of {place.component}.{path} depends on the base's weight, which is quantized or not in "
                "memory. Load the base unquantized, and without offloading."
            )
        W = own.new_empty(place.height, *own.shape[1:], dtype=torch.float32) if W is None else W
        W[rows.to(own.device)] = own.float()
    assert W is not None
    return W
