"""Load an adapter into a model or a pipeline, all or nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..adapters.attach import drop_empty_sites, freeze_base, put_in, take_out
from ..adapters.lifecycle import remove_adapters
from ..config import SerialLoraConfig
from ..core.calls import ONE_VERB, alone
from ..core.change import changing
from ..core.components import (
    DENOISER,
    adapted,
    check_known,
    components_of,
    for_each,
    free_name,
    has_adapters,
    held_by,
    is_pipeline,
    per_component,
    the_adapter,
)
from ..core.state import check_modules, check_new_name, check_not_fused, check_not_inside, registry_of
from ..errors import AdapterFileError, AdapterStateError
from .format import AdapterFile, Component
from .plan import Plan, no_component, plan_load
from .storage import check_hub_arguments

logger = logging.getLogger("diffusers.slora_diffusers")  # a child of diffusers' own: its verbosity holds here too

Source = str | os.PathLike[str] | Mapping[str, Tensor] | AdapterFile


def load_serial_lora(
    model: Any,
    source: Source,
    adapter_name: str | None = None,
    weight: float | Mapping[str, float] = 1.0,
    strict: bool = True,
    config: SerialLoraConfig | None = None,
    *,
    component: str | None = None,
    activate: bool = True,
    hotswap: bool = False,
    is_trainable: bool = False,
    **hub: Any,
) -> Any:
    """Load an adapter into a model or a pipeline; it becomes active beside those that are active already.

    Everything is read and checked before a model is touched. The base, its devices and its hooks stay as they are.

    Args:
        model: The base the adapter was trained on; or a pipeline, whose components get what was made for them, all
            or none.
        source: File, folder, Hub id, or state dict.
        adapter_name: Its name from here on; `None` takes the first free one of default, default_1, ...
        weight: Weight w in `x~ = x + sum_i w_i s_i B_i A_i x`; of a pipeline also {component: weight}, where those
            that it leaves out keep 1.
        strict: Whether keys that are missing, unexpected or of a wrong shape are an error; if not, what fits is
            loaded and the report says what did not.
        config: Settings to use instead of the file's; for a plain state dict, which has none.
        component: The component of the pipeline that the file's one part goes into, whatever it is called in the file,
            such as "transformer_2"; of a model, which part of the file to take.
        activate: Whether it becomes active; if not, `set_serial_lora` makes it so later.
        hotswap: Whether it takes the place of the adapter of that name, all or nothing; with reserved capacity no
            graph is compiled again.
        is_trainable: Whether to go on training it: A and B in fp32, asking for gradients, and the base frozen.
        **hub: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        The numbers of sites, pairs and parameters, and what was skipped; of a pipeline {component: these}.

    Raises:
        SerialLoraError: If the file cannot be read or does not fit; nothing has changed then.
        TypeError: If a keyword argument is unknown.
    """
    check_hub_arguments(hub)
    models = components_of(model)
    weights = _weights_for(weight, models)
    named = partial(_name_for, model, adapter_name, hotswap)
    named()  # what is wrong with the name is said before the file is read
    file = AdapterFile.read(source, **hub)
    parts = _parts_for(model, models, file, strict, component)
    if component is None:
        file.warn_of_rest([key for key, part in file.components.items() if any(part is one for one in parts.values())])
    plan = partial(plan_load, strict=strict, config=config, hotswap=hotswap, trainable=is_trainable)
    each = {c: weights[c] if activate else None for c in parts}
    return for_each(model, _add(models, parts, named, plan, each, leaving=hotswap and component is None))


@alone
def _add(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Component],
    named: Callable[[], str],
    plan: Callable[..., Plan],
    weights: Mapping[str, float | None],
    leaving: bool,
) -> dict[str, Any]:
    """Check what goes into each component, then put all in; reports by component.

    Args:
        models: All components.
        parts: What goes where.
        named: Gives the adapter's name, which another thread may have taken since it was last asked.
        plan: Checks one part.
        weights: By component; None leaves it inactive.
        leaving: Whether an adapter of that name goes from components that get no part.
    """
    name = named()
    plans = {c: plan(models[c], part, name, component=c) for c, part in parts.items()}
    apply_plans(list(plans.values()), [weights[c] for c in plans], _left_by(models, parts, name) if leaving else [])
    return {component: one.report for component, one in plans.items()}


def apply_plans(
    plans: Sequence[Plan], weight: float | Sequence[float | None] | None, left: Sequence[nn.Module] = ()
) -> None:
    """Add the adapters of checked loads to their models, all or none.

    Args:
        plans: One for each model.
        weight: The new adapter's, active beside those that are active already, or one for each plan; None leaves it
            inactive.
        left: Models that lose the adapter of that name, because what replaces it has no part for them.
    """
    each = list(weight) if isinstance(weight, Sequence) else [weight] * len(plans)
    for plan, w in zip(plans, each, strict=True):
        name = plan.report.adapter_name
        if w is not None and plan.modules:
            active = {**registry_of(plan.model, create=True).active, name: w}
            check_modules(plan.model, active, {name: list(plan.modules)})
    with ONE_VERB, changing(*(plan.model for plan in plans), *left) as change:
        for plan, w in zip(plans, each, strict=True):
            registry, name = registry_of(plan.model, create=True), plan.report.adapter_name
            if plan.replaces and name in registry.configs:
                take_out(plan.model, name)
            if plan.trainable:
                freeze_base(plan.model)
            put_in(change, plan.model, name, plan.matrices, plan.config, w, plan.trainable, plan.modules)
            if plan.replaces and registry.capacity is None:
                drop_empty_sites(plan.model)
        for one in left:
            remove_adapters(one, [plans[0].report.adapter_name])
    for plan in plans:
        skipped = plan.report.missing or plan.report.unexpected or plan.report.mismatched
        logger.log(logging.WARNING if skipped else logging.INFO, "Loaded %s", plan.report)


@alone
def _name_for(model: Any, given: str | None, hotswap: bool) -> str:
    """The adapter's name: the one that is given, the first free one, or the only one that can be replaced."""
    holders = adapted(model, required=False)
    if not hotswap:
        name = free_name(holders) if given is None else given
        if not is_pipeline(model):
            check_new_name(registry_of(model, create=True), name)
        return name
    if not holders:
        raise AdapterStateError("hotswap=True replaces an adapter, and there is none yet: load this one without it.")
    name = the_adapter(holders) if given is None else given
    check_known(holders, [name])
    return name


