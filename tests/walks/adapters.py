"""The adapters that a walk loads: of several ranks, scales and places, with their terms in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import slora_diffusers as sl
from slora_diffusers.files.format import AdapterTensors
from tests.adapters import add_random_adapter
from tests.reference import Terms, terms_of
from tests.tiny.models import TINY, TinyModel

# As SD3-medium is: diffusers' processor for fused projections runs neither a second attention nor a norm of queries.
BASE: TinyModel = dataclasses.replace(
    TINY["SD3Transformer2DModel"],
    config={**TINY["SD3Transformer2DModel"].config, "dual_attention_layers": (), "qk_norm": None, "num_layers": 2},
)
CONFIGS: tuple[dict[str, Any], ...] = (
    {"rank": 2, "alpha": 3},
    {"rank": 4, "alpha": 4, "rslora": True},
    {"rank": 3, "alpha": 2, "targets": r".*\.0\.attn"},
    {"rank": 2, "alpha": 2, "inputs": ["hidden_states", "attention_output", "feed_forward"]},
    {"rank": 1, "alpha": -1, "layers": 1, "inputs": ["encoder_hidden_states"]},
)


@dataclass(frozen=True)
class Given:
    """An adapter as a file and as a state dict, and what it computes."""

    path: Path
    state: AdapterTensors
    terms: dict[str, Terms]


@cache
def given(number: int, folder: Path) -> Given:
    """The adapter of one of `CONFIGS`."""
    settings = CONFIGS[number]
    model = BASE.build()
    add_random_adapter(model, seed=number, std=0.25, **settings)
    path = sl.save_serial_lora(model, folder / str(number))
    rank, alpha = settings["rank"], settings["alpha"]
    s = alpha / rank**0.5 if settings.get("rslora") else alpha / rank
    state = sl.serial_lora_state_dict(model)
    return Given(path, state, terms_of((state, s)))
