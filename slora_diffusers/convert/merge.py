"""Merge adapters into one: `B A = sum_i w_i s_i B_i A_i`, exactly by concatenation, or truncated by SVD."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..core.calls import alone
from ..core.components import adapted, check_known, held_by, names_of, per_component
from ..core.names import split_place, tensor_name
from ..core.state import Weights, check_new_name, check_weights, names_with_weights, registry_of, weight_at
from ..errors import AdapterFileError, AdapterStateError
from ..files.fingerprint import same_base
from ..files.format import AdapterFile, Component, library_version
from ..files.load import apply_plans
from ..files.plan import Plan, plan_load
from ..files.save import adapter_file
from ..files.storage import check_finite
from .lowrank import LowRank, Products, Sized, Track, check_rank, silently, sizes, total, truncate
from .pairs import adapter_keys, as_adapter, most_common, rank_patterns


@dataclass(frozen=True, kw_only=True)
class MergeReport(Sized):
    """What a merge made.

    Args:
        adapter_name: Name of the new adapter.
        weights: {name: weight} of those that went into it.
        pairs: Number of its pairs.
    """

    adapter_name: str
    weights: dict[str, Weights]
    pairs: int

    def __str__(self) -> str:
        return f"{self.adapter_name}, {self.pairs} pairs: {self.size()}"


def merge_serial_lora(
    model: Any,
    names: Sequence[str],
    weights: Weights | Sequence[Weights] | None,
    new_name: str,
    rank: int | str | None = None,
    *,
    track: Track = silently,
) -> MergeReport:
    """Add the adapter `B A = sum_i w_i s_i B_i A_i` to a model. It is an ordinary adapter, and not active yet.

    Args:
        model: A model or a pipeline with the adapters.
        names: Adapters to merge; they stay.
        weights: One weight for all or one for each (a number, {regular expression of a site: number}, or of a
            pipeline {component: weight}); `None`
            is 1.
        new_name: Name of the result.
        rank: Truncate each pair to this rank by SVD of B A; "auto" takes the least rank of each that loses no more than
            a millionth; `None` keeps the sum of the ranks, which is exact.
        track: Goes through the pairs, showing progress.

    Raises:
        SerialLoraError: If a name is unknown, the new one is taken, or adapters are fused; nothing has changed then.
    """
    check_rank(rank)
    chosen = names_with_weights(names, weights)
    models = adapted(model)
    if not chosen:
        raise AdapterStateError(f"names must be some of {sorted(names_of(models))}; got none.")
    check_known(models, chosen)
    sums, modules = _summed(models, chosen, new_name)
    sums, error, errors = truncate(sums, rank, track)
    plans = _added(models, sums, modules, new_name)
    parts = [LowRank(A, B) for plan in plans for _, A, B in plan.matrices]
    return MergeReport(adapter_name=new_name, weights=chosen, pairs=len(parts), **sizes(parts, error, errors))


@alone
def _summed(
    models: Mapping[str, nn.Module], chosen: Mapping[str, Weights], new_name: str
) -> tuple[Products, dict[str, dict[str, Tensor]]]:
    """The sum of the adapters' pairs in every model, and the modules that they bring whole."""
    sums: Products = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for component, one in models.items():
        check_new_name(registry_of(one), new_name)
        each = {name: per_component(chosen[name], models)[component] for name in held_by(one, chosen)}
        check_weights(one, each)
        states = [(adapter_file(one, name, component), weight) for name, weight in each.items()]
        if states:
            sums |= weighted_sums(states)
            modules |= whole_modules(states)
    return sums, modules


@alone
def _added(
    models: Mapping[str, nn.Module], sums: Products, modules: Mapping[str, dict[str, Tensor]], new_name: str
) -> list[Plan]:
    """Put the sum into every model, inactive: beside those that it sums, it would count twice."""
    made = {c: with_modules(as_adapter(models[c], pairs), modules[c]) for c, pairs in sums.items()}
    plans = [plan_load(models[c], part, new_name) for c, part in made.items()]
    apply_plans(plans, weight=None)
    return plans


