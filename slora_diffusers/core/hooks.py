"""How a pair gets in front of an attention: forward pre-hooks that transform what the attention reads.

A pre-hook, and not a replacement of `attn.processor`, because diffusers reassigns processors (`set_attn_processor`,
xFormers, slicing, PAG, QKV fusing), tells them apart by class (IP-Adapter, joint attention) and sets attributes on
them (attention backends). The processors stay the user's own; whichever is there reads the transformed input.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import AdapterStateError
from .batch import batch_size, rows_of
from .calls import Call, CallState, named_by
from .gate import open_gate
from .layer import SerialLoraPair
from .marks import mark, marks_of, unmark

SCALE_ARGUMENTS = ("joint_attention_kwargs", "cross_attention_kwargs", "attention_kwargs")
"""Arguments through which diffusers' pipelines pass `{"scale": ...}` to a transformer."""

_READS = "reads"
"""Mark of a module whose inputs go through pairs; with it, the inputs that do."""

FIRST_ARGUMENT = ""
"""Stands for whatever a module's forward calls its first argument (Linear layers of every make)."""


class SerialLoraAttnProcessor:
    """Forward pre-hook of one attention: each input that has a pair becomes `x~ = (I + s B A) x`.

    It contains no attention arithmetic: the attention and its own processor go on as they were.

    Args:
        reads: {argument of the module's forward: (its position, its pair)}.
    """

    def __init__(self, reads: Mapping[str, tuple[int, SerialLoraPair]]) -> None:
        self.reads = dict(reads)
        self.alike = {  # {argument: those before it that the same pair transforms}
            name: [other for other in list(self.reads)[:i] if self.reads[other][1] is pair]
            for i, (name, (_, pair)) in enumerate(self.reads.items())
        }

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new_args, new_kwargs = list(args), dict(kwargs)
        done: dict[str, tuple[Tensor, Tensor]] = {}  # {argument: (x, x~)}
        for name, (position, pair) in self.reads.items():
            given: Any = new_args if position < len(args) else new_kwargs
            at: Any = position if position < len(args) else name
            x = args[position] if position < len(args) else kwargs.get(name)
            if x is None:
                raise AdapterStateError(
                    f"{type(module).__name__} was called without {name!r}, which its serial pair reads. Adapt the "
                    "other inputs only (inputs=...), or register a record that fits how this model calls it."
                )
            # q = k = v passed as one tensor stays one tensor. No id() here: every block would be compiled by itself.
            same = [done[other][1] for other in self.alike[name] if done[other][0] is x]
            given[at] = same[0] if same else pair(x)
            done[name] = (x, given[at])
        return tuple(new_args), new_kwargs


class Followed:
    """A hook on a module that others replace (PEFT, quantizers): it goes along to whatever sits at that path.

    Args:
        site: The site, which holds the pair.
        path: Path of the hooked module from there.
        hook: The hook that sits on it now.
    """

    def __init__(self, site: nn.Module, path: str, hook: SerialLoraAttnProcessor) -> None:
        self.site, self.path, self.hook = site, path, hook
        self.steps = self._steps()

    def follow(self) -> None:
        """Hook what sits at the path now, if it is another module than before. It costs a look-up per step."""
        if all(parent._modules.get(name) is module for parent, name, module in self.steps):
            return
        old, self.steps = self.steps[-1][2], self._steps()
        self._moves(old, self.steps[-1][2])

    def _moves(self, old: nn.Module, new: nn.Module) -> None:
        detach(old)
        (_, pair), *_ = self.hook.reads.values()
        self.hook = attach(new, {FIRST_ARGUMENT: pair})

    def _steps(self) -> list[tuple[nn.Module, str, nn.Module]]:
        steps, parent = [], self.site
        for name in self.path.split("."):
            module = parent._modules.get(name)
            if module is None:
                raise AdapterStateError(
                    f"{type(self.site).__name__} has no {self.path!r} any more, in front of which a serial pair sits. "
                    "Put it back, or remove the adapter first (delete_serial_lora, unload_serial_lora)."
                )
            steps.append((parent, name, module))
            parent = module
        return steps


class Watched(Protocol):
    """What the hooks of the whole model read of its registry."""

    call: CallState
    configs: dict[str, Any]
    capacity: tuple[int, int] | None
    followed: list[Followed]


