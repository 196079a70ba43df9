"""What holds for one call only: the scale, on or off, and which adapter serves which sample.

The state lives in a context variable, so that it nests, ends with its `with` block whatever happens inside, is never
seen by another thread, and changes nothing in the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

Sample = tuple[tuple[str, float | None], ...]
"""The adapters of one sample and their weights, None for the weight that is set; an empty one is the base."""


@dataclass(frozen=True)
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
        self.entered = 0  # how many states are open, in any thread
        self.fused = False  # whether the adapters are merged into the weights, where no call can scale them
        self.turn = Turn()
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
        outer = self._current.get()
        call = replace(outer, **{"outer": outer, "forward": False, **changes})
        self._current.set(call)
        self._count(1)
        return call

    def pop(self, call: Call) -> None:
        """Close the state that `push` opened, and all that were left open inside it."""
        self._count(-1)
        self._current.set(call.outer or NEUTRAL)

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """The current state with some fields replaced, inside a `with` block."""
        call = self.push(**changes)
        try:
            yield
        finally:
            self.pop(call)

    def _count(self, by: int) -> None:
        with self._lock:
            self.entered += by

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
