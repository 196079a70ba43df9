"""A class of its own for a module whose calls we change, for as long as we do.

torch.compile guards on the classes of modules, and on no hook: a graph that was traced for one model would serve the
next one of its classes, with the hooks of the first. A marked class has the name, the module and the methods of the
original, and is told from it by these guards alone. Copies and pickles of a marked module are marked alike.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

from torch import nn

PART = "_serial_lora_part"
"""Attribute of a module whose calls go to a `SerialLoraPart`."""


class Marked:
    """What marked classes have beside the original's own."""

    serial_lora_kind: type
    serial_lora_marks: frozenset[Hashable]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return (_new, (self.serial_lora_kind, self.serial_lora_marks), *state)


class Relayed(Marked):
    """A module whose calls a part answers, if it has an answer; the hooks of the module are not for those."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = vars(self)[PART]
        copy = part.choice()
        if copy is None:
            return super().__call__(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return part.run(copy, self, args, kwargs)


def mark(module: nn.Module, *marks: Hashable) -> None:
    """Tell the module's class from that of others by these marks, beside those that it has."""
    kind, held = _of(type(module))
    module.__class__ = _marked(kind, held | frozenset(marks))


def unmark(module: nn.Module, *marks: Hashable) -> None:
    """Take these marks away; without any, all. A class that others have made of a marked one stays as it is."""
    kind, held = _of(type(module))
    if held:
        module.__class__ = _marked(kind, held - frozenset(marks) if marks else frozenset())


def marks_of(module: nn.Module) -> frozenset[Hashable]:
    """The marks of a module's class."""
    return _of(type(module))[1]


def _of(kind: type) -> tuple[type, frozenset[Hashable]]:
    held = vars(kind)
    if "serial_lora_marks" not in held:
        return kind, frozenset()
    return held["serial_lora_kind"], held["serial_lora_marks"]


@functools.cache
def _marked(kind: type, marks: frozenset[Hashable]) -> type:
    if not marks:
        return kind
    own = {"serial_lora_kind": kind, "serial_lora_marks": marks}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (Relayed if PART in marks else Marked, kind), {**named, **own})


def _new(kind: type, marks: frozenset[Hashable]) -> Any:
    cls = _marked(kind, marks)
    return object.__new__(cls)
