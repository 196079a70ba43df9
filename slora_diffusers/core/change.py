"""Nothing between: the one place in which a verb changes models. It finishes, or everything is put back.

    with ONE_VERB, changing(model) as change:   # waits for forwards of other threads, remembers the state
        ...                                     # whatever is raised here, the model is as it was

A verb reads, checks and computes before it enters. Inside, hooks, pairs, registry and flags are remembered for it; what
else it changes (a weight) it names with `change.on_failure`. The lock stands in the verb's own `with`: Python gives it
back there whatever happens, where `changing` may be left suspended by a Ctrl-C in the middle of contextlib.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import AdapterStateError
from .calls import ONE_VERB, WAITING, Turn
from .entry import watch
from .layer import SerialLoraPair
from .marks import PART
from .names import CONTAINER
from .parts import SerialLoraPart
from .running import others_run, running_in_others
from .sites import unwrap

_PATIENCE = 60.0  # seconds that a verb waits for a forward of another thread
_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_always_called")
_OWN = ("save_pretrained", PART)  # attributes that verbs give to modules


class Change:
    """A change in progress: what to do, besides putting the models back, if it fails."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def on_failure(self, undo: Callable[[], Any]) -> None:
        """Call this if the change fails, after those that were named later; to be named before what it undoes."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Put back what was named."""
        while self._undo:
            self._undo[-1]()  # forgotten once it is done: an interrupt may make it begin again
            del self._undo[-1]


@contextmanager
def changing(*models: nn.Module) -> Iterator[Change]:
    """Change the adapters of models, all or none, while no other thread runs them.

    Raises:
        AdapterStateError: If another thread is generating with a pipeline of one of them, or its forward does not end.
    """
    roots = [unwrap(model) for model in models]
    for model, root in zip(models, roots, strict=True):
        if (registry := _registry(root)) is not None and registry.capacity is not None:
            watch(model)
    _refuse_while_generating(roots)
    snapshots = [Snapshot(root) for root in roots]
    change = Change()
    turns = [_turn_of(root) for root in roots]
    try:
        for turn in turns:
            turn.changed_by = threading.get_ident()
        _count(roots)
        # What has no adapter yet has no hook at which its forwards would wait.
        bare = [(root, turn) for root, turn in zip(roots, turns, strict=True) if _registry(root) is None]
        gates = [root.register_forward_pre_hook(_Gate(turn)) for root, turn in bare]
        _wait_for_forwards(roots)
        yield change
        for gate in gates:
            gate.remove()
    except GeneratorExit:  # an interrupt between here and the verb, which had done all that it does
        raise
    except BaseException:
        with _interrupts_later():
            _put_back(snapshots, change)
        raise
    finally:
        for turn in turns:
            turn.changed_by = None
        _count(roots)


@contextmanager
def reading(*models: nn.Module) -> Iterator[None]:
    """Read adapters and weights at length, while verbs of other threads need not wait.

    Raises:
        AdapterStateError: At the end, if one of them has changed the models meanwhile.
    """
    roots = [unwrap(model) for model in models]
    with ONE_VERB, nullcontext():  # after a change that is in progress
        before = [(_registry(root), _changes(root)) for root in roots]
    yield
    if before != [(_registry(root), _changes(root)) for root in roots]:
        raise AdapterStateError("Another thread changed the model's adapters while they were read: do it again.")


def _put_back(snapshots: list[Snapshot], change: Change) -> None:
    """Put everything back, and once more if an exception that was sent to this thread broke into it."""
    for attempt in range(3):
        try:
            for snapshot in snapshots:
                snapshot.restore()
            change.undo()
            return
        except BaseException:
            if attempt == 2:
                raise


def _count(models: list[nn.Module]) -> None:
    for model in models:
        if (registry := _registry(model)) is not None:
            registry.call.changes += 1


def _changes(model: nn.Module) -> int:
    return getattr(getattr(_registry(model), "call", None), "changes", 0)


def pass_gate(model: nn.Module, turn: Turn) -> Turn:
    """Once the model's own hooks wait in front of its forwards: take away what waited so far, whose turn they take."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Gate):
            del model._forward_pre_hooks[key]
            return hook.turn
    return turn


class _Gate:
    """Forward pre-hook of a model while its first adapter is put in."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.turn.wait()


