"""Start what a run trains from the gradient of its loss: Serial LoRA and PEFT's LoRA alike, with or without a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..adapters.initialise import (
    NotFiniteError,
    gradient_starts,
    kept,
    put_starts,
    record_start,
    same_draws,
)
from ..core.components import adapted
from ..core.pair import GRADIENT
from ..core.processes import is_sharded, mean
from .trained_parts import head_of

if TYPE_CHECKING:
    from .fit import Task
    from .run import Run

logger: Any = get_logger(__name__)

WARMUP_STEPS = 30  # of a new head, before its gradient says anything
WARMUP_RATE = 3e-3
PASSES = 2


def start_run(run: Run, task: Task) -> None:
    """What --init gradient does before the first step; a resumed run has its start behind it."""
    if run.options.init != GRADIENT:
        return
    models = run.models
    if run.done == 0:
        batches = list(islice(task.read(0), run.options.init_batches))
        with_heads = [found for model in models.values() if (found := head_of(model)) is not None]
        heads = [one.head for one in with_heads if any(p.requires_grad for p in one.head.parameters())]
        total = PASSES * len(batches) + (WARMUP_STEPS if heads else 0)
        quiet = not run.place.accelerator.is_local_main_process
        with tqdm(total=total, desc="gradient start", unit="batch", disable=quiet) as bar, ExitStack() as stack:

            def loss_of(number: int) -> Tensor:
                bar.update()
                return task.loss(batches[number])

            losses = [lambda number=number: loss_of(number) for number in range(len(batches))]
            if heads:
                stack.enter_context(warm_heads(list(models.values()), heads, losses, list(run.called.values())))
            unchanged = _scaled_start(models, losses, run.place.accelerator.scaler)
        run.optimization.restart_average()
        if unchanged:
            logger.warning("no gradient reached %s, which start as kaiming", ", ".join(unchanged))
    for model in models.values():
        if adapted(model, required=False):
            record_start(model, "default")


def start_from_gradient(models: Mapping[str, nn.Module], backward: Callable[[], object]) -> list[str]:
    """Put every A of the models' trainable pairs or LoRAs on the leading directions of the loss's gradient.

    Args:
        models: Adapted models whose B's are zero.
        backward: See `initialize_serial_lora`.

    Returns:
        The names of the A's that no gradient reached, which keep their start.
    """
    named = {f"{part}.{key}": p for part, model in models.items() for key, p in model.named_parameters()}
    As = [name for name, parameter in named.items() if "lora_A" in name and parameter.requires_grad]
    factors = {name: (named[name], named[name.replace("lora_A", "lora_B")]) for name in As}
    starts, _ = gradient_starts(list(models.values()), factors, backward, PASSES)
    put_starts(factors, starts, lambda undo: None)  # a run that fails here starts from scratch
    return [name for name in factors if name not in starts]


@contextmanager
def warm_heads(
    models: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    called: Sequence[nn.Module] = (),
) -> Iterator[None]:
    """Inside, new heads have been trained for a few Adam steps on frozen features; afterwards they are new again.

    Args:
        models: The models that the losses are computed with.
        heads: Their parts that are new.
        losses: The loss of one batch each; they are gone through in turn.
        called: The models as they are called, if that is through a wrapper of several processes.
    """
    own = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
    ids = {id(parameter) for parameter in own}
    rest = [p for model in models for p in model.parameters() if p.requires_grad and id(p) not in ids]
    optimizer = torch.optim.Adam(own, lr=WARMUP_RATE)
    with kept(models, own), same_draws(models):
        with ExitStack() as apart:  # DDP waits for the gradients of all, and most are frozen here
            for model in called:
                if isinstance(model, DistributedDataParallel):
                    apart.enter_context(model.no_sync())
            for parameter in rest:
                parameter.requires_grad_(False)
            for step in range(WARMUP_STEPS):
                optimizer.zero_grad()
                losses[step % len(losses)]().backward()
                for parameter in own:
                    if parameter.grad is not None and not is_sharded(parameter):
                        parameter.grad = mean(parameter.grad)
                optimizer.step()
        for parameter in rest:
            parameter.requires_grad_(True)
        yield


def _scaled_start(models: Mapping[str, nn.Module], losses: Sequence[Callable[[], Tensor]], scaler: Any) -> list[str]:
    """With fp16's gradient scaler, the gradient at the largest factor that does not overflow: small ones vanish."""
    factors = [1.0] if scaler is None else [float(scaler.get_scale()) / 16**power for power in range(6)]
    for factor in factors:
        try:
            return start_from_gradient(models, lambda factor=factor: [(loss() * factor).backward() for loss in losses])
        except NotFiniteError:
            if factor == factors[-1]:
                raise
    raise AssertionError
