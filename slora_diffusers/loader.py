"""The same verbs on a pipeline: each goes to the components (transformer, text encoders) that have adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import attach, contexts, fuse
from .adapters.status import SerialLoraStatus, serial_lora_status
from .config import SerialLoraConfig
from .convert import ExportReport, export_lora
from .core.sites import unwrap
from .core.state import Weights, check_active, names_with_weights, registry_of
from .errors import AdapterFileError, AdapterStateError
from .files import load, save
from .files.format import WEIGHT_NAME, AdapterTensors, check_hub_arguments, read_adapter
from .files.hub import check_publishing, publish


class SerialLoraLoaderMixin:
    """Serial LoRA's verbs for a pipeline. Every DiffusionPipeline has them once slora_diffusers is imported."""

    components: dict[str, Any]

    def load_serial_lora(
        self,
        source: load.Source,
        adapter_name: str | None = None,
        weight: float = 1.0,
        strict: bool = True,
        config: SerialLoraConfig | None = None,
        **hub: Any,
    ) -> dict[str, load.LoadReport]:
        """Load an adapter into the components it was made for, all or none; see `load_serial_lora` of a model.

        Returns:
            {component: report}.
        """
        check_hub_arguments(hub)
        load.check_weight(weight)
        tensors = read_adapter(source, **hub)
        modules = _modules(self)
        names = tensors.component_names()
        if names == ["model"] and "transformer" in modules:
            raise AdapterFileError(
                "The source was saved from a bare model that is not diffusers' own (component 'model'); load it into "
                "that model with load_serial_lora(model, source)."
            )
        known = [name for name in names if name in modules]
        if not known or (strict and len(known) < len(names)):
            raise AdapterFileError(
                f"The adapter is for the components {names}, but {type(self).__name__} has "
                f"{sorted(modules)}. Load it into a pipeline that has them"
                + (", or pass strict=False." if known else ".")
            )
        if adapter_name is None:
            adapter_name = _free_name(self)
        plans = [load.plan_load(modules[name], tensors, name, adapter_name, strict, config) for name in known]
        tensors.warn_of_rest(known)
        return {name: plan.apply(weight) for name, plan in zip(known, plans, strict=True)}

    def save_serial_lora(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str = WEIGHT_NAME,
        dtype: torch.dtype | None = None,
        is_main_process: bool = True,
        push_to_hub: bool | str = False,
        **hub: Any,
    ) -> Path:
        """Write one adapter, of all the components that have it, to one file; see `save_serial_lora` of a model."""
        check_publishing(push_to_hub, hub)
        adapted = _adapted(self)
        name = adapter_name or _the_adapter(adapted)
        parts = {
            component: save.serial_lora_state_dict(model, name, component)
            for component, model in adapted.items()
            if name in registry_of(model).configs
        }
        if not parts:
            raise AdapterStateError(f"Unknown adapter {name!r}; the pipeline has {_adapter_names(adapted)}.")
        tensors = {key: tensor for part in parts.values() for key, tensor in part.items()}
        headers = {component: part.metadata["components"][component] for component, part in parts.items()}
        state = AdapterTensors(tensors, save.new_header(headers))
        path = save.write_state(state, save_directory, weight_name, dtype, is_main_process)
        if push_to_hub and is_main_process:
            publish(path, push_to_hub, **hub)
        return path

    def set_serial_lora(
        self, adapter_names: str | Sequence[str], weights: Weights | Sequence[Weights] | None = None
    ) -> None:
        """Make exactly these adapters active in every component that has them; see `set_serial_lora` of a model."""
        chosen = names_with_weights(adapter_names, weights)
        adapted = _adapted(self)
        _check_known(adapted, list(chosen))
        each = {
            component: {name: w for name, w in chosen.items() if name in registry_of(model).configs}
            for component, model in adapted.items()
        }
        for component, model in adapted.items():
            check_active(model, each[component])
        for component, model in adapted.items():
            attach.activate(model, each[component])

    def delete_serial_lora(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters from every component that has them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        adapted = _adapted(self)
        _check_known(adapted, names)
        for model in adapted.values():
            if held := [name for name in names if name in registry_of(model).configs]:
                attach.delete_serial_lora(model, held)

    def unload_serial_lora(self) -> None:
        """Remove every adapter and trace; weights that are fused stay fused."""
        for model in _adapted(self, required=False).values():
            attach.unload_serial_lora(model)

    def fuse_serial_lora(self, adapter_names: str | Sequence[str] | None = None, scale: float = 1.0) -> None:
        """Merge adapters into the weights of every component that has them, all or none."""
        adapted = _adapted(self)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        _check_known(adapted, list(names or ()))
        done: list[nn.Module] = []
        try:
            for model in adapted.values():
                registry = registry_of(model)
                held = registry.active if names is None else [name for name in names if name in registry.configs]
                if held:
                    fuse.fuse_serial_lora(model, list(held), scale)
                    done.append(model)
            if not done:
                raise AdapterStateError(
                    f"There is nothing to fuse: no adapter is active. Name some of {_adapter_names(adapted)}, or make "
                    "them active with set_serial_lora()."
                )
        except Exception:
            for model in done:
                fuse.unfuse_serial_lora(model)
            raise

    def unfuse_serial_lora(self) -> None:
        """Put the original weights back, to the bit, in every component that is fused."""
        fused = [model for model in _adapted(self).values() if registry_of(model).fused is not None]
        if not fused:
            raise AdapterStateError("Nothing is fused. Call fuse_serial_lora() first.")
        for model in fused:
            fuse.unfuse_serial_lora(model)

    def export_lora(
        self,
        save_directory: str | os.PathLike[str],
        adapter_names: str | Sequence[str] | None = None,
        format: str = "diffusers",
        **options: Any,
    ) -> ExportReport:
        """Write the ordinary LoRA that equals the adapters of every component; see `export_lora` of a model."""
        return export_lora(self, save_directory, adapter_names, format, **options)

    def reserve_serial_lora(self, capacity: tuple[int, int], inputs: Sequence[str] | None = None) -> None:
        """Reserve room for swapping adapters of the transformer without recompiling; call it before compiling."""
        modules = {name: m for name, m in _modules(self).items() if name.startswith("transformer")}
        if not modules:
            raise AdapterStateError(f"{type(self).__name__} has no transformer to reserve capacity in.")
        for model in modules.values():
            attach.reserve_serial_lora(model, capacity, inputs)

    def serial_lora_scale(self, scale: float) -> AbstractContextManager[None]:
        """Scale every active adapter inside a `with` block."""
        return _inside(contexts.serial_lora_scale(model, scale) for model in _adapted(self).values())

    def disable_serial_lora(self) -> AbstractContextManager[None]:
        """Run the base pipeline inside a `with` block."""
        return _inside(contexts.disable_serial_lora(model) for model in _adapted(self).values())

    def serial_lora_batch(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Serve each sample of the batch with an adapter of its own inside a `with` block."""
        adapted = _adapted(self)
        _check_known(adapted, [name for name in names if name is not None])
        return _inside(
            contexts.serial_lora_batch(model, [n if n in registry_of(model).configs else None for n in names])
            for model in adapted.values()
        )

    def serial_lora_status(self) -> dict[str, SerialLoraStatus]:
        """{component: status} of every component that has adapters."""
        return {name: serial_lora_status(model) for name, model in _adapted(self, required=False).items()}


VERBS = tuple(name for name in vars(SerialLoraLoaderMixin) if not name.startswith("_") and name != "components")


def install(pipeline_class: type) -> None:
    """Give a pipeline class the verbs, unless it has an attribute of that name already. Idempotent."""
    for verb in VERBS:
        if not hasattr(pipeline_class, verb):
            setattr(pipeline_class, verb, vars(SerialLoraLoaderMixin)[verb])


@contextmanager
def _inside(blocks: Iterator[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        yield


def _modules(pipeline: SerialLoraLoaderMixin) -> dict[str, nn.Module]:
    return {name: m for name, m in pipeline.components.items() if isinstance(m, nn.Module)}


def _adapted(pipeline: SerialLoraLoaderMixin, required: bool = True) -> dict[str, nn.Module]:
    modules = _modules(pipeline)
    adapted = {name: m for name, m in modules.items() if getattr(unwrap(m), "_serial_lora", None) is not None}
    if required and not adapted:
        raise AdapterStateError(
            f"{type(pipeline).__name__} has no Serial LoRA adapter. Load one with load_serial_lora()."
        )
    return adapted


def _adapter_names(adapted: dict[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name for model in adapted.values() for name in registry_of(model).configs))


def _check_known(adapted: dict[str, nn.Module], names: list[str]) -> None:
    known = _adapter_names(adapted)
    if unknown := [name for name in names if name not in known]:
        raise AdapterStateError(f"Unknown adapter {unknown}; the pipeline has {sorted(known)}.")


def _the_adapter(adapted: dict[str, nn.Module]) -> str:
    active = dict.fromkeys(name for model in adapted.values() for name in registry_of(model).active)
    for names in (_adapter_names(adapted), list(active)):
        if len(names) == 1:
            return names[0]
    raise AdapterStateError(f"Say which adapter: adapter_name is one of {sorted(_adapter_names(adapted))}.")


def _free_name(pipeline: SerialLoraLoaderMixin) -> str:
    taken = _adapter_names(_adapted(pipeline, required=False))
    return next(n for n in ("default", *(f"default_{i}" for i in range(1, len(taken) + 1))) if n not in taken)