def _left_by(models: Mapping[str, nn.Module], parts: Mapping[str, Component], name: str) -> list[nn.Module]:
    """The models that hold an adapter of that name and get no part of the new one."""
    left = [one for c, one in models.items() if c not in parts and has_adapters(one) and held_by(one, [name])]
    for one in left:
        check_not_fused(registry_of(one), "replace an adapter")
        check_not_inside(registry_of(one), "replace an adapter", [name])
    return left


def _weights_for(weight: float | Mapping[str, float], models: Mapping[str, nn.Module]) -> Mapping[str, float]:
    """{component: weight}, all of them checked."""
    weights = per_component(weight, models)
    for one in weights.values():
        check_weight(one)
    return weights


def check_weight(weight: Any) -> None:
    """Raise AdapterStateError unless the weight of an adapter is a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise AdapterStateError(f"weight must be a finite number; got {weight!r}.")


def _parts_for(
    target: Any, models: Mapping[str, nn.Module], file: AdapterFile, strict: bool, component: str | None
) -> dict[str, Component]:
    """{component of the target: its part of the file}."""
    parts = file.components
    if not is_pipeline(target):
        (own,) = models
        wanted = component or own
        if component is None and own not in parts and len(parts) == 1:
            return {own: next(iter(parts.values()))}  # a pipeline's name for this model, such as text_encoder
        if wanted not in parts:
            raise no_component(wanted, file)
        return {own: parts[wanted]}
    if component is not None:
        return {component: _part_for(component, models, file)}
    if list(parts) == ["model"] and "transformer" in models:
        raise AdapterFileError(
            "The source was saved from a bare model that is not diffusers' own (component 'model'); load it into "
            "that model with load_serial_lora(model, source)."
        )
    known = [name for name in parts if name in models]
    if not known or (strict and len(known) < len(parts)):
        raise AdapterFileError(
            f"The adapter is for the components {list(parts)}, but {type(target).__name__} has {sorted(models)}. Load "
            "it into a pipeline that has them" + (", or pass strict=False." if known else ".")
        )
    return {name: parts[name] for name in known}


def _part_for(component: str, models: Mapping[str, nn.Module], file: AdapterFile) -> Component:
    """The part of a file that goes into a component that the user names: its own, or the only one for a transformer."""
    if component not in models:
        raise AdapterStateError(f"component must be one of {sorted(models)}; got {component!r}.")
    own = [name for name in file.components if name == component]
    only = own or [name for name in file.components if name.startswith(DENOISER)] or list(file.components)
    if len(only) != 1:
        raise AdapterFileError(
            f"The file has parts for {list(file.components)}, and it is not clear which of them goes into {component}: "
            "load that part into the component itself, load_serial_lora(pipe.<component>, source, component=<part>)."
        )
    return file.components[only[0]]
