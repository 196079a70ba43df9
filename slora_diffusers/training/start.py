"""Start what a run trains from the gradient of its loss: Serial LoRA and PEFT's LoRA alike, with or without a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapters.initialise import gradient_starts, put_starts

WARMUP_STEPS = 30  # of a new head, before its gradient says anything
WARMUP_RATE = 3e-3


def start_from_gradient(model: nn.Module, backward: Callable[[], object]) -> list[str]:
    """Put every A of a model's trainable pairs or LoRAs on the leading directions of the loss's gradient.

    Args:
        model: An adapted model whose B's are zero.
        backward: See `initialize_serial_lora`.

    Returns:
        The names of the A's that no gradient reached, which keep their start.
    """
    named = dict(model.named_parameters())
    As = [name for name, parameter in named.items() if "lora_A" in name and parameter.requires_grad]
    factors = {name: (named[name], named[name.replace("lora_A", "lora_B")]) for name in As}
    starts, _ = gradient_starts([model], factors, backward)
    put_starts(factors, starts, lambda undo: None)  # a run that fails here starts anew
    return [name for name in factors if name not in starts]


@contextmanager
def warm_head(model: nn.Module, head: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> Iterator[None]:
    """Inside, a new head has been trained for a few Adam steps on frozen features; afterwards it is new again.

    Args:
        model: The model that the losses are computed with.
        head: Its part that is new.
        losses: The loss of one batch each; they are gone through in turn.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    frozen = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in parameters)]
    new = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=WARMUP_RATE)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for step in range(WARMUP_STEPS):
            losses[step % len(losses)]().backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, new, strict=True):
                parameter.copy_(value)
        for parameter in frozen:
            parameter.requires_grad_(True)
