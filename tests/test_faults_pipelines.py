"""Nothing between, over several components: whatever is raised at whatever line, all have changed or none."""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import slora_diffusers as sl
from slora_diffusers.convert.merge import merge_serial_lora
from tests.adapters import add_random_adapter, output_of
from tests.faults import check_faults, state_of
from tests.test_faults import some
from tests.test_several_transformers import TINY_WAN, pipeline
from tests.tiny.models import TINY

# A fault may come inside a destructor or a weak reference's callback, whose exceptions Python reports and swallows.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:The adapter was trained on"),  # transformer_2 has other weights
]


def sd3():
    """Stable Diffusion 3 with one text encoder."""
    names = ("vae", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_2", "text_encoder_3")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = CLIPTextConfig(vocab_size=50, projection_dim=32, eos_token_id=49, bos_token_id=48, pad_token_id=0, **sizes)
    encoder = CLIPTextModelWithProjection(config).eval()
    models = {"transformer": TINY["SD3Transformer2DModel"].build(), "text_encoder": encoder}
    return StableDiffusion3Pipeline(**dict.fromkeys(names), **models, scheduler=FlowMatchEulerDiscreteScheduler())  # pyright: ignore


def adapted(pipe, *models):
    """The pipeline, with two adapters in each of these models of it."""
    for model in models:
        add_random_adapter(model, "a", seed=1)
        add_random_adapter(model, "b", seed=2)
    return pipe


def wan():
    """A pipeline of two transformers."""
    pipe = pipeline()
    return adapted(pipe, pipe.transformer, pipe.transformer_2)


def with_encoder():
    """A pipeline whose text encoder has adapters beside the transformer's."""
    pipe = sd3()
    return adapted(pipe, pipe.transformer, pipe.text_encoder)


def fused(pipe):
    """The pipeline, with its adapters fused."""
    pipe.fuse_serial_lora()
    return pipe


def of_pipeline(pipe):
    """{component: state}: the parts of the model versions, and of a text encoder its own output."""
    tokens = torch.arange(1, 8)[None]
    runs = {
        "transformer": lambda: output_of(pipe.transformer, TINY[type(pipe.transformer).__name__]),
        "transformer_2": lambda: output_of(pipe.transformer_2, TINY_WAN),
        "text_encoder": lambda: pipe.text_encoder(tokens)[0].detach(),
    }
    held = [name for name in runs if getattr(pipe, name, None) is not None]
    return {name: state_of(getattr(pipe, name), runs[name]) for name in held}


def files():
    return {"wan": sl.serial_lora_state_dict(wan(), "a"), "sd3": sl.serial_lora_state_dict(with_encoder(), "a")}


FILES = files()
MIXED = {"transformer": 0.5, "transformer_2": -1.0}
PIPELINE_VERBS = {
    "add to two transformers": (pipeline, lambda pipe: sl.add_serial_lora(pipe, sl.SerialLoraConfig(rank=2), "c")),
    "load into two transformers": (pipeline, lambda pipe: pipe.load_serial_lora(FILES["wan"], "c", weight=MIXED)),
    "load beside others": (wan, lambda pipe: pipe.load_serial_lora(FILES["wan"], "c")),
    "swap in both": (wan, lambda pipe: pipe.load_serial_lora(FILES["wan"], "b", hotswap=True)),
    "set in both": (wan, lambda pipe: pipe.set_serial_lora("b", MIXED)),
    "fuse both": (wan, lambda pipe: pipe.fuse_serial_lora(scale=0.5)),
    "unfuse both": (lambda: fused(wan()), lambda pipe: pipe.unfuse_serial_lora()),
    "delete from both": (wan, lambda pipe: pipe.delete_serial_lora("b")),
    "unload both": (wan, lambda pipe: pipe.unload_serial_lora()),
    "merge in both": (wan, lambda pipe: merge_serial_lora(pipe, ["a", "b"], [0.5, 2.0], "c")),
    "reserve in both": (pipeline, lambda pipe: pipe.reserve_serial_lora((4, 2))),
    "move both": (lambda: idle(wan()), lambda pipe: pipe.move_serial_lora("b", "cpu")),
    "load into transformer and encoder": (sd3, lambda pipe: pipe.load_serial_lora(FILES["sd3"], "c")),
    "set in transformer and encoder": (with_encoder, lambda pipe: pipe.set_serial_lora("b", 0.5)),
    "fuse transformer and encoder": (with_encoder, lambda pipe: pipe.fuse_serial_lora()),
    "unfuse transformer and encoder": (lambda: fused(with_encoder()), lambda pipe: pipe.unfuse_serial_lora()),
    "delete from transformer and encoder": (with_encoder, lambda pipe: pipe.delete_serial_lora("a")),
    "unload transformer and encoder": (with_encoder, lambda pipe: pipe.unload_serial_lora()),
}


def idle(pipe):
    pipe.set_serial_lora("a")
    return pipe


@pytest.mark.parametrize("verb", list(PIPELINE_VERBS))
def test_a_fault_at_some_lines_of_a_pipelines_verb_changes_all_components_or_none(verb):
    make, call = PIPELINE_VERBS[verb]
    check_faults(make(), call, of_pipeline, lambda total: some(total)[::2])


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(PIPELINE_VERBS))
def test_a_fault_at_any_of_many_lines_of_a_pipelines_verb_does(verb):
    make, call = PIPELINE_VERBS[verb]
    check_faults(make(), call, of_pipeline, lambda total: random.Random(1).sample(range(1, total + 1), min(total, 200)))
