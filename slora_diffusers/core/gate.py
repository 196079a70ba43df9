"""Before a graph runs: write the scale, or each sample's adapters, into the operands that it reads.

The operands are the model's, and a call's state is its thread's: a forward that needs other values than those that
are there waits until no other thread runs the model. Nobody waits who needs the same.
"""

from __future__ import annotations

import threading
import time

from torch import nn

from ..errors import AdapterStateError
from .calls import WAITING, Call, CallState, between_verbs, named_by
from .compiled import is_frozen, runs_compiled
from .layer import SerialLoraPair
from .running import others_run

_WRITING = threading.Lock()
_QUEUED: set[int] = set()
"""Threads whose forward waits here: they have not begun to read the operands."""
_PATIENCE = 60.0
_FROZEN = (
    "torch._inductor's freezing writes weights into the compiled graph, and with them what is reserved for adapters, "
    "so that no change would reach it. Compile without freezing; or fuse the adapter, without reserve_serial_lora()."
)


def open_gate(model: nn.Module, call: CallState, batch: int | None) -> None:
    """At the start of a forward: have the operands hold what this thread's call asks for.

    Raises:
        AdapterStateError: If they have no room for it, and something compiled runs the model; if a graph has them as
            constants; or another thread's forward, which needs them otherwise, does not end.
    """
    now, end = call.current(), None
    try:
        while not _write(model, call, now, batch):
            end = time.monotonic() + _PATIENCE if end is None else end
            if time.monotonic() > end:
                raise AdapterStateError(
                    "Another thread runs the model with other adapters or another scale, and its forward has not ended "
                    f"in {_PATIENCE:.0f} s. Reserved operands hold one mix at a time: let forwards take turns."
                )
            _QUEUED.add(threading.get_ident())
            time.sleep(0.001)
    finally:
        _QUEUED.discard(threading.get_ident())


def set_gate(model: nn.Module, call: CallState) -> None:
    """When a block opens or closes: the same for what has no hook to do it (exported programs), if nothing runs.

    Raises:
        AdapterStateError: If there is no room, and something compiled runs the model; if a graph has them as constants.
    """
    between_verbs(lambda: _write(model, call, call.current(), None))


def _write(model: nn.Module, call: CallState, now: Call, batch: int | None) -> bool:
    """Write it unless another thread's forward reads what is there; False if so."""
    wanted = (now.scale, now.samples, _each(now))
    with _WRITING:
        differs = call.written != wanted
        rebatched = now.samples is not None and call.batch != batch
        if (differs or rebatched) and others_run([model], {*WAITING, *_QUEUED}):
            return False
        if differs:
            if is_frozen(model):
                raise AdapterStateError(_FROZEN)
            call.written = None
            pairs = [module for module in model.modules() if isinstance(module, SerialLoraPair)]
            fits = [pair.fill_reserved(now, _each(now)) for pair in pairs]
            if not all(fits) and runs_compiled(model):
                raise AdapterStateError(_no_room(pairs, now))
            call.written = wanted
        call.batch = batch
        _QUEUED.discard(threading.get_ident())
        return True


def _each(call: Call) -> int:
    """Rows of one sample, side by side."""
    if call.rows is None or call.samples is None:
        return call.images or 1
    return call.rows.index(1) if len(call.samples) > 1 and 1 in call.rows else 1


def _no_room(pairs: list[SerialLoraPair], call: Call) -> str:
    names = sorted(named_by(call.samples))
    ranks = {n: max((len(pair.matrices(n)[0]) for pair in pairs if n in pair.scaling), default=0) for n in names}
    room = next(pair.reserved for pair in pairs if pair.reserved is not None)
    return (
        f"A batch of {len(call.samples or ())} samples with the adapters {ranks} (name: rank) needs a summed rank of "
        f"{sum(ranks.values())}, but what is compiled has room for {len(room.A)}, and for {len(room.gate)} samples. "
        "Make smaller batches, or reserve more with reserve_serial_lora(capacity=..., samples=...) before compiling."
    )
