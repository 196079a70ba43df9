"""What holds for one call only: the scale, on or off, and which adapter serves which sample.

The state lives in a context variable, so that it nests, ends with its `with` block whatever happens inside, is never
seen by another thread, and changes nothing in the model.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

Verb = TypeVar("Verb", bound=Callable[..., Any])
Sample = tuple[tuple[str, float | None], ...]
"""The adapters of one sample and their weights, None for the weight that is set; an empty one is the base."""


def named_by(samples: Iterable[Sample] | None) -> set[str]:
    """The adapters that samples name."""
    return {name for sample in samples or () for name, _ in sample}


@dataclass(frozen=True, eq=False)
class Call:
    """The state of one call.

    Args:
        scale: Factor on every active adapter; 0 gives the base exactly.
        samples: The adapters of each sample of the batch; None: all samples alike.
        images: Images of each sample, side by side in the batch; None: as the pipeline that calls says, else one.
        rows: Which of the samples each row of the model's batch is, known inside the call.
        stacks: Per-pair operands of `samples`, filled on first use and dropped with the call.
        outer: The state that holds again when this one ends.
        forward: Whether the model's own forward opened this state, and so closes it.
    """

    scale: float = 1.0
    samples: tuple[Sample, ...] | None = None
    images: int | None = None
    rows: tuple[int, ...] | None = None
    stacks: dict[Any, tuple[torch.Tensor, torch.Tensor]] | None = None
    outer: Call | None = None
    forward: bool = False


NEUTRAL = Call()


class CallState:
    """The calls in progress on one model, shared by all its pairs. Copies and pickles start neutral."""

    def __init__(self) -> None:
        self._current: ContextVar[Call] = ContextVar("serial_lora_call", default=NEUTRAL)
        self._lock = threading.Lock()
        self._open: set[Call] = set()
        self.entered = 0  # how many states are open, in any thread
        self.fused = False  # whether the adapters are merged into the weights, where no call can scale them
        self.turn = Turn()
        self.changes = 0  # how often a verb began or ended to change the model
        self.batch: int | None = None  # of the forward in progress, for what is compiled with reserved capacity
        self.written: Any = None  # what the reserved operands hold; None: not known

    def current(self) -> Call:
        """The state that holds here and now."""
        # Dynamo cannot trace a context variable. With no block open the state is neutral, which it can guard on; with
        # one open it breaks the graph here (correct, in eager) or, under fullgraph=True, refuses.
        if torch.compiler.is_compiling() and not self.entered:
            return NEUTRAL
        return self._current.get()

    def push(self, **changes: Any) -> Call:
        """Open a state: the current one with some fields replaced. `pop` closes it; `changed` does both."""
        return self._enter(self._next(changes))

    def pop(self, call: Call) -> None:
        """Close the state that `push` opened, and all that were left open inside it, where they hold."""
        inside = now = self._current.get()
        while now is not None and now is not call:
            now = now.outer
        if now is call:  # if not, this is another thread, which an interrupt has left it to
            self._current.set(call.outer or NEUTRAL)
        while inside is not None and now is call and inside is not call:
            self._count(inside, False)
            inside = inside.outer
        self._count(call, False)

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """The current state with some fields replaced, inside a `with` block."""
        call = self._next(changes)
        try:  # an interrupt while the state is opened finds it here
            self._enter(call)
            yield
        finally:
            self.pop(call)

    def _next(self, changes: dict[str, Any]) -> Call:
        outer = self._current.get()
        return replace(outer, **{"outer": outer, "forward": False, **changes})

    def _enter(self, call: Call) -> Call:
        self._current.set(call)
        self._count(call, True)
        return call

    def _count(self, call: Call, is_open: bool) -> None:
        with self._lock:
            (self._open.add if is_open else self._open.discard)(call)
            self.entered = len(self._open)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallState:
        copy = memo[id(self)] = CallState()
        copy.fused = self.fused
        return copy

    def __getstate__(self) -> dict[str, bool]:
        return {"fused": self.fused}

    def __setstate__(self, state: dict[str, bool]) -> None:
        self.__init__()
        self.fused = state["fused"]


ONE_VERB = threading.RLock()
"""Held while a verb changes models: verbs come one after another, and forwards that meet one wait for it here."""

WAITING: set[int] = set()
"""Threads whose forward waits for a verb, of whatever model: the verb need not wait for them in turn."""


def alone(verb: Verb) -> Verb:
    """A verb for which those of other threads wait from its first check on: what it has checked is what it changes."""

    @functools.wraps(verb)
    def after_others(*args: Any, **kwargs: Any) -> Any:
        with ONE_VERB, nullcontext():  # the second, so that a debugger's exception at the end frees the first
            return verb(*args, **kwargs)

    return after_others  # pyright: ignore[reportReturnType]


def between_verbs(call: Callable[[], object] = lambda: None) -> None:
    """Do something while no verb of another thread is at work; such a verb does not wait for this thread meanwhile."""
    me = threading.get_ident()
    WAITING.add(me)
    try:
        with ONE_VERB:  # it is free as soon as the verb has ended, however it ended
            call()
    finally:
        WAITING.discard(me)


class Turn:
    """Whose turn it is: a forward of another thread waits while a verb changes the model's adapters."""

    def __init__(self) -> None:
        self.changed_by: int | None = None  # the thread whose verb is at work

    def wait(self) -> None:
        """Before a forward: let a verb of another thread finish."""
        if self.changed_by not in (None, threading.get_ident()):
            between_verbs()
