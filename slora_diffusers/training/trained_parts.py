"""What a Trainer's checkpoint has to hold of a model: its adapter, its head, and whether anything else trains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..core.components import adapted, component_name, has_adapters, the_adapter
from ..core.names import is_of_pair
from ..core.processes import is_sharded, whole
from ..core.sites import unwrap
from ..core.state import registry_of, tensors_of
from ..errors import AdapterFileError, SerialLoraError
from ..files.fingerprint import describe_base, warn_of_other_base
from ..files.format import AdapterFile
from ..files.save import save_serial_lora
from ..files.storage import WEIGHT_NAME, check_finite, write_safetensors
from ..heads.base import SerialLoraWithHead
from .checkpoint import load_parameters

REST_NAME = "trained_beside_serial_lora.safetensors"

_DECIDE_THE_SCALE = ("alpha", "rslora", "alpha_pattern")


def head_of(model: nn.Module) -> SerialLoraWithHead | None:
    """The model with a head of this library that this is, or that a wrapper holds."""
    while not isinstance(model, SerialLoraWithHead):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def check_trainable(model: nn.Module) -> None:
    """Raise AdapterStateError unless the model has an adapter, or a head to train on frozen features."""
    if head_of(model) is None:
        registry_of(model)


def trains_more_than_pairs(model: nn.Module) -> bool:
    """Whether a parameter of neither a pair nor a head of this library trains, such as a model's own classifier's."""
    return head_of(model) is None and any(isinstance(p, nn.Parameter) for p in _rest(model).values())


def save_trained(model: nn.Module, folder: Path, adapter_name: str | None = None, is_main_process: bool = True) -> None:
    """Write the adapter into a folder, with the head of a model that has one; every process calls, one writes.

    What else trains of a model without such a head goes into a file of its own, by the names that it has here: what
    its save_pretrained writes may have others.
    """
    if (head := head_of(model)) is not None:
        head.save_pretrained(folder, adapter_name, is_main_process=is_main_process)
        return
    save_serial_lora(model, folder, adapter_name, is_main_process=is_main_process)
    if trains_more_than_pairs(model):
        rest = {name: whole(tensor) for name, tensor in _rest(model).items()}
        if is_main_process:
            write_safetensors(folder / REST_NAME, rest, {})


def load_trained(model: nn.Module, folder: Path, adapter_name: str | None = None) -> None:
    """Take what `save_trained` wrote, in place: an optimizer may hold these very parameters.

    Raises:
        SerialLoraError: If the folder holds none, or of other shapes or scale; the model is as it was then.
    """
    file = AdapterFile.read(folder)
    saved: dict[str, Tensor] = dict(file.state_dict())
    check_finite(saved)
    named = _trained(model, adapter_name)
    _check_scale(model, file, folder, adapter_name)
    if trains_more_than_pairs(model):
        if not (folder / REST_NAME).is_file():
            raise AdapterFileError(
                f"{folder} has no {REST_NAME}: what trains of this model beside the adapter was not saved there."
            )
        named |= _rest(model)
        saved = {**saved, **load_file(folder / REST_NAME)}
    load_parameters(list(named.items()), saved)


def digest_of(tensors: Mapping[str, Tensor]) -> str | None:
    """What tells these tensors from any others: a hash of names and bytes. None if some of them are sharded."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if is_sharded(tensor) or tensor.is_meta:
            return None
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trained_digest(model: nn.Module, adapter_name: str | None = None) -> str | None:
    """`digest_of` what `save_trained` would write now."""
    return digest_of(_trained(model, adapter_name))


def has_digest(folder: Path, digest: str | None) -> bool:
    """Whether a folder holds what was trained, and (if a digest is given) the very tensors that it is of."""
    if not (folder / WEIGHT_NAME).is_file():
        return False
    return digest is None or digest_of(AdapterFile.read(folder).state_dict()) == digest


def follow_best(state: Any, resumed: Path) -> None:
    """Find the best checkpoint of a run whose folder has moved since its path was noted: beside the resumed one."""
    noted = state.best_model_checkpoint
    step = getattr(state, "best_global_step", None)
    name = Path(noted).name if noted else f"checkpoint-{step}"
    if not (noted and Path(noted).is_dir()) and (resumed.parent / name).is_dir():
        state.best_model_checkpoint = str(resumed.parent / name)


def prepare_checkpointing(model: nn.Module, args: Any) -> None:
    """Let gradients reach the pairs through checkpointed blocks, whose inputs do not train: the base is frozen.

    PyTorch's reentrant kind, transformers 4's default, gives them none in silence unless its input asks for a gradient.
    """
    if not (getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)):
        return
    if not hasattr(args, "activation_checkpointing") and args.gradient_checkpointing_kwargs is None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    given = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    if given.get("use_reentrant"):
        inner: Any = unwrap(model)
        if not hasattr(inner, "enable_input_require_grads"):
            raise SerialLoraError(
                f"use_reentrant=True would give the pairs of {type(inner).__name__} no gradient, for what enters its "
                "blocks is frozen. Leave it out of gradient_checkpointing_kwargs, or pass False."
            )
        inner.enable_input_require_grads()


def _trained(model: nn.Module, adapter_name: str | None) -> dict[str, Tensor]:
    """{key in the file: tensor of the model} of adapter and head."""
    head = head_of(model)
    named: dict[str, Tensor] = {}
    if head is None or has_adapters(head.backbone):
        component = "model" if head is not None else component_name(model)
        name = adapter_name or the_adapter(adapted(model))
        named = {f"{component}.{key}": tensor for key, tensor in tensors_of(model, name).items()}
    if head is not None:
        named |= {f"head.{key}": tensor for key, tensor in head.head.state_dict().items()}
    return named


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train besides pairs, and the buffers, which training may change."""
    named = dict(unwrap(model).named_parameters())
    state = unwrap(model).state_dict(keep_vars=True)
    own = {key: tensor for key, tensor in state.items() if not is_of_pair(key)}
    return {key: tensor for key, tensor in own.items() if key not in named or named[key].requires_grad}


def _check_scale(model: nn.Module, file: AdapterFile, folder: Path, adapter_name: str | None) -> None:
    """A scale is in the header, not in the tensors: one that differs would change the model in silence."""
    parts = list(file.components.values())
    if len(parts) != 1 or not has_adapters(model):
        return
    ours = registry_of(model).configs[adapter_name or the_adapter(adapted(model))]
    theirs = parts[0].config or ours
    differ = [key for key in _DECIDE_THE_SCALE if getattr(theirs, key) != getattr(ours, key)]
    if differ:
        raise AdapterFileError(
            f"{folder} was trained with {_shown(theirs, differ)}, and this model's adapter has {_shown(ours, differ)}: "
            "add it with the same settings to resume."
        )
    warn_of_other_base("checkpoint", parts[0].base, describe_base(model), stacklevel=4)


def _shown(config: SerialLoraConfig, keys: list[str]) -> str:
    return ", ".join(f"{key}={getattr(config, key)!r}" for key in keys)
