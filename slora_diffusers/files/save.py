"""Write an adapter of a model to a file, and the state dict and header that go into it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.sites import unwrap
from ..core.state import Registry, check_known, matrices_of, registry_of
from ..errors import AdapterFileError, AdapterStateError
from .fingerprint import describe_base
from .format import (
    FORMAT_VERSION,
    WEIGHT_NAME,
    AdapterTensors,
    check_finite,
    write_adapter,
)
from .hub import check_publishing, publish


def serial_lora_state_dict(
    model: nn.Module, adapter_name: str | None = None, component: str | None = None
) -> AdapterTensors:
    """One adapter as it is written to a file: {key: tensor}, with the header's JSON in `.metadata`.

    Args:
        model: A model with adapters.
        adapter_name: Which one; `None` takes the only one, or the only active one.
        component: First part of the keys; `None` takes "transformer" for a diffusers model, else "model".
    """
    registry = registry_of(model)
    name = the_adapter(registry) if adapter_name is None else adapter_name
    check_known(registry, [name])
    component = component or component_name(model)
    tensors: dict[str, Tensor] = {}
    for key, matrix in matrices_of(model, name).items():
        whole = matrix.full_tensor() if hasattr(matrix, "full_tensor") else matrix  # sharded by FSDP2
        tensors[f"{component}.{key}"] = whole.detach()
    header = {"config": registry.configs[name].to_dict(), "base": describe_base(model)}
    return AdapterTensors(tensors, new_header({component: header}))


def save_serial_lora(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    weight_name: str = WEIGHT_NAME,
    dtype: torch.dtype | None = None,
    is_main_process: bool = True,
    push_to_hub: bool | str = False,
    **hub: Any,
) -> Path:
    """Write one adapter to `save_directory/weight_name`, atomically.

    Args:
        model: A model with adapters.
        save_directory: Folder, made if it is not there.
        adapter_name: Which one; `None` takes the only one, or the only active one.
        weight_name: Name of the file.
        dtype: Dtype to store; `None` keeps the adapter's own.
        is_main_process: Whether this process writes; all of them must call (sharded parameters are gathered).
        push_to_hub: Hub id to upload it to, with a model card; `True` takes the folder's name.
        **hub: `base_model`, `prompt`, `tags`, `private`, `token`, `revision`, `create_pr`, `commit_message`; see
            `slora_diffusers.files.hub.publish`.

    Returns:
        The file's path.

    Raises:
        AdapterStateError: If the adapter is unknown, or it is not clear which one is meant.
        AdapterFileError: If a weight is not finite; an earlier file of that name is left as it was.
    """
    check_publishing(push_to_hub, hub)
    state = serial_lora_state_dict(model, adapter_name)
    path = write_state(state, save_directory, weight_name, dtype, is_main_process)
    if push_to_hub and is_main_process:
        publish(path, push_to_hub, **hub)
    return path


def write_state(
    tensors: AdapterTensors,
    save_directory: str | os.PathLike[str],
    weight_name: str,
    dtype: torch.dtype | None,
    is_main_process: bool,
) -> Path:
    """Check an adapter's tensors and write them; see `save_serial_lora`."""
    path = Path(save_directory)
    if path.is_file():
        raise AdapterFileError(f"save_directory is to be a folder, but {path} is a file.")
    path = path / weight_name
    if is_main_process:
        cast = {key: t if dtype is None else t.to(dtype) for key, t in tensors.items()}
        check_finite(cast)
        write_adapter(path, AdapterTensors(cast, tensors.metadata))
    return path


def new_header(components: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a file's header."""
    return {"format_version": FORMAT_VERSION, "library_version": library_version(), "components": components}


def component_name(model: nn.Module) -> str:
    """What a bare model is called in files: "transformer" if it is diffusers', else "model"."""
    bases = type(unwrap(model)).__mro__
    return "transformer" if any(c.__module__.startswith("diffusers.") for c in bases) else "model"


def the_adapter(registry: Registry) -> str:
    """The only adapter, or the only active one."""
    for names in (registry.configs, registry.active):
        if len(names) == 1:
            return next(iter(names))
    raise AdapterStateError(f"Say which adapter: adapter_name is one of {sorted(registry.configs)}.")


def library_version() -> str:
    """The version of slora_diffusers that is installed."""
    try:
        return version("slora_diffusers")
    except PackageNotFoundError:
        return "0+unknown"
