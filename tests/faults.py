"""Raise at any line of the package while a verb runs, to see whether its model is as before or as after."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import slora_diffusers
from slora_diffusers.core.calls import ONE_VERB
from tests.adapters import traces

PACKAGE = str(Path(slora_diffusers.__file__).parent)


class Fault(BaseException):
    """What is raised: no Exception, as KeyboardInterrupt is none."""


class OutOfMemoryFault(RuntimeError):
    """What is raised where an accelerator runs out of memory: an Exception, which code may catch."""


@contextmanager
def fault_at(line: int | None, within: str = PACKAGE, kind: type[BaseException] = Fault) -> Iterator[Callable[[], int]]:
    """Raise `kind` at the n-th line that runs inside the block in files under `within`; None only counts them."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(within):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise kind(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(grad)  # a fault in the end of a no_grad block would leave all later tests without


def lines_of(call: Callable[[], Any], within: str = PACKAGE) -> int:
    """How many lines of files under `within` a call runs."""
    with fault_at(None, within) as count:
        call()
    return count()


def state_of(model: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Everything by which a model of before could be told from a model of after."""
    registry = vars(model).get("_serial_lora")
    return {
        "output": run(),
        "weights": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        **traces(model),
        "registry": None if registry is None else (dict(registry.configs), dict(registry.active), registry.capacity,
                                                   registry.fused is None, registry.call.fused, registry.call.entered),
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


def check_faults(
    before: Any,
    call: Callable[[Any], Any],
    state: Callable[[Any], Any],
    lines: Callable[[int], Iterable[int]],
    within: str = PACKAGE,
) -> int:
    """See that a call, whatever line of it fails, leaves the state of before or of after, and can be made again.

    Args:
        before: A model or a pipeline; every fault gets a copy.
        call: What is done to it.
        state: What is compared.
        lines: From the number of lines that the call runs to those that fail.
        within: Files under which lines count.
    """
    call(copy.deepcopy(before))  # what is remembered (patterns, records) is remembered from here on
    done = copy.deepcopy(before)
    torch.manual_seed(0)
    total = lines_of(lambda: call(done), within)
    states, wrong = (state(before), state(done)), []
    for line in lines(total):
        broken = copy.deepcopy(before)
        torch.manual_seed(0)
        fault: BaseException | None = None
        try:
            with fault_at(line, within):
                call(broken)
        except Fault as raised:
            fault = raised
        now = state(broken)
        if not any(same(now, one) for one in states):
            wrong.append((line, str(fault), [key for key in now if not same(now[key], states[0][key])]))
        elif same(now, states[0]):  # a retry starts from a clean model
            torch.manual_seed(0)
            call(broken)
            if not same(state(broken), states[1]):
                wrong.append((line, str(fault), ["retry"]))
        assert not ONE_VERB._is_owned(), f"{fault} left verbs locked"  # pyright: ignore[reportAttributeAccessIssue]
    assert not wrong, f"{len(wrong)} of {total} lines: {wrong[:5]}"
    return total
