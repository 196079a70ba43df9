"""Who owns a weight: the one way to read and the one way to write it, wherever it is kept.

A module may show a placeholder for a weight that lives elsewhere: accelerate's hooks keep it in a map (CPU or disk),
diffusers' group offloading in a copy that it loads from (with a stream) or in a file, FSDP2 in shards, a quantized
layer in no `.weight` at all. `Storage` asks the owner, or refuses with the remedy. No other line of the package
touches the data of a base's weight.

A pair needs no hook of its own. Its operands follow the input's device (see `core.layer.SerialLoraPair`), so an adapter
loads into an offloaded model without a hook being lifted or a weight being moved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterStateError
from .processes import is_sharded, whole
from .tensors import is_plain

_GROUP = "group_offloading"
_HOOKS_OFF = (
    "Take the hooks off first (pipe.remove_all_hooks(), or accelerate's remove_hook_from_module(model, recurse=True))"
)
_GROUPS_OFF = (
    "Load the model without it, or take it off first "
    "(HookRegistry.check_if_exists_or_initialize(model).remove_hook('group_offloading', recurse=True))"
)


class Storage:
    """Where the weights of one model are kept, as of now.

    Args:
        model: The model; its groups of offloading are looked up once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[int, Any] = {}
        for module in model.modules() if "diffusers.hooks.group_offloading" in sys.modules else ():
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            if (group := getattr(hooks.get(_GROUP), "group", None)) is not None:
                held = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
                held += [*group.parameters, *group.buffers]
                self._groups.update((id(tensor), group) for tensor in held)

    def peek(self, module: nn.Module, name: str) -> Tensor | None:
        """The tensor `module.name` holds in truth, or None where it cannot be had: no such tensor, a placeholder."""
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor):
            return None
        if is_sharded(tensor):
            return whole(tensor)
        if tensor.is_meta:
            hook = _offload_hook(module)
            return None if hook is None or hook.weights_map is None else hook.weights_map[name]
        group = self._groups.get(id(tensor))
        if group is None:
            return tensor.detach()
        if group.offload_to_disk_path is not None and tensor in group.tensor_to_key:
            return _in_file(group, tensor)
        return tensor.detach()

    def read(self, module: nn.Module, name: str, what: str, called: str) -> Tensor:
        """The same, or an error that says what cannot be done, and the remedy.

        Args:
            module: Owner of the tensor.
            name: Its attribute.
            what: What it is read for: "Cannot {what}".
            called: What messages call the tensor.

        Raises:
            AdapterStateError: If the owner does not give it, or it is not an ordinary matrix of floats.
        """
        W = self.peek(module, name)
        if W is None and getattr(module, name, None) is not None:
            raise AdapterStateError(f"Cannot {what}: the weight {called} is offloaded, not in memory. {_HOOKS_OFF}.")
        if W is None:
            raise AdapterStateError(
                f"Cannot {what}: {called} is a {type(module).__name__} without a tensor {name!r}: its weight is stored "
                "in a form of its own. Keep the adapter live, or load the base unquantized."
            )
        if not is_plain(W):
            raise AdapterStateError(
                f"Cannot {what}: the weight {called} is stored as {type(W).__name__} of {W.dtype}, not as an ordinary "
                "matrix. Keep the adapter live (it trains and runs on a quantized base as it is), or load the base "
                "unquantized to fuse."
            )
        return W

    def data(self, module: nn.Module, name: str) -> Tensor:
        """The very tensor behind `module.name`, to be kept and written back: never a copy."""
        return getattr(module, name).data

    def check_writable(self, module: nn.Module, name: str, what: str, called: str) -> None:
        """Raise AdapterStateError unless `write` reaches all that the model will read its weight from."""
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            self.read(module, name, what, called)
            raise AdapterStateError(f"Cannot {what}: the weight {called} is offloaded, not in memory. {_HOOKS_OFF}.")
        if is_sharded(tensor):
            raise AdapterStateError(
                f"Cannot {what}: the weight {called} is sharded over processes (FSDP). Save the adapter, and {what} it "
                "in a model that is whole."
            )
        group = self._groups.get(id(tensor))
        if group is not None and group.offload_to_disk_path is not None:
            raise AdapterStateError(
                f"Cannot {what}: the weight {called} is offloaded to disk by groups, and is read from there before "
                f"every use. {_GROUPS_OFF}."
            )

    def check_in_place(self, module: nn.Module, what: str) -> None:
        """Raise AdapterStateError unless what a verb writes into the buffers of a module stays there.

        Groups with a stream load them from a copy, groups on disk from a file, where the module's own parameters are.
        """
        for tensor in (*module.parameters(), *module.buffers()):
            group = self._groups.get(id(tensor))
            if group is not None and (group.offload_to_disk_path is not None or tensor in group.cpu_param_dict):
                raise AdapterStateError(
                    f"Cannot {what}: the model is offloaded by groups, to disk or with a stream, and the room that is "
                    f"reserved for adapters has to stay where it is. {_GROUPS_OFF}, or do without reserved room."
                )

    def write(self, module: nn.Module, name: str, W: Tensor) -> None:
        """Make `module.name` hold W, here and wherever its owner will load it from."""
        tensor = getattr(module, name)
        group = self._groups.get(id(tensor))
        copies = {} if group is None else group.cpu_param_dict
        if tensor in copies:  # with a stream the group loads from this copy, pinned where it was
            copy = W.to(copies[tensor].device)
            copies[tensor] = copy.pin_memory() if copies[tensor].is_pinned() else copy
            if tensor.device == copies[tensor].device:
                W = copies[tensor]
        tensor.data = W.to(tensor.device)


