"""Which threads are inside a forward of a model, read from their stacks: true after an interrupt, too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from types import FrameType

from torch import nn

_FORWARDS = ("_call_impl", "_wrapped_call_impl", "forward")


def others_run(models: Sequence[nn.Module], besides: Collection[int] = ()) -> bool:
    """Whether another thread is inside a forward of a model, compiled or not; those of `besides` only wait there."""
    return any(
        frame.f_code.co_name in _FORWARDS and _is_one_of(frame.f_locals.get("self"), models)
        for frame in frames_of_others(besides)
    )


def frames_of_others(besides: Collection[int] = ()) -> Iterator[FrameType]:
    """Every frame of every other thread, innermost first."""
    me = threading.get_ident()
    if threading.active_count() == 1:
        return
    for thread, frame in sys._current_frames().items():
        inner: FrameType | None = None if thread == me or thread in besides else frame
        while inner is not None:
            yield inner
            inner = inner.f_back


def _is_one_of(running: object, models: Sequence[nn.Module]) -> bool:
    if not isinstance(running, nn.Module):
        return False
    inner = vars(running).get("_modules", {}).get("_orig_mod", running)  # of a torch.compile wrapper
    return any(inner is model for model in models)
