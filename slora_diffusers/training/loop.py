"""The training loop: a generator that yields one `Step` per optimizer step, and stops before a bad one."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..core.processes import whole
from ..errors import SerialLoraError
from .data.batches import Batch
from .randomness import counter_seed


class DivergedError(SerialLoraError):
    """The loss or the gradient is no longer finite."""


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken.

    Attributes:
        number: Steps done, counted from the run's beginning.
        loss: Mean loss over the step's samples, on all processes.
        lr: Learning rate of the first group.
        grad_norm: Norm of the gradient before clipping.
        seconds: Wall time of the step.
        memory: Peak bytes so far: of the accelerator, else of this process.
        interrupted: Whether the run was asked to end (a signal, the launcher's end) on any process.
    """

    number: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    memory: int
    interrupted: bool = False


# A key, the launcher's or the system's end, a dropped ssh, a closed console on Windows; not every system has each.
SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, n))


class Interrupt:
    """Whether someone asked the run to end: by a signal, or by ending `accelerate launch`, which passes none on."""

    def __init__(self) -> None:
        self.signalled = False
        # Set by `accelerate launch`. Another parent may well end before the run does, as a shell with nohup.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    @property
    def requested(self) -> bool:
        return self.signalled or (self._launcher is not None and os.getppid() != self._launcher)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Inside, the first of `SIGNALS` is noted, to be acted on after the step; a second one acts at once."""
    interrupt = Interrupt()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        hangup = getattr(signal, "SIGHUP", None)
        ignored = {n for n, h in handlers.items() if h is None or (n == hangup and h == signal.SIG_IGN)}  # by nohup
        before = {n: h for n, h in handlers.items() if n not in ignored}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signalled = True
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_steps(
    accelerator: Accelerator,
    models: Sequence[nn.Module],
    optimizer: Any,
    schedule: Any,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    *,
    start: int,
    stop: int,
    max_grad_norm: float = 1.0,
    interrupt: Interrupt | None = None,
) -> Iterator[Step]:
    """Take the steps start + 1, ..., stop.

    Args:
        accelerator: Knows the processes, the precision and the gradient accumulation.
        models: The prepared models that train.
        optimizer: Their prepared optimizer.
        schedule: The learning rate's schedule, stepped once per optimizer step.
        batches: Micro-batches, `gradient_accumulation_steps` of them per step.
        loss_of: Loss of a micro-batch, a scalar.
        start: Steps done before.
        stop: Steps done at the end.
        max_grad_norm: The gradient is scaled down to this norm.
        interrupt: Makes the loop end after the step in which it is requested.

    Raises:
        DivergedError: Before the optimizer would take a step with a loss or gradient that is not finite.
    """
    interrupt = interrupt or Interrupt()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number in range(start + 1, stop + 1):
        began, loss, norm = time.perf_counter(), torch.zeros((), device=accelerator.device), None
        for _ in range(accelerator.gradient_accumulation_steps):
            batch = next(batches)
            torch.manual_seed(counter_seed(batch.seed, "modules", batch.number, accelerator.process_index))
            with accelerator.accumulate(*models):
                micro_loss = loss_of(batch)
                accelerator.backward(micro_loss)
                loss += micro_loss.detach() / accelerator.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
                    mean_loss, stop_now = _agree(accelerator, loss, interrupt)
                    _check_finite(accelerator, number, mean_loss, norm)
                optimizer.step()
                optimizer.zero_grad()
        lr = optimizer.param_groups[0]["lr"]
        schedule.step()
        seconds = time.perf_counter() - began
        yield Step(number, mean_loss, lr, _number(norm), seconds, peak_memory(accelerator.device), stop_now)
        if stop_now:
            return


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes held so far: on the accelerator, or by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _agree(accelerator: Accelerator, loss: Tensor, interrupt: Interrupt) -> tuple[float, bool]:
    """The mean loss over processes, and whether any of them was interrupted: one message, so that all agree."""
    mine = torch.stack([loss.float(), torch.tensor(float(interrupt.requested), device=loss.device)])
    mean = accelerator.reduce(mine, reduction="mean")
    assert isinstance(mean, Tensor)
    return mean[0].item(), mean[1].item() > 0


def _check_finite(accelerator: Accelerator, number: int, loss: float, norm: Any) -> None:
    # With fp16's gradient scaler, overflowing gradients are ordinary: the scaler skips the step and scales down.
    if math.isfinite(loss) and (accelerator.scaler is not None or math.isfinite(_number(norm))):
        return
    raise DivergedError(
        f"step {number} has loss {loss} and gradient norm {_number(norm)}; it was not taken, the checkpoints before "
        "it are kept. Lower --learning_rate or train in bf16 instead of fp16, and resume from the last checkpoint."
    )


def _number(norm: Any) -> float:
    if norm is None:  # DeepSpeed clips inside its engine and tells no norm
        return 0.0
    return float(whole(norm) if isinstance(norm, Tensor) else norm)
