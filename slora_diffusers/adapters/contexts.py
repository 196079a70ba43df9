"""Temporary state, each a `with` block that changes nothing in the model: scale, disable, adapters per sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from ..core.batch import samples_of
from ..core.calls import Sample, named_by
from ..core.components import adapted, check_known, components_of, has_adapters
from ..core.entry import watch
from ..core.gate import set_gate
from ..core.hooks import check_scale
from ..core.parts import parts_of
from ..core.sites import unwrap
from ..core.state import call_of, check_not_fused, registry_of
from ..errors import AdapterStateError


def serial_lora_scale(model: Any, scale: float) -> AbstractContextManager[None]:
    """Scale every active adapter inside the block: `x~ = x + scale sum_i w_i s_i B_i A_i x`. Blocks multiply.

    Only this thread sees it, and nothing in the model changes. A compiled model follows without compiling anything
    if it has reserved capacity (`reserve_serial_lora`). Without, it refuses when it runs if it was compiled with
    `fullgraph=True`, and leaves the graph for the block if not.

    Args:
        model: A model with adapters, or a pipeline, over its components that have some.
        scale: Any finite number; 0 gives the base's output to the bit.

    Raises:
        AdapterStateError: If there is no adapter, or they are fused and the scale is not 1.
    """
    models = adapted(model)
    calls = [call_of(one) for one in components_of(model).values()]  # what is loaded inside is scaled, too
    scales = [call.current().scale * check_scale(scale, call) for call in calls]
    return _all(models.values(), [call.changed(scale=s) for call, s in zip(calls, scales, strict=True)])


def disable_serial_lora(model: Any) -> AbstractContextManager[None]:
    """Run the base model, or pipeline, inside the block, to the bit; the same as a scale of 0.

    Args:
        model: As for `serial_lora_scale`.

    Raises:
        AdapterStateError: As `serial_lora_scale` does.
    """
    return serial_lora_scale(model, 0.0)


def serial_lora_batch(
    model: Any, names: Iterable[Any], images_per_prompt: int | None = None
) -> AbstractContextManager[None]:
    """Serve each sample of the batch with adapters of its own inside the block.

        with serial_lora_batch(pipe, ["sketch", ("oil", 0.7), {"sketch": 0.5, "oil": 0.5}, None]):
            images = pipe(four_prompts, num_images_per_prompt=2).images  # two of each, side by side

    Args:
        model: A model with adapters, which need not be active; or a pipeline, over its components that have some.
        names: What each sample gets: a name, (name, weight), {name: weight}, several of these in a list, or None for
            the base. Without a weight, an adapter has the one it was set to (1 if it is not active). With a pipeline
            names belong to prompts (one per image is fine, too); with a bare model, to the rows of its batch. Either
            may hold the samples several times over, as classifier-free guidance does.
        images_per_prompt: Rows that each sample has, side by side; None asks the pipeline that is running, which
            knows, and is 1 where none is.

    Raises:
        AdapterStateError: If a name is unknown, the list is empty, or adapters are fused; in the forward, if the
            batch does not hold these samples, or an attention folds other axes into it.
    """
    samples = samples_of(names)
    if images_per_prompt is not None and (type(images_per_prompt) is not int or images_per_prompt < 1):
        raise AdapterStateError(f"images_per_prompt must be a whole number of at least 1; got {images_per_prompt!r}.")
    models = adapted(model)
    check_known(models, [name for sample in samples for name, _ in sample])
    for one in models.values():
        check_not_fused(registry_of(one), "serve a batch of adapters")
    states = []
    for one in models.values():
        registry = registry_of(one)
        held = tuple(tuple(part for part in sample if part[0] in registry.configs) for sample in samples)
        for part in parts_of(one).values():
            part.owner(held)  # says if the samples need different modules
        states.append(registry.call.changed(samples=held, images=images_per_prompt, rows=None, stacks={}))
    return _all(models.values(), [_whole(models.values(), samples), *states])


@contextmanager
def _whole(models: Iterable[nn.Module], samples: Iterable[Sample]) -> Iterator[None]:
    """Say at the end of a block if another thread took away what its samples name: without hooks no forward could."""
    yield
    left = {name for one in models if has_adapters(one) for name in registry_of(one).configs}
    if gone := named_by(samples) - left:
        raise AdapterStateError(
            f"The adapters {sorted(gone)} were removed while this serial_lora_batch block named them: what ran since "
            "is the base's."
        )


@contextmanager
def _all(models: Iterable[nn.Module], blocks: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        reserved = [model for model in models if registry_of(model).capacity is not None]
        for model in reserved:
            watch(model)
            stack.callback(_show, model)  # the state outside, once the blocks are closed
        for block in blocks:
            stack.enter_context(block)
        for model in reserved:
            _show(model)
        yield


def _show(model: nn.Module) -> None:
    """Write the state that holds now into the operands that graphs read."""
    registry = vars(unwrap(model)).get("_serial_lora")
    if registry is not None and registry.capacity is not None:
        set_gate(unwrap(model), registry.call)