class Snapshot:
    """Everything of one model that its adapters are made of, besides the base's weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.registry = _registry(model)
        self.fields = _copied(vars(self.registry)) if self.registry is not None else {}
        self.fused = self.registry is not None and self.registry.call.fused
        self.trains: list[tuple[nn.Parameter, bool]] = []
        self.modules: list[tuple[nn.Module, type, _Kept | None]] = []
        self.pairs: list[tuple[SerialLoraPair, dict[str, Any], Any]] = []
        self.parts: list[tuple[SerialLoraPart, dict[str, Any]]] = []
        for module in model.modules():  # thousands, of which few have anything: it takes milliseconds
            state = module.__dict__
            self.modules.append((module, type(module), _Kept(state) if _has_something(state) else None))
            self.trains += [(p, p.requires_grad) for p in state["_parameters"].values() if p is not None]
            if isinstance(module, SerialLoraPair):
                self.pairs.append((module, _copied(state), module.reserved and module.reserved.state()))
            elif isinstance(module, SerialLoraPart):
                self.parts.append((module, _copied(state)))

    def restore(self) -> None:
        """Put it all back."""
        for module, kind, kept in self.modules:
            if type(module) is not kind:
                module.__class__ = kind
            if kept is not None or _has_something(module.__dict__):
                (kept or _Kept({})).put_back(module)
        for pair, state, reserved in self.pairs:
            _refill(vars(pair), state)
            if pair.reserved is not None:
                pair.reserved.restore(reserved)
                pair.call.written = None
        for part, state in self.parts:
            _refill(vars(part), state)
        for parameter, trains in self.trains:
            parameter.requires_grad_(trains)
        if self.registry is None:
            vars(self.model).pop("_serial_lora", None)
        else:
            _refill(vars(self.registry), self.fields)
            self.registry.call.fused = self.fused
            vars(self.model)["_serial_lora"] = self.registry


class _Kept:
    """What one module had of what verbs change, besides being a pair."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        container = state.get("_modules", {}).get(CONTAINER)
        self.hooks = {name: dict(state.get(name, {})) for name in _HOOKS}
        self.container = container
        self.held = None if container is None else dict(container._modules)
        self.own = {name: state[name] for name in _OWN if name in state}

    def put_back(self, module: nn.Module) -> None:
        """Give it back to the module."""
        for name, saved in self.hooks.items():
            _refill(getattr(module, name), saved)
        if self.container is None:
            module._modules.pop(CONTAINER, None)
        else:
            module._modules[CONTAINER] = self.container
            _refill(self.container._modules, self.held or {})
        for name in _OWN:
            vars(module).pop(name, None)
        vars(module).update(self.own)


def _has_something(state: Mapping[str, Any]) -> bool:
    return (
        bool(state["_forward_pre_hooks"] or state["_forward_hooks"])
        or CONTAINER in state["_modules"]
        or any(name in state for name in _OWN)
    )


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state whose own containers are copied, so that what is put into them later is not in the copy."""
    return {key: copy.copy(value) if isinstance(value, dict | list | set) else value for key, value in state.items()}


def _refill(target: Any, saved: dict[Any, Any]) -> None:
    target.clear()
    target.update(saved)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back while the models are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _registry(model: nn.Module) -> Any:
    return vars(model).get("_serial_lora")


def _turn_of(model: nn.Module) -> Turn:
    registry = _registry(model)
    return Turn() if registry is None else registry.call.turn


def _refuse_while_generating(models: list[nn.Module]) -> None:
    """A pipeline runs its models many times for one image: a change between two of them is of neither state."""
    for pipe in running_in_others(["__call__"]):
        held = vars(pipe).values() if hasattr(pipe, "components") and not isinstance(pipe, nn.Module) else ()
        if any(value is model for value in held for model in models):
            raise AdapterStateError(
                f"Another thread is generating with {type(pipe).__name__}, and a change now would give it an image of "
                "neither state. Wait for it, or choose adapters per call, which only their own thread sees: "
                "serial_lora_batch, serial_lora_scale, disable_serial_lora."
            )


def _wait_for_forwards(models: list[nn.Module]) -> None:
    end = time.monotonic() + _PATIENCE
    while others_run(models, set(WAITING)):
        if time.monotonic() > end:
            raise AdapterStateError(
                f"Another thread's forward of this model has not ended in {_PATIENCE:.0f} s. Change adapters between "
                "its calls, or choose them per call with serial_lora_batch."
            )
        time.sleep(0.001)
