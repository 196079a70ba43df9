"""Write an adapter of a model or a pipeline to a file, and the state dict that goes into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.calls import alone
from ..core.components import adapted, check_known, held_by, the_adapter
from ..core.names import matrix_name, tensor_name
from ..core.offload import Storage
from ..core.parts import parts_of, persistent
from ..core.sites import unwrap
from ..core.state import adapter_checksum, pairs_of, registry_of
from ..errors import AdapterStateError
from .fingerprint import describe_base
from .format import AdapterFile, Component, library_version
from .hub import check_publishing, publish
from .storage import WEIGHT_NAME, AdapterTensors


def serial_lora_state_dict(model: Any, adapter_name: str | None = None, component: str | None = None) -> AdapterTensors:
    """One adapter as it is written to a file: {key: tensor}, with the header's JSON in `.metadata`.

    Args:
        model: A model with adapters; or a pipeline, over the components that have the adapter.
        adapter_name: Which one; `None` takes the only one, or the only active one.
        component: First part of a model's keys; `None` takes "transformer" for a diffusers model, else "model".

    Raises:
        AdapterStateError: If there is no adapter, none of that name, or several and none is named.
    """
    return adapter_file(model, adapter_name, component).state_dict()


@alone
def adapter_file(model: Any, adapter_name: str | None = None, component: str | None = None) -> AdapterFile:
    """The same, typed."""
    models = adapted(model)
    name = the_adapter(models) if adapter_name is None else adapter_name
    check_known(models, [name])
    held = {c: _component(one, name) for c, one in models.items() if held_by(one, [name])}
    if component is not None and isinstance(model, nn.Module):
        held = dict(zip([component], held.values(), strict=True))
    return AdapterFile(held, library_version=library_version())


def save_serial_lora(
    model: Any,
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
        model: A model with adapters; or a pipeline, all of whose components go into the one file.
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
    file = adapter_file(model, adapter_name)
    path = file.write(save_directory, weight_name, dtype, is_main_process)
    if push_to_hub and is_main_process:
        publish(path, push_to_hub, **hub)
    return path


def _component(model: nn.Module, name: str) -> Component:
    storage = Storage(unwrap(model))
    tensors: dict[str, Tensor] = {}
    for key, pair in pairs_of(model).items():
        if name in pair.scaling:
            for which, matrix in zip("AB", pair.kept(storage, name), strict=True):
                tensors[matrix_name(key, which)] = matrix.detach()
    for path, part in parts_of(model).items():
        for key, owner, attribute in persistent(part.copy_of(name)) if name in part.names else ():
            tensor = storage.peek(owner, attribute)
            if tensor is None:
                raise AdapterStateError(f"{path!r} of {name!r} is offloaded and cannot be read. Take the hooks off.")
            tensors[tensor_name(path, key)] = tensor
    registry = registry_of(model)
    registry.saved[name] = adapter_checksum(model, name)
    return Component(tensors, registry.configs[name], describe_base(model))
