"""Temporary state, each a `with` block that changes nothing in the model: scale, disable, one adapter per sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..core.hooks import check_scale
from ..core.state import check_known, check_not_fused, registry_of
from ..errors import AdapterStateError


@contextmanager
def serial_lora_scale(model: nn.Module, scale: float) -> Iterator[None]:
    """Scale every active adapter inside the block: `x~ = x + scale sum_i w_i s_i B_i A_i x`. Blocks multiply.

    Only this thread sees it, and nothing in the model changes. A model compiled with `fullgraph=True` refuses it
    when it runs; others leave the compiled graph for the block.

    Args:
        model: A model with adapters.
        scale: Any finite number; 0 gives the base's output to the bit.

    Raises:
        AdapterStateError: If the model has no adapter, or they are fused and the scale is not 1.
    """
    call = registry_of(model).call
    with call.changed(scale=call.current().scale * check_scale(scale, call)):
        yield


@contextmanager
def disable_serial_lora(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the block, to the bit; the same as a scale of 0."""
    with serial_lora_scale(model, 0.0):
        yield


@contextmanager
def serial_lora_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Serve each sample of the batch with an adapter of its own inside the block.

    Args:
        model: A model with adapters; they need not be active.
        names: One adapter name per sample, or None for the base. A batch that holds the samples several times over,
            as classifier-free guidance does, repeats the names. The weight of an adapter is the one it was set to
            (1 if it is not active).

    Raises:
        AdapterStateError: If a name is unknown, the list is empty, or adapters are fused; in the forward, if the
            batch is no multiple of the names, or an attention folds other axes into it.
    """
    registry = registry_of(model)
    if isinstance(names, str) or not len(names):
        raise AdapterStateError(f"serial_lora_batch takes a list with one adapter name per sample; got {names!r}.")
    check_known(registry, [name for name in names if name is not None])
    check_not_fused(registry, "serve a batch of adapters")
    with registry.call.changed(samples=tuple(names), stacks={}):
        yield