class ModelCall:
    """Forward hooks of the whole model: `{"scale": ...}` among the attention kwargs, and the size of the batch."""

    def __init__(self, registry: Watched) -> None:
        self.registry = registry

    @property
    def call(self) -> CallState:
        """The calls in progress on the model."""
        return self.registry.call

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Forward pre-hook: open a state for this forward where there is something to open it for."""
        if kwargs is None:  # PyTorch no longer knows that this hook takes them: it went while the forward waited for it
            return None
        if torch.compiler.is_compiling() and self.registry.capacity is not None:
            self._check_recorded(args, kwargs)
            return args, kwargs
        if not torch.compiler.is_compiling():
            self.call.turn.wait()
            for followed in self.registry.followed:
                followed.follow()
        call, changes = self.call.current(), {}
        check_block(call, self.call, self.registry.configs)
        for name in SCALE_ARGUMENTS:
            given = kwargs.get(name)
            if given and "scale" in given:
                scale = check_scale(given["scale"], self.call)
                kwargs = {**kwargs, name: {k: v for k, v in given.items() if k != "scale"}}
                changes["scale"] = changes.get("scale", call.scale) * scale
        if call.samples is not None:
            batch = batch_size(args, kwargs)
            changes["rows"] = None if batch is None else rows_of(len(call.samples), batch, call.images, module)
            changes["stacks"] = call.stacks if call.rows == changes["rows"] else {}
        if changes:
            self.call.push(**changes, forward=True)
        if self.registry.capacity is not None:
            open_gate(module, self.call, batch_size(args, kwargs))
        return args, kwargs

    def _check_recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a graph records of this hook: the size of the batch. The rest happened before it, in Python."""
        for name in SCALE_ARGUMENTS:
            if "scale" in (kwargs.get(name) or {}):
                raise AdapterStateError(
                    "A graph takes no scale among its arguments: run it inside serial_lora_scale(), or give the "
                    "compiled model, or its pipeline, to one of the verbs before."
                )
        self.call.batch = batch_size(args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also after an exception: close the state that `before` opened."""
        if torch.compiler.is_compiling() and self.registry.capacity is not None:
            return
        call = self.call.current()
        if call.forward:
            self.call.pop(call)


def check_scale(scale: Any, call: CallState) -> float:
    """A finite number that the state allows: fused weights have one scale, theirs."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale != scale or abs(scale) == float("inf"):
        raise AdapterStateError(f"A scale must be a finite number; got {scale!r}.")
    if call.fused and scale != 1:
        raise AdapterStateError(
            f"The adapters are fused into the weights, so they cannot be scaled by {scale}. Call unfuse_serial_lora() "
            "first, or fuse again with fuse_serial_lora(scale=...)."
        )
    return float(scale)


def check_block(call: Call, state: CallState, names: Collection[str]) -> None:
    """Raise AdapterStateError if the block that is open asks for what the model, changed inside it, no longer has."""
    if state.fused and (call.scale != 1 or call.samples is not None):
        raise AdapterStateError(
            "The adapters were fused while a block was open that scales them, or chooses them per sample: fused "
            "weights do neither. Leave the block, or call unfuse_serial_lora() first."
        )
    if gone := named_by(call.samples).difference(names):
        raise AdapterStateError(
            f"The adapters {sorted(gone)} were removed while a serial_lora_batch block was open that names them. Load "
            "them again, or leave the block."
        )


def attach(module: nn.Module, reads: Mapping[str, SerialLoraPair]) -> SerialLoraAttnProcessor:
    """Hook a module so that the named arguments of its forward go through their pairs; replaces an earlier hook."""
    detach(module)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    named = {name or names[0]: pair for name, pair in reads.items()}
    # A name that only `**kwargs` takes comes by keyword: its position is behind all that can be positional.
    positions = {name: names.index(name) if name in names else len(names) for name in named}
    hook = SerialLoraAttnProcessor({name: (positions[name], pair) for name, pair in named.items()})
    module.register_forward_pre_hook(hook, with_kwargs=True)
    mark(module, (_READS, *sorted(positions.items())))
    return hook


def detach(module: nn.Module) -> None:
    """Remove the hook that `attach` added, if there is one."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, SerialLoraAttnProcessor):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    if ours := [m for m in marks_of(module) if isinstance(m, tuple) and m[0] == _READS]:
        unmark(module, *ours)
