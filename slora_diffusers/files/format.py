"""The file of an adapter, typed: what is in it, and the one place that reads and writes its header's JSON.

docs/format.md specifies it. `storage.py` knows where the bytes are; this module knows what they mean.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SerialLoraConfig
from ..core.names import split_matrix, split_tensor
from ..core.tensors import check_dtype
from ..errors import AdapterFileError, SerialLoraError
from .storage import (
    HEADER,
    WEIGHT_NAME,
    AdapterTensors,
    check_finite,
    check_hub_arguments,
    find_file,
    read_tensors,
    write_safetensors,
)

FORMAT_VERSION = 1
_FIELDS = {"format_version", "library_version", "components", "head"}
_HEAD = "head"
_LORA = re.compile(r"lora|hada_|lokr_|oft_")  # in the keys of every kind that trainers write
_HEAD_FIELDS = ("task", "settings", "label_names", "preprocessing", "base")


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Args:
        kind: Name of its class ("class" in the file).
        name: Hub id or folder it was opened from.
        fingerprint: A sample of its weights; see `files.fingerprint`.
    """

    kind: str | None = None
    name: str | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name or '(no name)'}"

    def to_json(self) -> dict[str, str | None]:
        """The entry in the header."""
        return {"class": self.kind, "name": self.name, "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, entry: Any, where: str) -> Base:
        """Read the entry; raises AdapterFileError if it is damaged."""
        values = _mapping(entry, where)
        texts = [values.get(key) for key in ("class", "name", "fingerprint")]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise AdapterFileError(f"{where} must hold texts; got {str(entry)[:120]}.")
        try:
            sample = base64.b64decode(texts[2] or "", validate=True)
        except (binascii.Error, ValueError) as error:
            raise AdapterFileError(f"{where} has a fingerprint that is not base64: {error}.") from error
        if len(sample) % 4 or len(sample) > 2**16:
            raise AdapterFileError(f"{where} has a fingerprint of {len(sample)} bytes, which are not float32 numbers.")
        return cls(*texts)


@dataclass(frozen=True)
class Component:
    """One model's part of an adapter.

    Args:
        tensors: {`<site>.serial_lora.<pair>.lora_A.weight`: A (r, d), ... `.lora_B.weight`: B (d, r)}, and
            {`<path>.modules_to_save.<name>`: tensor} of modules that the adapter brings whole.
        config: Its settings; None where the source carries none.
        base: The model that it was trained on.
    """

    tensors: Mapping[str, Tensor]
    config: SerialLoraConfig | None = None
    base: Base = field(default_factory=Base)

    def pairs(self) -> dict[str, dict[str, Tensor]]:
        """{place: {"A": A, "B": B}}; a key that names no matrix of a pair stands for itself, with nothing in it."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            if split_tensor(key) is not None:
                continue
            place, matrix = split_matrix(key) or (key, None)
            held = found.setdefault(place, {})
            if matrix is not None:
                held[matrix] = tensor
        return found

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """{path: {name: tensor}} of the modules that the adapter saved whole."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            if (split := split_tensor(key)) is not None:
                found.setdefault(split[0], {})[split[1]] = tensor
        return found


@dataclass(frozen=True)
class Head:
    """A trained head over a vision backbone.

    Args:
        task: What it is for; each head class has its own.
        settings: Keyword arguments of the head.
        label_names: Names of the classes.
        preprocessing: Size and normalisation of the images.
        base: The backbone.
        needs: Name of a file beside this one that holds an adapter of another kind, without which the head is wrong.
        tensors: The head's state dict.
    """

    task: str
    settings: Mapping[str, Any]
    label_names: Sequence[str]
    preprocessing: Mapping[str, Any]
    base: Base
    needs: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry in the header."""
        entry = {key: getattr(self, key) for key in ("task", "settings", "label_names", "preprocessing")}
        entry = {**entry, "label_names": list(self.label_names), "base": self.base.to_json()}
        return {**entry, "needs": self.needs} if self.needs else entry

    @classmethod
    def from_json(cls, entry: Any, tensors: Mapping[str, Tensor], where: str) -> Head:
        """Read the entry; raises AdapterFileError if it is damaged."""
        values = _mapping(entry, where)
        if missing := [key for key in _HEAD_FIELDS if key not in values]:
            raise AdapterFileError(f"{where} is damaged: its header lacks {', '.join(sorted(missing))} of the head.")
        task, names, needs = values["task"], values["label_names"], values.get("needs")
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not isinstance(task, str) or not texts or not (needs is None or isinstance(needs, str)):
            raise AdapterFileError(
                f"{where} is damaged: task and needs must be texts and label_names a list of texts; got "
                f"{str({'task': task, 'needs': needs, 'label_names': names})[:160]}."
            )
        settings = _mapping(values["settings"], f"{where}, settings")
        preprocessing = _mapping(values["preprocessing"], f"{where}, preprocessing")
        base = Base.from_json(values["base"], f"{where}, base")
        return cls(task, settings, names, preprocessing, base, needs, dict(tensors))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it is written: one component per model, and perhaps a head.

    Args:
        components: {component: its part}; "transformer" for a bare diffusers model, "model" for another, else the name
            of a pipeline's component.
        head: The head of a vision model.
        library_version: Version of slora_diffusers that wrote it; None in a state dict that has no header.
    """

    components: Mapping[str, Component]
    head: Head | None = None
    library_version: str | None = None

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Mapping[str, Tensor] | AdapterFile, **hub: Any) -> AdapterFile:
        """Read an adapter from a file, a folder, a Hub id or a state dict.

        Args:
            source: Path of a file or folder, id of a Hub repository, or {key: tensor} as `serial_lora_state_dict`
                returns.
            **hub: `weight_name` of the file in the folder or repository; `subfolder`, `revision`, `token`,
                `cache_dir`, `local_files_only` and `force_download` as for `hf_hub_download`.

        Raises:
            TypeError: If a keyword argument is unknown.
            AdapterFileError: If there is no such file, it is damaged, or its format is of an unknown version.
        """
        check_hub_arguments(hub)
        if isinstance(source, AdapterFile):
            return source
        if isinstance(source, AdapterTensors):
            return cls.of(source, "the state dict")
        if isinstance(source, Mapping):
            return cls.of(AdapterTensors(source), "the state dict")
        if not isinstance(source, str | os.PathLike):
            raise AdapterFileError(
                f"An adapter is a file, a folder, a Hub id or a state dict; got {type(source).__name__}."
            )
        path = find_file(source, **hub)
        return cls.of(read_tensors(path), str(path))

    @classmethod
    def of(cls, state: AdapterTensors, where: str = "the state dict") -> AdapterFile:
        """The adapter in a state dict with its header; raises AdapterFileError if the header is damaged."""
        header = state.metadata
        _check_version(header, where)
        _check_serial(state, where)
        entries = _mapping(header.get("components", {}), f"{where}: components", "must map a component's name to its")
        if unknown := sorted(set(header) - _FIELDS):
            warnings.warn(f"{where} has header fields that are unknown here and are ignored: {unknown}.", stacklevel=4)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            component, _, rest = str(key).partition(".")
            tensors.setdefault(component, {})[rest] = tensor
        has_head = _HEAD in header
        held = {name: part for name, part in tensors.items() if name != _HEAD or not has_head}
        parts = {c: _component(held.get(c, {}), entries.get(c, {}), f"{where}: {c}") for c in (*held, *entries)}
        components = {component: part for component, part in parts.items() if part.tensors}
        head = Head.from_json(header[_HEAD], tensors.get(_HEAD, {}), f"{where}: head") if has_head else None
        written_by = header.get("library_version")
        return cls(components, head, None if written_by is None else str(written_by)[:100])

    @classmethod
    def merge(cls, parts: Iterable[AdapterFile]) -> AdapterFile:
        """The parts of several components in one file; of two parts of one component, the later counts."""
        components = {name: component for part in parts for name, component in part.components.items()}
        return cls(components, library_version=library_version())

    def with_head(self, head: Head) -> AdapterFile:
        """The same adapter with a head beside it."""
        return replace(self, head=head)

    def state_dict(self) -> AdapterTensors:
        """{key in the file: tensor}, with the header's JSON in `.metadata`."""
        tensors = {f"{name}.{key}": t for name, part in self.components.items() for key, t in part.tensors.items()}
        components = {
            name: {**({} if part.config is None else {"config": part.config.to_dict()}), "base": part.base.to_json()}
            for name, part in self.components.items()
        }
        header: dict[str, Any] = {"format_version": FORMAT_VERSION, "library_version": library_version()}
        header["components"] = components
        if self.head is not None:
            tensors |= {f"{_HEAD}.{key}": tensor for key, tensor in self.head.tensors.items()}
            header[_HEAD] = self.head.to_json()
        return AdapterTensors(tensors, header)

    def write(
        self,
        save_directory: str | os.PathLike[str],
        weight_name: str = WEIGHT_NAME,
        dtype: torch.dtype | None = None,
        is_main_process: bool = True,
    ) -> Path:
        """Write the file, whole or not at all; returns its path.

        Raises:
            AdapterFileError: If the folder is a file, or a tensor is not finite; an earlier file is left as it was.
        """
        check_dtype(dtype)
        folder = Path(save_directory)
        if folder.is_file():
            raise AdapterFileError(f"save_directory must be a folder, but {folder} is a file.")
        path = folder / weight_name
        if is_main_process:
            state = self.state_dict()
            cast = {key: t.to(dtype) if dtype is not None and t.is_floating_point() else t for key, t in state.items()}
            check_finite(cast)
            write_safetensors(path, cast, {HEADER: json.dumps(state.metadata)})
        return path

    def warn_of_rest(self, taken: Sequence[str]) -> None:
        """Warn of components that nothing takes."""
        if rest := [name for name in self.components if name not in taken]:
            warnings.warn(
                f"The adapter is also for {rest}, which is left out here: load it into a pipeline that has these "
                "components to get all of it.",
                stacklevel=3,
            )


