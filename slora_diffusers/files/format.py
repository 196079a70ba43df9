"""Adapter files on disk and on the Hub: find, read and write safetensors with a JSON header, never a pickle."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.tensors import is_finite
from ..errors import AdapterFileError

WEIGHT_NAME = "serial_lora_weights.safetensors"
FORMAT_VERSION = 1
_HUB_ARGUMENTS = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"}
_HEADER_FIELDS = {"format_version", "library_version", "components", "head"}


class AdapterTensors(dict[str, Tensor]):
    """{key in the file: tensor}, with the JSON of the file's header in `metadata`."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(tensors)
        self.metadata: dict[str, Any] = dict(metadata or {})

    def component_names(self) -> list[str]:
        """The components of a pipeline that the keys name; a trained head is none of them."""
        return [name for name in dict.fromkeys(key.partition(".")[0] for key in self) if name != "head"]

    def warn_of_rest(self, taken: Sequence[str]) -> None:
        """Warn of components that nothing takes."""
        if rest := [name for name in self.component_names() if name not in taken]:
            warnings.warn(
                f"The adapter is also for {rest}, which is left out here: load it into a pipeline that has these "
                "components to get all of it.",
                stacklevel=3,
            )


def check_hub_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword argument that neither we nor `hf_hub_download` know."""
    if unknown := sorted(set(arguments) - _HUB_ARGUMENTS - {"weight_name"}):
        allowed = ", ".join(sorted(_HUB_ARGUMENTS | {"weight_name"}))
        raise TypeError(f"Unexpected keyword argument {unknown[0]!r}; besides its own, a load takes {allowed}.")


def read_adapter(source: str | os.PathLike[str] | Mapping[str, Tensor], **hub: Any) -> AdapterTensors:
    """Read an adapter from a file, a folder, a Hub id or a state dict.

    Args:
        source: Path of a file or folder, id of a Hub repository, or {key: tensor} as `serial_lora_state_dict` gives.
        **hub: `weight_name` of the file in the folder or repository; `subfolder`, `revision`, `token`, `cache_dir`,
            `local_files_only` and `force_download` as for `hf_hub_download`.

    Raises:
        TypeError: If a keyword argument is unknown.
        AdapterFileError: If there is no such file, it is damaged, or its format is of an unknown version.
    """
    check_hub_arguments(hub)
    if isinstance(source, AdapterTensors):
        _check_header(source.metadata, "the state dict")
        return source
    if isinstance(source, Mapping):
        return AdapterTensors(source)
    path = find_file(source, **hub)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = json.loads(header.get("serial_lora", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file: {error}.") from error
    _check_header(metadata, str(path))
    return AdapterTensors(tensors, metadata)


def find_file(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The local path of an adapter's file, downloaded to the Hub's cache if `source` is a repository's id."""
    name = hub.pop("weight_name", None) or WEIGHT_NAME
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        path = path / (hub.get("subfolder") or "")
        if (path / name).is_file():
            return path / name
        there = sorted(p.name for p in path.glob("*.safetensors"))
        loras = "; LoRA weights load with load_lora_weights" if "pytorch_lora_weights.safetensors" in there else ""
        raise AdapterFileError(
            f"There is no {name} in {path}; its safetensors files are {there}. "
            f"Name the file with weight_name=...{loras}"
        )
    return _download(str(source), name, hub)


def write_adapter(path: Path, tensors: AdapterTensors) -> None:
    """Write an adapter's tensors, with its metadata as the file's header."""
    write_safetensors(path, tensors, {"serial_lora": json.dumps(tensors.metadata)})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and header so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    header = {"format": "pt", **metadata}
    try:
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if a tensor is not of floats, or holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise AdapterFileError(f"{key} is {kind}; an adapter's weights are tensors of floats.")
        if not is_finite(tensor):
            raise AdapterFileError(
                f"{key} holds NaN or infinity: the training diverged, or the file is damaged. Nothing was loaded; use "
                "an earlier checkpoint."
            )


def _download(repository: str, name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, library_name="slora_diffusers", **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(
            f"{repository!r} is neither a local file or folder, nor a Hub repository with {name} that can be reached: "
            f"{error}"
        ) from error


def _check_header(metadata: Any, where: str) -> None:
    version = metadata.get("format_version", FORMAT_VERSION) if isinstance(metadata, Mapping) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise AdapterFileError(
            f"{where} has format version {version!r}; this slora_diffusers reads version {FORMAT_VERSION}. "
            "Install the version that wrote it, or a newer one."
        )
    components = metadata.get("components", {})
    entries = list(components.values()) if isinstance(components, Mapping) else [None]
    parts = [
        entry.get(key, {}) if isinstance(entry, Mapping) else None for entry in entries for key in ("config", "base")
    ]
    if not all(isinstance(part, Mapping) for part in parts):
        raise AdapterFileError(
            f"{where} has a damaged header: 'components' must map a component's name to its config and base; got "
            f"{components!r}. Save the adapter again."
        )
    if unknown := sorted(set(metadata) - _HEADER_FIELDS):
        warnings.warn(f"{where} has header fields that are unknown here and are ignored: {unknown}.", stacklevel=4)
