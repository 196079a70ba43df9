"""Which threads are inside a forward of a model, read from their stacks: true after an interrupt, too."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Collection, Sequence
from types import FrameType

from torch import nn

_FORWARDS = ("_call_impl", "_wrapped_call_impl", "forward")


def others_run(models: Sequence[nn.Module], besides: Collection[int] = ()) -> bool:
    """Whether another thread is inside a forward of a model, compiled or not; those of `besides` only wait there."""
    return any(
        frame.f_code.co_name in _FORWARDS and _is_one_of(frame.f_locals.get("self"), models)
        for frame in frames_of_others(besides)
    )


def frames_of_others(besides: Collection[int] = ()) -> list[FrameType]:
    """Every frame of every other thread, innermost first."""
    me = threading.get_ident()
    frames: list[FrameType] = []
    if threading.active_count() == 1:
        return frames
    # Before Python 3.12 a frame object that is made may start a collection, which lets the other thread run and leave
    # the very frame that is being read (python/cpython#106883 pauses it in `_current_frames` for the same reason).
    collecting = gc.isenabled()
    gc.disable()
    try:
        for thread, frame in sys._current_frames().items():
            inner: FrameType | None = None if thread == me or thread in besides else frame
            while inner is not None:
                frames.append(inner)
                inner = inner.f_back
    finally:
        if collecting:
            gc.enable()
    return frames


def _is_one_of(running: object, models: Sequence[nn.Module]) -> bool:
    if not isinstance(running, nn.Module):
        return False
    inner = vars(running).get("_modules", {}).get("_orig_mod", running)  # of a torch.compile wrapper
    return any(inner is model for model in models)
