"""Where an adapter's bytes are: find a file on disk or on the Hub, read and write safetensors, never a pickle."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.names import split_tensor
from ..core.tensors import is_finite
from ..errors import AdapterFileError

WEIGHT_NAME = "serial_lora_weights.safetensors"
LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file of a LoRA."""

HEADER = "serial_lora"
"""Field of a safetensors header that holds an adapter's JSON."""

_MOST_JSON = 2**24  # characters of a header's JSON; of a large model's adapter it has some hundred thousand
_DEEPEST = 16
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?(?<!\.safetensors)")
_HUB_ARGUMENTS = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"}


class AdapterTensors(dict[str, Tensor]):
    """{key in the file: tensor}, with the JSON of the file's header in `metadata`; `AdapterFile.of` reads both."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(tensors)
        self.metadata: dict[str, Any] = dict(metadata or {})


def check_hub_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword argument that neither we nor `hf_hub_download` know."""
    if unknown := sorted(set(arguments) - _HUB_ARGUMENTS - {"weight_name"}):
        allowed = ", ".join(sorted(_HUB_ARGUMENTS | {"weight_name"}))
        raise TypeError(f"Unexpected keyword argument {unknown[0]!r}; besides its own, a load takes {allowed}.")


def read_tensors(path: Path) -> AdapterTensors:
    """The tensors of a file and the JSON of its header.

    Raises:
        AdapterFileError: If the file is damaged, or its header is not JSON or longer than any adapter's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER, "{}")
            if len(text) > _MOST_JSON:
                raise AdapterFileError(f"{path} has a header of {len(text):,} characters; at most {_MOST_JSON:,}.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = json.loads(text)
    except AdapterFileError:
        raise
    except (SafetensorError, OSError, RecursionError, ValueError) as error:  # JSON's own errors are ValueErrors
        raise unreadable(path, error) from error
    if not isinstance(metadata, dict):
        raise AdapterFileError(f"{path} has a damaged header: it must be a JSON object; got {str(metadata)[:80]}.")
    _check_depth(metadata, path)
    return AdapterTensors(tensors, metadata)


def unreadable(path: Path, error: Exception) -> AdapterFileError:
    """The error for a file that is not safetensors, or damaged."""
    if path.suffix in _PICKLES:
        return AdapterFileError(
            f"{path} is a pickle, as its name says: it can run code, and is not read. Make it safetensors: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'lora.safetensors')."
        )
    return AdapterFileError(f"{path} is not a readable safetensors file: {error}.")


def _check_depth(metadata: dict[str, Any], path: Path) -> None:
    level: list[Any] = [metadata]
    for _ in range(_DEEPEST):
        level = [
            x
            for node in level
            for x in (node.values() if isinstance(node, dict) else node)
            if isinstance(x, dict | list)
        ]
    if level:
        raise AdapterFileError(f"{path} has a damaged header: its JSON is nested more than {_DEEPEST} levels deep.")


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
        lora = next((p for known in LORA_NAMES for p in (*path.glob(known), *path.glob(f"*/{known}"))), None)
        remedy = "Name the file with weight_name=..."
        if lora is not None and name == WEIGHT_NAME:
            remedy = (
                f"{lora} is an ordinary LoRA: load it with load_lora_weights() or PEFT, or make it a Serial LoRA with "
                "compress_lora() or `slora compress`."
            )
        raise AdapterFileError(f"There is no {name} in {path}; its safetensors files are {there}. {remedy}")
    return _download(str(source), name, hub)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and header so that the file is there whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    # A name of its own for every writer: threads share a process's number.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(plain, temporary, metadata={"format": "pt", **metadata})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's file is for its owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


COUNTERS = (torch.int64, torch.int32, torch.bool)
"""Dtypes that buffers of a whole module may have, such as BatchNorm's number of batches."""


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if a tensor is not of floats, or holds NaN or infinity."""
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.dtype in COUNTERS and split_tensor(key) is not None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise AdapterFileError(f"{key} is {kind}; an adapter's weights are tensors of floats.")
        if not is_finite(tensor):
            raise AdapterFileError(
                f"{key} holds NaN or infinity: the training diverged, or the file is damaged. Nothing was loaded; use "
                "an earlier checkpoint."
            )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _download(repository: str, name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    nowhere = f"{repository!r} is neither a local file or folder, nor a Hub"
    meant = _near(Path(repository))
    if not _ID.fullmatch(repository):
        raise AdapterFileError(f"{nowhere} id: check the path{meant}.")
    try:
        return Path(hf_hub_download(repository, name, library_name="slora_diffusers", **hub))
    except HFValidationError as error:
        raise AdapterFileError(f"{nowhere} id: check the path{meant}.") from error
    except GatedRepoError as error:
        raise AdapterFileError(
            f"The Hub's repository {repository!r} is gated: ask for access on its page, and do `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterFileError(
            f"{nowhere} repository that you can see: check the name{meant}; a private one needs `hf auth login`."
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # of the cache: the Hub has not been reached
            raise _unreached(nowhere, meant, name) from error
        raise AdapterFileError(
            f"The Hub's repository {repository!r} has no {name}: name its file with weight_name=..."
        ) from error
    except OSError as error:
        raise _unreached(nowhere, meant, name) from error


def _unreached(nowhere: str, meant: str, name: str) -> AdapterFileError:
    return AdapterFileError(
        f"{nowhere} repository whose {name} is in the cache or could be fetched now: check the path{meant}, or, for a "
        "Hub id, the connection."
    )


def _near(path: Path) -> str:
    """What is there and is called nearly like this, or like the first folder of it that is missing."""
    while not path.parent.exists():
        path = path.parent
    try:
        there = {one.name: one for one in path.parent.iterdir()}
    except OSError:
        return ""
    close = get_close_matches(path.name, there, 1)
    return f" (there is {str(there[close[0]])!r})" if close else ""
