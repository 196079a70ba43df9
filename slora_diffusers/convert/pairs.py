"""Make an adapter, as it is read from a file, out of matrices A and B for places of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..core.names import matrix_name
from ..core.sites import Slot, find_slots, select_slots
from ..files.fingerprint import describe_base
from ..files.format import Component
from .lowrank import LowRank


def as_adapter(model: nn.Module, pairs: Mapping[str, LowRank]) -> Component:
    """One component of an adapter with s = 1, whose config chooses exactly these pairs.

    Args:
        model: The base.
        pairs: {`<site>.serial_lora.<pair>`: M = B A}. Places that no config can tell apart from these (a pair that
            one site has and another lacks) are filled with zeros of rank 1.
    """
    slots = [slot for slot in find_slots(model) if slot.key in pairs]
    config = _config_of(slots, pairs)
    chosen = select_slots(model, config)
    if {slot.key for slot in chosen} - set(pairs):
        config = _config_of(slots, pairs, targets=[re.escape(path) for path in dict.fromkeys(s.path for s in slots)])
        chosen = select_slots(model, config)
    zeros = {
        s.key: LowRank(torch.zeros(1, s.features), torch.zeros(s.features, 1)) for s in chosen if s.key not in pairs
    }
    whole = {**pairs, **zeros}
    patterns = rank_patterns(config.rank, {key: part.rank for key, part in whole.items()})
    config = SerialLoraConfig(rank=config.rank, inputs=config.inputs, targets=config.targets, rank_pattern=patterns)
    return Component(adapter_keys(whole), config, describe_base(model))


def adapter_keys(pairs: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of a component under their keys in an adapter's file."""
    return {
        matrix_name(place, which): matrix
        for place, part in pairs.items()
        for which, matrix in (("A", part.A), ("B", part.B))
    }


def rank_patterns(rank: int, ranks: Mapping[str, int]) -> dict[str, int]:
    """`rank_pattern` of a config: the pairs whose rank is another than `rank`."""
    return {re.escape(key): r for key, r in ranks.items() if r != rank}


def most_common(ranks: Iterable[int]) -> int:
    """The rank that most pairs have."""
    return Counter(ranks).most_common(1)[0][0]


def _config_of(slots: list[Slot], pairs: Mapping[str, LowRank], targets: list[str] | None = None) -> SerialLoraConfig:
    rank = most_common(part.rank for part in pairs.values())
    return SerialLoraConfig(rank=rank, inputs=list(dict.fromkeys(slot.pair.name for slot in slots)), targets=targets)
