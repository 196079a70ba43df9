"""Merge adapters into one: `B A = sum_i w_i s_i B_i A_i`, exactly by concatenation, or truncated by SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..adapters.attach import activate
from ..config import SerialLoraConfig
from ..core.sites import unwrap
from ..core.state import Weights, check_new_name, names_with_weights, registry_of, weight_at
from ..errors import AdapterFileError, AdapterStateError
from ..files.format import AdapterTensors
from ..files.load import plan_load
from ..files.save import new_header, serial_lora_state_dict
from .export import components_of
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
    rank: int | None = None,
    *,
    track: Track = silently,
) -> MergeReport:
    """Add the adapter `B A = sum_i w_i s_i B_i A_i` to a model. It is an ordinary adapter, and not active yet.

    Args:
        model: A model or a pipeline with the adapters.
        names: Adapters to merge; they stay.
        weights: One weight for all or one for each (a number, or {regular expression of a site: number}); `None`
            is 1.
        new_name: Name of the result.
        rank: Truncate each pair to this rank by SVD of B A; `None` keeps the sum of the ranks, which is exact.
        track: Goes through the pairs, showing progress.

    Raises:
        SerialLoraError: If a name is unknown, the new one is taken, or adapters are fused; nothing has changed then.
    """
    check_rank(rank)
    chosen = names_with_weights(names, weights)
    models = _adapted(model)
    known = {name for m in models.values() for name in registry_of(m).configs}
    if not chosen or (set(chosen) - known):
        raise AdapterStateError(f"names are to be some of {sorted(known)}; got {list(chosen)}.")
    sums: Products = {}
    for component, m in models.items():
        check_new_name(registry_of(m), new_name)
        held = [name for name in chosen if name in registry_of(m).configs]
        states = [(serial_lora_state_dict(m, name, component), chosen[name]) for name in held]
        if states:
            sums |= weighted_sums(states)
    sums, error, errors = truncate(sums, rank, track)
    plans = [plan_load(models[c], as_adapter(models[c], c, pairs), c, new_name) for c, pairs in sums.items()]
    for plan in plans:
        active = dict(plan.registry.active)
        plan.apply(1.0)
        activate(plan.model, active)  # beside those that it sums, it would count twice
    parts = [LowRank(A, B) for plan in plans for _, A, B in plan.matrices]
    return MergeReport(adapter_name=new_name, weights=chosen, pairs=len(parts), **sizes(parts, error, errors))


def merge_states(
    states: Sequence[AdapterTensors], weights: Sequence[float], rank: int | None = None, track: Track = silently
) -> tuple[AdapterTensors, MergeReport]:
    """Merge adapters as they were read from files, without their base.

    Raises:
        AdapterFileError: If they do not adapt the same places: what their config would choose is then not known
            without the base.
    """
    check_rank(rank)
    if len({frozenset(state) for state in states}) != 1:
        raise AdapterFileError(
            "The adapters sit on different places, which takes the base to sort out: merge them with their base "
            "(merge_serial_lora, or `slora merge --base`)."
        )
    sums, error, errors = truncate(weighted_sums(list(zip(states, weights, strict=True))), rank, track)
    tensors, headers, parts = {}, {}, []
    for component, pairs in sums.items():
        header = dict(states[0].metadata["components"][component])
        config = SerialLoraConfig.from_dict(header["config"])
        common = most_common(part.rank for part in pairs.values())
        patterns = rank_patterns(common, {key: part.rank for key, part in pairs.items()})
        config = replace(
            config, rank=common, alpha=None, rank_pattern=patterns, alpha_pattern={}, rslora=False, dropout=0.0
        )
        headers[component] = {**header, "config": config.to_dict()}
        tensors |= adapter_keys(component, pairs)
        parts += pairs.values()
    merged = AdapterTensors(tensors, new_header(headers))
    named: dict[str, Weights] = {f"{i}": weight for i, weight in enumerate(weights)}
    report = MergeReport(adapter_name="merged", weights=named, pairs=len(parts), **sizes(parts, error, errors))
    return merged, report


def weighted_sums(states: Sequence[tuple[AdapterTensors, Weights]]) -> Products:
    """sum_i w_i s_i B_i A_i of every pair, by concatenation."""
    found: dict[str, dict[str, list[LowRank]]] = {}
    for state, weight in states:
        for component, pairs in scaled_pairs(state).items():
            for key, part in pairs.items():
                w = weight_at(key.partition(".serial_lora.")[0], weight)
                found.setdefault(component, {}).setdefault(key, []).append(LowRank(part.A, part.B * w))
    return {component: {key: total(parts) for key, parts in pairs.items()} for component, pairs in found.items()}


def scaled_pairs(state: AdapterTensors) -> Products:
    """The pairs of an adapter's file, its scales s in B, in fp32.

    Raises:
        AdapterFileError: If it says nothing of its scale.
    """
    found: Products = {}
    for key, A in state.items():
        if not key.endswith(".lora_A.weight") or key.startswith("head."):
            continue
        component, _, place = key.removesuffix(".lora_A.weight").partition(".")
        header = state.metadata.get("components", {}).get(component, {})
        if "config" not in header:
            raise AdapterFileError(f"The adapter has no config for {component!r}, so its scale is unknown.")
        s = SerialLoraConfig.from_dict(header["config"]).scaling_of(place.partition(".serial_lora.")[0], A.shape[0])
        B = state[key.replace(".lora_A.weight", ".lora_B.weight")]
        found.setdefault(component, {})[place] = LowRank(A.float(), B.float() * s)
    return found


def _adapted(model: Any) -> Mapping[str, nn.Module]:
    models, _ = components_of(model)
    adapted = {c: m for c, m in models.items() if getattr(unwrap(m), "_serial_lora", None) is not None}
    if not adapted:
        raise AdapterStateError(f"{type(model).__name__} has no Serial LoRA adapter. Load some first.")
    return adapted