def tensor_here(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module for its forward: from accelerate's map where sequential offloading left a meta tensor."""
    tensor = getattr(module, name)
    if tensor.is_meta and (hook := _offload_hook(module)) is not None and hook.weights_map is not None:
        return hook.weights_map[name]
    return tensor


def device_of(module: nn.Module, name: str) -> torch.device:
    """The device for what goes beside a tensor of a module: its own, or the CPU where that is only a placeholder."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):  # a quantized layer without `.weight`
        tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    if tensor is None or (tensor.is_meta and _offload_hook(module) is not None):
        return torch.device("cpu")
    return tensor.device


@contextmanager
def lifted_offload(module: nn.Module) -> Iterator[None]:
    """Take accelerate's hook off one module while its parameters change, and put an equal one back."""
    hook = _offload_hook(module)
    if hook is None:
        yield
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(
            module,
            AlignDevicesHook(
                execution_device=hook.execution_device,
                offload=hook.offload,
                io_same_device=hook.io_same_device,
                offload_buffers=hook.offload_buffers,
                place_submodules=hook.place_submodules,
                skip_keys=hook.skip_keys,
            ),
        )


def follow_group_offload(model: nn.Module) -> None:
    """Let diffusers' group offloading, where it keeps a list of pinned parameters, list those that were added."""
    offloading = sys.modules.get("diffusers.hooks.group_offloading")
    hook = None if offloading is None else offloading._get_top_level_group_offload_hook(model)
    # On disk it keeps no such list: parameters that came later stay in memory, and its files stay as they are.
    if offloading is not None and hook is not None and hook.config.stream and not hook.config.offload_to_disk_path:
        offloading._maybe_remove_and_reapply_group_offloading(model)


def _in_file(group: Any, tensor: Tensor) -> Tensor | None:
    """A tensor that a group keeps on disk: between forwards its parameter holds nothing."""
    path = Path(group.safetensors_file_path)
    if not path.is_file():  # not offloaded yet
        return tensor.detach()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(group.tensor_to_key[tensor])


def _offload_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a SequentialHook holds several
    return next((h for h in hooks if getattr(h, "offload", False)), None)