def merge_files(
    files: Sequence[AdapterFile], weights: Sequence[float], rank: int | str | None = None, track: Track = silently
) -> tuple[AdapterFile, MergeReport]:
    """Merge adapters as they were read from files, without their base.

    Raises:
        AdapterFileError: If they do not adapt the same places (what their config would choose is then not known
            without the base), or models of different classes.
    """
    check_rank(rank)
    if len({frozenset((c, key) for c, part in file.components.items() for key in part.pairs()) for file in files}) != 1:
        raise AdapterFileError(
            "The adapters sit on different places, which takes the base to sort out: merge them with their base "
            "(merge_serial_lora, or `slora merge --base`)."
        )
    for other in files[1:]:
        _check_bases(files[0], other)
    states = list(zip(files, weights, strict=True))
    modules = whole_modules(states)
    sums, error, errors = truncate(weighted_sums(states), rank, track)
    components: dict[str, Component] = {}
    for component, pairs in sums.items():
        part = files[0].components[component]
        assert part.config is not None  # or it would have no sum
        common = most_common(one.rank for one in pairs.values())
        patterns = rank_patterns(common, {key: one.rank for key, one in pairs.items()})
        config = replace(
            part.config, rank=common, alpha=None, rank_pattern=patterns, alpha_pattern={}, rslora=False, dropout=0.0
        )
        components[component] = with_modules(Component(adapter_keys(pairs), config, part.base), modules[component])
    parts = [part for pairs in sums.values() for part in pairs.values()]
    named: dict[str, Weights] = {f"{i}": weight for i, weight in enumerate(weights)}
    report = MergeReport(adapter_name="merged", weights=named, pairs=len(parts), **sizes(parts, error, errors))
    return AdapterFile(components, library_version=library_version()), report


def _check_bases(one: AdapterFile, other: AdapterFile) -> None:
    """Raise AdapterFileError for adapters of models of two classes; warn of those of different weights."""
    for component, part in one.components.items():
        first, second = part.base, other.components[component].base
        if first.kind and second.kind and first.kind != second.kind:
            raise AdapterFileError(
                f"The adapters are for different models, {first.kind} and {second.kind}. Merge adapters of one base."
            )
        if first.fingerprint and second.fingerprint and not same_base(first.fingerprint, second.fingerprint):
            warnings.warn(
                f"The adapters were trained on different weights, of {first} and of {second}: their sum was trained on "
                "neither. It is written as one of the first; look at what it does.",
                stacklevel=3,
            )


def weighted_sums(states: Sequence[tuple[AdapterFile, Weights]]) -> Products:
    """sum_i w_i s_i B_i A_i of every pair, by concatenation."""
    found: dict[str, dict[str, list[LowRank]]] = {}
    for state, weight in states:
        for component, pairs in scaled_pairs(state).items():
            for key, part in pairs.items():
                w = weight_at(split_place(key)[0], weight)
                parts = found.setdefault(component, {}).setdefault(key, [])
                if parts and parts[0].A.shape[1] != part.A.shape[1]:
                    raise AdapterFileError(
                        f"The adapters are for different models: at {component}.{key} one reads {parts[0].A.shape[1]} "
                        f"features and another {part.A.shape[1]}. Merge adapters of one base."
                    )
                parts.append(LowRank(part.A, part.B * w))
    return {component: {key: total(parts) for key, parts in pairs.items()} for component, pairs in found.items()}


def whole_modules(states: Sequence[tuple[AdapterFile, Weights]]) -> dict[str, dict[str, Tensor]]:
    """{component: tensors} of the modules that one of the adapters brings whole; those of weight 0 are left out.

    Raises:
        AdapterFileError: If two bring the same module: there is no sum of modules.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for file, weight in states:
        for component, part in file.components.items():
            held = found.setdefault(component, {})
            for path, tensors in part.modules().items():
                if not weight_at(path, weight):
                    continue
                if any(key.startswith(f"{path}.") for key in held):
                    raise AdapterFileError(
                        f"Two of the adapters bring a module of their own at {path!r} (modules_to_save), and modules "
                        "have no sum: give one of them the weight 0 there ({pattern of the path: 0}), or merge others."
                    )
                held |= {tensor_name(path, name): tensor for name, tensor in tensors.items()}
    return found


def with_modules(part: Component, tensors: Mapping[str, Tensor]) -> Component:
    """A component with whole modules beside its pairs."""
    if not tensors:
        return part
    made = replace(part, tensors={**part.tensors, **tensors})
    assert part.config is not None
    return replace(made, config=replace(part.config, modules_to_save=list(made.modules())))


def scaled_pairs(file: AdapterFile) -> Products:
    """The pairs of an adapter's file, its scales s in B, in fp32.

    Raises:
        AdapterFileError: If it says nothing of its scale, or lacks a matrix.
    """
    found: Products = {}
    for component, part in file.components.items():
        if part.config is None:
            raise AdapterFileError(f"The adapter has no config for {component!r}, so its scale is unknown.")
        for place, both in part.pairs().items():
            A, B = both.get("A"), both.get("B")
            if A is None or B is None or A.ndim != 2 or tuple(A.shape) != tuple(B.shape)[::-1] or not A.numel():
                raise AdapterFileError(
                    f"The adapter is damaged at {component}.{place}: there must be lora_A (r, d) and lora_B (d, r); "
                    f"got { ({key: tuple(tensor.shape) for key, tensor in both.items()}) }."
                )
            s = part.config.scaling_of(split_place(place)[0], A.shape[0])
            scaled = LowRank(A.float(), B.float() * s)
            check_finite({f"{place}.lora_A": scaled.A, f"{place}.lora_B times its scale {s:g}": scaled.B})
            found.setdefault(component, {})[place] = scaled
    return found
