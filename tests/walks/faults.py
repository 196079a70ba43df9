"""Exceptions in the middle of a verb: at the n-th line of the library that it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import slora_diffusers

PACKAGE = str(Path(slora_diffusers.__file__).parent)


class OutOfMemoryFault(RuntimeError):
    """Stands for the accelerator's out-of-memory error."""


class InterruptFault(KeyboardInterrupt):
    """Stands for Ctrl-C."""


KINDS: tuple[type[BaseException], ...] = (OutOfMemoryFault, InterruptFault)


@contextmanager
def fault(line: int | None, kind: type[BaseException] = OutOfMemoryFault) -> Iterator[None]:
    """Inside, an exception is raised at the `line`-th line of the library that runs; None raises none."""
    if line is None:
        yield
        return
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return trace if event == "call" else None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise kind("injected")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
