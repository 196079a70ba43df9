"""Whole modules that train beside the pairs (`modules_to_save`): each adapter has its own copy, the base keeps its own.

The copies are registered at the root of the model, `serial_lora.module_<path>`, and the module's calls are relayed to
the copy of whichever adapter is active: see `core.marks`. The base's module stays where it is, and as it is.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from ..errors import AdapterStateError, SerialLoraError
from .calls import CallState, Sample
from .hooks import Followed
from .marks import PART, mark, unmark
from .names import CONTAINER, is_of_pair
from .offload import Storage, device_of
from .sites import Slot, find_slots, unwrap

_MOVING = threading.RLock()  # functional_call puts tensors into the copy itself
_HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward", PART)  # of others, in a module's own attributes


class SerialLoraPart(nn.Module):
    """The copies of one module that adapters brought; the active one's answers in the module's place.

    Args:
        path: Path of the module in its model.
        call: Per-call state of the model.
    """

    def __init__(self, path: str, call: CallState) -> None:
        super().__init__()
        self.path, self.call = path, call
        self.weights: dict[str, float] = {}  # of the active adapters; all but 0 mean the same here

    @property
    def names(self) -> list[str]:
        """The adapters that have a copy."""
        return [name.removeprefix("module_") for name in self._modules]

    def copy_of(self, name: str) -> nn.Module:
        """The copy of one adapter."""
        return self.get_submodule(f"module_{name}")

    def add(self, name: str, module: nn.Module) -> None:
        """Take one adapter's copy; it is not active yet."""
        self.add_module(f"module_{name}", module)

    def remove(self, name: str) -> None:
        """Forget one adapter."""
        del self._modules[f"module_{name}"]
        self.weights.pop(name, None)

    def activate(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active; those without a copy are skipped."""
        self.weights = {name: weights[name] for name in sorted(weights) if name in self.names}

    def choice(self) -> nn.Module | None:
        """The copy that answers here and now, None for the base's own module."""
        call = self.call.current()
        if call.scale == 0:
            return None
        if call.samples is None:
            name = next((name for name, weight in self.weights.items() if weight), None)
        else:
            name = self.owner(call.samples)
        return None if name is None else self.copy_of(name)

    def owner(self, samples: Iterable[Sample]) -> str | None:
        """The one adapter whose copy all samples of a batch have, None where all have the base's.

        Raises:
            AdapterStateError: If they differ: a module runs once for the whole batch.
        """
        owners = {
            tuple(n for n, w in one if n in self.names and (self.weights.get(n, 1.0) if w is None else w))
            for one in samples
        }
        if len(owners) > 1 or any(len(names) > 1 for names in owners):
            raise AdapterStateError(
                f"The samples of this batch need different modules at {self.path!r}, which their adapters saved whole "
                "(modules_to_save), and one module runs for the whole batch: run it once per adapter."
            )
        (names,) = owners
        return names[0] if names else None

    def run(self, module: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a copy gives: it computes in its own dtype, where the input is, and answers in the base's dtype."""
        own, theirs = _dtype(module), _dtype(base)
        like = next((x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        if (
            own is not None
            and theirs not in (None, own)
            and not (like is not None and torch.is_autocast_enabled(like.device.type))
        ):
            args, kwargs = _cast((args, kwargs), theirs, own)
            return _cast(self._run(module, like, args, kwargs), own, theirs)
        return self._run(module, like, args, kwargs)

    def _run(self, module: nn.Module, like: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        if like is None or all(t.device == like.device for t in tensors.values()) or _is_hooked(module):
            return module(*args, **kwargs)
        with _MOVING:  # loaded into an offloaded model: they follow the input, as the pairs do
            return functional_call(module, {n: t.to(like.device) for n, t in tensors.items()}, args, kwargs)


class FollowedPart(Followed):
    """A module whose calls are relayed: whatever sits at its path, be it put there by others, goes on to relay them."""

    def __init__(self, root: nn.Module, path: str, part: SerialLoraPart) -> None:
        self.site, self.path, self.part = root, path, part
        self.steps = self._steps()
        _relay(self.steps[-1][2], part)

    def _moves(self, old: nn.Module, new: nn.Module) -> None:
        if not any(module is old for module in new.modules()):  # as PEFT does, which goes on to call it
            stop_relaying(old)
            _relay(new, self.part)


def parts_of(model: nn.Module) -> dict[str, SerialLoraPart]:
    """{path of a module: the copies that adapters have of it}."""
    container = unwrap(model)._modules.get(CONTAINER)
    parts = [] if container is None else [m for m in container.children() if isinstance(m, SerialLoraPart)]
    return {part.path: part for part in parts}


def ensure_part(model: nn.Module, path: str, call: CallState) -> SerialLoraPart:
    """The place for copies of the module at a path, made if it is not there."""
    root = unwrap(model)
    if CONTAINER not in root._modules:
        root.serial_lora = nn.ModuleDict()
    container, name = root.get_submodule(CONTAINER), f"module_{path.replace('.', '-')}"
    if name not in container._modules:
        container.add_module(name, SerialLoraPart(path, call))
    return container.get_submodule(name)  # pyright: ignore[reportReturnType]


def follow_parts(model: nn.Module) -> list[FollowedPart]:
    """Relay the calls of every module that adapters have copies of."""
    root = unwrap(model)
    raw = {_plain(path): path for path, _ in root.named_modules()}
    return [FollowedPart(root, raw.get(path, path), part) for path, part in parts_of(root).items()]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The base's module at a path, as files spell it."""
    return next(module for name, module in unwrap(model).named_modules() if _plain(name) == path)


def stop_relaying(module: nn.Module) -> None:
    """Let a module answer its calls itself."""
    if vars(module).pop(PART, None) is not None:
        unmark(module, PART)


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """{path: module} of those whose path is a name, or ends with it after a dot; of nested ones the outermost.

    Raises:
        SerialLoraError: If a name fits none, or a module cannot be copied, or pairs work inside it.
    """
    modules = {_plain(path): module for path, module in unwrap(model).named_modules() if path and not is_of_pair(path)}
    found: set[str] = set()
    for name in names:
        fits = {path for path in modules if path == name or path.endswith(f".{name}")}
        if not fits:
            top = [path for path in modules if "." not in path]
            raise SerialLoraError(
                f"modules_to_save names {name!r}, and no module of {type(unwrap(model)).__name__} has a path that is "
                f"it, or ends with it; there are {', '.join(top[:12])}, and what is inside them."
            )
        found |= fits
    outer = [path for path in modules if path in found and not any(path.startswith(f"{other}.") for other in found)]
    slots = find_slots(model) if outer else []
    for path in outer:
        _check_module(model, modules, path, slots)
    return {path: modules[path] for path in outer}


def copied(
    storage: Storage, module: nn.Module, path: str, values: Mapping[str, Tensor] | None, trainable: bool
) -> nn.Module:
    """A copy of a module for one adapter: without the hooks of others, and with tensors of its own.

    Args:
        storage: Where the weights of the model are kept.
        module: The base's.
        path: Its path, for messages.
        values: Its tensors as a file has them; None takes the base's.
        trainable: Whether its parameters ask for gradients, and so are fp32.
    """
    memo = _without_hooks(module)
    for prefix, owner in module.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or id(tensor) in memo:
                continue
            value = (values or {}).get(f"{prefix}.{name}".lstrip("."))
            value = storage.peek(owner, name) if value is None else value
            if value is None or value.is_meta or type(value.data) is not Tensor:
                raise AdapterStateError(
                    f"modules_to_save cannot copy {path!r}: its {name} is quantized, or not in memory. Load the model "
                    "so that this module is kept as it is, or leave it out."
                )
            kind = torch.float32 if _is_cast(value, trainable) else value.dtype
            there = value.detach().to(_device(owner, name), kind, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            trains = trainable and there.is_floating_point()
            memo[id(tensor)] = nn.Parameter(there, requires_grad=trains) if is_parameter else there
    made = copy.deepcopy(module, memo)
    for one in made.modules():
        for name in _HOOKS:
            vars(one).pop(name, None)
        unmark(one)
    return made.train(module.training)


def persistent(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, owner, attribute) of every tensor of a module that a file keeps."""
    for prefix, owner in module.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), owner, name


def check_one_each(path: str, holders: Mapping[str, Iterable[str]]) -> None:
    """Raise AdapterStateError if two of the adapters have copies of a module, or of one inside it.

    Args:
        path: A path that one of them has a copy of.
        holders: {adapter: paths that it has copies of}.
    """
    inside = [n for n, paths in holders.items() if any(f"{p}.".startswith(f"{path}.") for p in paths)]
    if len(inside) > 1:
        raise AdapterStateError(
            f"The adapters {inside} all bring a module of their own at {path!r} (modules_to_save), and only one can be "
            "there: make one of them active (set_serial_lora), or load with activate=False."
        )


def _check_module(model: nn.Module, modules: Mapping[str, nn.Module], path: str, slots: Iterable[Slot]) -> None:
    module, cannot = modules[path], f"modules_to_save cannot take {path!r}:"
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise SerialLoraError(f"{cannot} a {type(module).__name__} is never called. Name the modules in it.")
    if not any(tensor.is_floating_point() for tensor in module.parameters()):
        raise SerialLoraError(f"{cannot} a {type(module).__name__} has no parameters of floating point to train.")
    if any(hasattr(one, "base_layer") for one in module.modules()):
        raise SerialLoraError(f"{cannot} it carries a LoRA of PEFT. Unload that first.")
    if isinstance(modules.get(path.rpartition(".")[0], unwrap(model)), nn.MultiheadAttention):
        raise SerialLoraError(f"{cannot} nn.MultiheadAttention reads its weights without calling it.")
    for slot in slots:
        fed = next((p for one in slot.projections if f"{(p := slot.called(one))}.".startswith(f"{path}.")), None)
        if fed is not None or f"{slot.path}.".startswith(f"{path}."):
            raise SerialLoraError(
                f"{cannot} pairs work inside it, at {fed or slot.path}. Adapt that by pairs (inputs=), and "
                "name modules that none reach."
            )


def _without_hooks(module: nn.Module) -> dict[int, Any]:
    """What deepcopy is to find instead of hooks."""
    memo: dict[int, Any] = {}
    for one in module.modules():
        memo |= {id(vars(one)[name]): None for name in _HOOKS if name in vars(one)}
        memo |= {id(hooks): OrderedDict() for name, hooks in vars(one).items() if name.endswith("_hooks")}
    return memo


def _relay(module: nn.Module, part: SerialLoraPart) -> None:
    vars(module)[PART] = part
    mark(module, PART)


def _is_cast(value: Tensor, trainable: bool) -> bool:
    """What trains is fp32, and float8 has no arithmetic."""
    return value.is_floating_point() and (trainable or value.element_size() == 1)


def _device(owner: nn.Module, name: str) -> torch.device:
    device = device_of(owner, name)
    return torch.device("cpu") if device.type == "meta" else device  # a base that has no numbers yet


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a module computes in, as far as its tensors tell."""
    kinds = (t.dtype for t in module.parameters() if t.is_floating_point())
    kind = next(kinds, None)
    return kind if kind is not None and kind.itemsize > 1 else None


def _cast(tree: Any, kind: torch.dtype | None, to: torch.dtype | None) -> Any:
    return _pytree.tree_map_only(Tensor, lambda t: t.to(to) if t.dtype == kind else t, tree)


def _is_hooked(module: nn.Module) -> bool:
    return any("_hf_hook" in vars(one) or "_diffusers_hook" in vars(one) for one in module.modules())


def _plain(path: str) -> str:
    return ".".join(step for step in path.split(".") if step != "_orig_mod")
