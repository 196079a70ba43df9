"""The same verbs on a pipeline: each function over a pipeline's components, as a method of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .adapters import contexts, fuse, lifecycle, status
from .convert.export import export_lora
from .files import load, save


def _verb(function: Callable[..., Any]) -> Any:
    """A method whose pipeline takes the place of the function's model."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    first, *rest = inspect.signature(function).parameters.values()
    method.__signature__ = inspect.Signature([first.replace(name="self"), *rest])  # pyright: ignore
    return method


class SerialLoraLoaderMixin:
    """Serial LoRA's verbs for a pipeline; DiffusionPipeline and ModularPipeline have them once this is imported.

    Each is the function of the same name, over those components of the pipeline that have adapters (a load: that the
    file names), all or none.
    """

    components: dict[str, Any]

    load_serial_lora = _verb(load.load_serial_lora)
    save_serial_lora = _verb(save.save_serial_lora)
    set_serial_lora = _verb(lifecycle.set_serial_lora)
    delete_serial_lora = _verb(lifecycle.delete_serial_lora)
    unload_serial_lora = _verb(lifecycle.unload_serial_lora)
    move_serial_lora = _verb(lifecycle.move_serial_lora)
    reserve_serial_lora = _verb(lifecycle.reserve_serial_lora)
    fuse_serial_lora = _verb(fuse.fuse_serial_lora)
    unfuse_serial_lora = _verb(fuse.unfuse_serial_lora)
    serial_lora_scale = _verb(contexts.serial_lora_scale)
    disable_serial_lora = _verb(contexts.disable_serial_lora)
    serial_lora_batch = _verb(contexts.serial_lora_batch)
    serial_lora_status = _verb(status.serial_lora_status)
    export_lora = _verb(export_lora)


VERBS = tuple(name for name in vars(SerialLoraLoaderMixin) if not name.startswith("_") and name != "components")


def install(pipeline_class: type) -> None:
    """Give a pipeline class the verbs, unless it has an attribute of that name already. Idempotent."""
    for verb in VERBS:
        if not hasattr(pipeline_class, verb):
            setattr(pipeline_class, verb, vars(SerialLoraLoaderMixin)[verb])
