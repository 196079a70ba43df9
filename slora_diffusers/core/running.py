"""Which threads are inside a forward of a model, read from their stacks: true after an interrupt, too."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Collection, Sequence
from inspect import CO_NEWLOCALS
from types import FrameType

from torch import nn

_FORWARDS = ("_call_impl", "_wrapped_call_impl", "forward")


def others_run(models: Sequence[nn.Module], besides: Collection[int] = ()) -> bool:
    """Whether another thread is inside a forward of a model, compiled or not; those of `besides` only wait there."""
    return any(_is_one_of(running, models) for running in running_in_others(_FORWARDS, besides))


def running_in_others(methods: Collection[str], besides: Collection[int] = ()) -> list[object]:
    """What every other thread runs one of these methods of, innermost first."""
    me = threading.get_ident()
    found: list[object] = []
    if threading.active_count() == 1:
        return found
    # Before Python 3.12 a frame object or a dictionary of its variables that is made may start a collection, which lets
    # the other thread run and leave the very frame that is being read: a crash (python/cpython#106883 pauses the
    # collector in `_current_frames` for the same reason).
    collecting = gc.isenabled()
    try:
        gc.disable()
        for thread, frame in sys._current_frames().items():
            inner: FrameType | None = None if thread == me or thread in besides else frame
            while inner is not None:
                if inner.f_code.co_name in methods:
                    found.append(_owner_of(inner))
                inner = inner.f_back
    finally:
        if collecting:
            gc.enable()
    return found


def _owner_of(frame: FrameType) -> object:
    """The object whose method runs in a frame of another thread."""
    variables = frame.f_locals
    owner = variables.get("self")
    # Before Python 3.13 this is a copy that the frame keeps, and writes over when it is next asked for. What that frees
    # may let the other thread run in the midst of it, and crash: so leave nothing there, unless a debugger works on it.
    if sys.version_info < (3, 13) and frame.f_trace is None and frame.f_code.co_flags & CO_NEWLOCALS:
        variables.clear()
    return owner


def _is_one_of(running: object, models: Sequence[nn.Module]) -> bool:
    if not isinstance(running, nn.Module):
        return False
    inner = vars(running).get("_modules", {}).get("_orig_mod", running)  # of a torch.compile wrapper
    return any(inner is model for model in models)