def library_version() -> str:
    """The version of slora_diffusers that is installed."""
    try:
        return version("slora_diffusers")
    except PackageNotFoundError:
        return "0+unknown"


def _component(tensors: Mapping[str, Tensor], entry: Any, where: str) -> Component:
    values = _mapping(entry, where)
    config = None
    if "config" in values:
        try:
            config = SerialLoraConfig.from_dict(_mapping(values["config"], f"{where}, config"))
        except AdapterFileError:
            raise
        except (SerialLoraError, TypeError, ArithmeticError) as error:
            raise AdapterFileError(f"{where} has a config that cannot be: {error}") from error
    return Component(tensors, config, Base.from_json(values.get("base", {}), f"{where}, base"))


def _check_version(header: Any, where: str) -> None:
    found = header.get("format_version", FORMAT_VERSION) if isinstance(header, Mapping) else None
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise AdapterFileError(
            f"{where} has format version {repr(found)[:40]}; this slora_diffusers reads version {FORMAT_VERSION}. "
            "Install the version that wrote it, or a newer one."
        )


def _check_serial(keys: Iterable[str], where: str) -> None:
    """Refuse an ordinary LoRA, of whichever trainer."""
    keys = list(map(str, keys))
    if not any(".serial_lora." in key for key in keys) and any(map(_LORA.search, keys)):
        raise AdapterFileError(
            f"{where} is an ordinary LoRA, not a Serial LoRA: load it with pipe.load_lora_weights() or PEFT, or make "
            "it a Serial LoRA with compress_lora() or `slora compress`."
        )


def _mapping(entry: Any, where: str, must: str = "must hold") -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise AdapterFileError(
            f"{where}: damaged header: it {must} config and base; got {str(entry)[:80]}. Save the adapter again."
        )
    return entry
