"""Where a walk goes: a tiny model with its pipeline, and the adapters that are loaded there, their terms in float64."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, PixArtAlphaPipeline, StableDiffusion3Pipeline
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

import slora_diffusers as sl
from slora_diffusers.files.format import AdapterTensors
from tests.adapters import add_random_adapter
from tests.reference import Terms, terms_of
from tests.tiny.models import TINY, TinyModel

CONFIGS: tuple[dict[str, Any], ...] = (
    {"rank": 2, "alpha": 3},
    {"rank": 4, "alpha": 4, "rslora": True},
    {"rank": 3, "alpha": 2, "targets": r".*\.0\.attn\d?"},
    {"rank": 2, "alpha": 2, "inputs": ["hidden_states", "attention_output", "feed_forward"]},
    {"rank": 1, "alpha": -1, "layers": 0, "inputs": ["encoder_hidden_states"]},
    {"rank": 2, "alpha": 4, "modules_to_save": ["{out}"]},
    {"rank": 1, "alpha": 2, "modules_to_save": ["{out}", "{embedder}"]},
)
WHOLE = ".modules_to_save."


@dataclass(frozen=True)
class Ground:
    """A model that a walk changes, and what others have for it.

    Args:
        tiny: The model.
        pipeline: The class of its pipeline.
        processor: A processor of attention that diffusers has for it.
        linears: Linears for a LoRA of PEFT.
        out: A module behind its blocks.
        embedder: One before them.
    """

    tiny: TinyModel
    pipeline: Any
    processor: type
    linears: tuple[str, ...]
    out: str
    embedder: str

    def wrap(self, model: nn.Module, scheduler: Any) -> Any:
        """The pipeline with this model and nothing else."""
        names = [name for name in inspect.signature(self.pipeline.__init__).parameters if name != "self"]
        return self.pipeline(**{**dict.fromkeys(names), "transformer": model, "scheduler": scheduler})

    def config(self, number: int) -> dict[str, Any]:
        """The settings of one of `CONFIGS`, with the modules called as this model calls them."""
        settings = dict(CONFIGS[number])
        if names := settings.get("modules_to_save"):
            settings["modules_to_save"] = [name.format(out=self.out, embedder=self.embedder) for name in names]
        return settings


def _two(tiny: TinyModel) -> TinyModel:
    """The same with two samples in the batch; position ids have none."""

    def inputs(draw: Any) -> dict[str, Any]:
        one, other = tiny.inputs(draw), tiny.inputs(draw)
        one["guidance"].fill_(4.0)  # times 1,000 it is a number that bf16 has
        other["guidance"].fill_(4.0)
        return {k: v if k.endswith("_ids") else torch.cat([v, other[k]]) for k, v in one.items()}

    return dataclasses.replace(tiny, inputs=inputs)


# As SD3-medium is: diffusers' processor for fused projections runs neither a second attention nor a norm of queries.
_SD3 = dataclasses.replace(
    TINY["SD3Transformer2DModel"],
    config={**TINY["SD3Transformer2DModel"].config, "dual_attention_layers": (), "qk_norm": None, "num_layers": 2},
)
_USUAL = ("to_q", "to_v", "to_out.0", "ff.net.0.proj")
GROUNDS = {
    "SD3": Ground(
        _SD3, StableDiffusion3Pipeline, JointAttnProcessor2_0, (*_USUAL, "add_k_proj"), "proj_out", "context_embedder"
    ),
    "Flux": Ground(
        _two(TINY["FluxTransformer2DModel"]),
        FluxPipeline,
        FluxAttnProcessor,
        (*_USUAL, "add_k_proj", "proj_mlp"),
        "norm_out.linear",
        "x_embedder",
    ),
    "PixArt": Ground(
        TINY["PixArtTransformer2DModel"],
        PixArtAlphaPipeline,
        AttnProcessor2_0,
        _USUAL,
        "proj_out",
        "adaln_single.linear",
    ),
}


@dataclass(frozen=True)
class Given:
    """An adapter as a file and as a state dict, and what it computes."""

    path: Path
    state: AdapterTensors
    terms: dict[str, Terms]
    whole: dict[str, Tensor]


@cache
def given(ground: str, number: int, folder: Path) -> Given:
    """The adapter of one of `CONFIGS` for a ground."""
    settings = GROUNDS[ground].config(number)
    model = GROUNDS[ground].tiny.build()
    add_random_adapter(model, seed=number, std=0.25, **settings)
    path = sl.save_serial_lora(model, folder / ground / str(number))
    state = sl.serial_lora_state_dict(model)
    return Given(path, state, *what_it_computes(state, settings))


def what_it_computes(state: AdapterTensors, settings: dict[str, Any]) -> tuple[dict[str, Terms], dict[str, Tensor]]:
    """An adapter's terms, and the tensors of the modules that it brings whole, from its tensors and its settings."""
    pairs = {key: tensor for key, tensor in state.items() if WHOLE not in key}
    whole = {key.partition(".")[2].replace(WHOLE, "."): t.double() for key, t in state.items() if WHOLE in key}
    rank, alpha = settings["rank"], settings["alpha"]
    return terms_of((pairs, alpha / rank**0.5 if settings.get("rslora") else alpha / rank)), whole
