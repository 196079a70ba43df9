"""Count what a forward really computes: every aten operation that is not a view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OpCounter(TorchDispatchMode):
    """Counts operations below autograd and autocast; `copies` are the casts and moves among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def casts(self) -> int:
        return self.counts["_to_copy"]


def count_ops(call: Callable[[], Any]) -> Counter[str]:
    """{operation: how often} of one call, without its views."""
    with OpCounter() as counter:
        call()
    # Views that torch writes as operations of their own: they compute nothing.
    return Counter({name: n for name, n in counter.counts.items() if name not in ("_unsafe_view", "detach")})


def count_casts(call: Callable[[], Any]) -> int:
    """How many tensors a call casts to another dtype or moves to another device."""
    with torch.no_grad(), OpCounter() as counter:
        call()
    return counter.casts
