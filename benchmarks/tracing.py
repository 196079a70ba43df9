"""What a step does besides taking time: kernels, bytes kept for the backward pass, time per operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_WORK = ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::detach")


class KernelCount(TorchDispatchMode):
    """Count the operations that run inside, views and allocations aside: on a GPU each is a kernel, or more."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func._schema.name not in _NO_WORK:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors hold at a time, inside: of those that are given, and of all that are made.

    Args:
        held: Tensors that are there already.
        elsewhere: Tensors that do not count, since they lie on another device.
    """

    def __init__(self, held: Iterable[Any], elsewhere: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}  # storages, by the address of their Python object
        for tensor in elsewhere:
            self._add(tensor, counts=False)
        for tensor in held:
            if isinstance(tensor, Tensor):
                self._add(tensor)

    def _add(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        if (key := id(storage)) in self._known:
            return
        size = storage.nbytes() if counts else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result


def kernels(call: Callable[[], Any]) -> int:
    """The number of operations that a call runs, views and allocations aside."""
    with KernelCount() as count:
        call()
    return count.counts.total()


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between the forward, which gives the loss, and the backward, parameters aside."""
    # Storages by identity, not by address: fake tensors, which stand for a model too large to run, have none.
    known = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor  # held by the graph, so that no later storage gets its address

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(size for address, size in kept.items() if address not in known)


def time_per_operation(calls: Mapping[str, Callable[[], Any]], largest: int = 8) -> dict[str, dict[str, float]]:
    """{name: {operation: seconds}} of one run of each call, for the operations that take most; the rest is "other".

    An operation's time leaves out what it spends in those that it calls.
    """
    times = {name: _profiled(call) for name, call in calls.items()}
    most = Counter()
    for each in times.values():
        most |= Counter(each)
    chosen = [operation for operation, _ in most.most_common(largest)]
    return {
        name: {**{o: each.get(o, 0.0) for o in chosen}, "other": sum(t for o, t in each.items() if o not in chosen)}
        for name, each in times.items()
    }


def _profiled(call: Callable[[], Any]) -> dict[str, float]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key.removeprefix("aten::"): event.self_cpu_time_total * 1e-6 for event in profiler.key_averages()}
