"""A model or a pipeline: the one place that turns what a user gives into {component: model}."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import AdapterStateError, SerialLoraError
from .sites import unwrap
from .state import Registry, registry_of

DENOISER = "transformer"
"""What the component that draws is called in diffusers' pipelines; a second one is transformer_2."""


def is_pipeline(target: Any) -> bool:
    """Whether something has components, as diffusers' pipelines (modular ones, too) do."""
    return not isinstance(target, nn.Module) and isinstance(getattr(target, "components", None), Mapping)


def component_name(model: nn.Module) -> str:
    """What a bare model is called in files: "transformer" if it is diffusers', else "model"."""
    bases = type(unwrap(model)).__mro__
    return DENOISER if any(c.__module__.startswith("diffusers.") for c in bases) else "model"


def components_of(target: Any) -> dict[str, nn.Module]:
    """{component: model} of a pipeline, or of a bare model under the name that it has in files.

    Raises:
        SerialLoraError: If it is neither.
    """
    if isinstance(target, nn.Module):
        return {component_name(target): target}
    if not is_pipeline(target):
        raise SerialLoraError(f"Give a model or a pipeline; got {type(target).__name__}.")
    models = {name: module for name, module in target.components.items() if isinstance(module, nn.Module)}
    first = {id(unwrap(module)): name for name, module in reversed(models.items())}  # one model under two names is one
    return {name: module for name, module in models.items() if first[id(unwrap(module))] == name}


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The model itself, or the transformers of a pipeline: what a new adapter goes into.

    Raises:
        SerialLoraError: If a pipeline has none.
    """
    models = components_of(target)
    if isinstance(target, nn.Module):
        return models
    found = {name: model for name, model in models.items() if name.startswith(DENOISER)}
    if not found:
        raise SerialLoraError(
            f"{type(target).__name__} has no transformer; its models are {sorted(models)}. Give the one to adapt."
        )
    return found


def adapted(target: Any, required: bool = True) -> dict[str, nn.Module]:
    """Those components that have adapters.

    Raises:
        AdapterStateError: If there is none, and `required` is set.
    """
    models = {name: model for name, model in components_of(target).items() if has_adapters(model)}
    if required and not models:
        kind = type(unwrap(target) if isinstance(target, nn.Module) else target).__name__
        raise AdapterStateError(
            f"{kind} has no Serial LoRA adapter. Add one with add_serial_lora() or load_serial_lora()."
        )
    return models


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds adapters, or room for them."""
    return getattr(unwrap(model), "_serial_lora", None) is not None


def registries(models: Mapping[str, nn.Module]) -> dict[str, Registry]:
    """{component: what its model remembers about its adapters}."""
    return {name: registry_of(model) for name, model in models.items()}


def names_of(models: Mapping[str, nn.Module]) -> list[str]:
    """The adapters of these models, each once."""
    return list(dict.fromkeys(name for registry in registries(models).values() for name in registry.configs))


def check_known(models: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Raise AdapterStateError unless every name is an adapter of one of the models at least."""
    known = names_of(models)
    if unknown := [name for name in names if name not in known]:
        raise AdapterStateError(f"Unknown adapter {unknown}; there are {sorted(known)}.")


def held_by(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that are adapters of this model."""
    configs = registry_of(model).configs
    return [name for name in names if name in configs]


def the_adapter(models: Mapping[str, nn.Module]) -> str:
    """The only adapter, or the only active one.

    Raises:
        AdapterStateError: If it is not clear which one is meant.
    """
    active = list(dict.fromkeys(name for registry in registries(models).values() for name in registry.active))
    for names in (names_of(models), active):
        if len(names) == 1:
            return names[0]
    raise AdapterStateError(f"Say which adapter: adapter_name is one of {sorted(names_of(models))}.")


def free_name(models: Mapping[str, nn.Module]) -> str:
    """The first of default, default_1, ... that no adapter of these models has."""
    taken = names_of(models)
    return next(n for n in ("default", *(f"default_{i}" for i in range(1, len(taken) + 1))) if n not in taken)


def per_component(weight: Any, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """{component: weight} from one weight for all, or from {component: weight}, where those it leaves out keep 1.

    A weight that is a mapping may also be {regular expression of a site: number}: then it is one for all.

    Raises:
        AdapterStateError: If some keys are components, and others are not.
    """
    if not isinstance(weight, Mapping) or not any(key in models for key in weight):
        return dict.fromkeys(models, weight)
    if unknown := [key for key in weight if key not in models]:
        raise AdapterStateError(
            f"Weights of components name {unknown}; the adapter is in {sorted(models)}. Patterns of sites go below a "
            "component: {component: {pattern: number}}."
        )
    return {component: weight.get(component, 1.0) for component in models}


def for_each(target: Any, results: Mapping[str, Any]) -> Any:
    """What a verb returns: the one result of a model, {component: result} of a pipeline."""
    return results if is_pipeline(target) else next(iter(results.values()))
