"""`--modules_to_save` of a recipe, from its command line to a stock model: what trains, is saved, resumed and fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.recipes import dit as train_dit
from slora_diffusers.training.checkpoint import checkpoints
from tests.adapters import output_of, read_adapter
from tests.tiny.models import TINY
from tests.tiny_runs import dit_base, glyph_run

__all__ = ["dit_base"]
pytestmark = pytest.mark.usefixtures("fresh_accelerator")
WEIGHTS, WHOLE = "serial_lora_weights.safetensors", ".modules_to_save."
SAVED = {"proj_out_2": "transformer.proj_out_2.modules_to_save."}


def train(base, out, *flags):
    argv = [*glyph_run(base, out), "--modules_to_save", "proj_out_2", "--checkpointing_steps", "3", *flags]
    return train_dit.main(argv)


def base_of(folder) -> Any:
    return DiTPipeline.from_pretrained(folder).transformer


def output(model):
    return output_of(model, TINY["DiTTransformer2DModel"])


def by_hand(folder, path):
    """The base with its module's tensors replaced by load_state_dict, and the pairs alone."""
    state = read_adapter(path)
    model = base_of(folder)
    whole = {key.partition(WHOLE)[2]: tensor for key, tensor in state.items() if WHOLE in key}
    model.proj_out_2.load_state_dict(whole)
    settings = sl.SerialLoraConfig(**{**state.metadata["components"]["transformer"]["config"], "modules_to_save": None})
    sl.load_serial_lora(model, {k: t for k, t in state.items() if WHOLE not in k}, config=settings)
    return model


@pytest.mark.parametrize(
    "flags",
    [[], ["--use_ema", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"]],
    ids=["plain", "ema"],
)
def test_a_run_trains_saves_and_resumes_whole_modules(dit_base, tmp_path, flags):
    train(dit_base, tmp_path / "through", "--max_train_steps", "6", *flags)
    whole = load_file(tmp_path / "through" / WEIGHTS)
    theirs = base_of(dit_base).proj_out_2.state_dict()
    trained = {key.partition(WHOLE)[2]: tensor for key, tensor in whole.items() if WHOLE in key}
    assert trained.keys() == theirs.keys()
    assert all(not torch.equal(trained[key], theirs[key]) for key in theirs)

    train(dit_base, tmp_path / "stopped", "--max_train_steps", "3", *flags)
    middle = checkpoints(tmp_path / "stopped")[-1]
    train(dit_base, tmp_path / "stopped", "--max_train_steps", "6", "--resume_from_checkpoint", "latest", *flags)
    again = load_file(tmp_path / "stopped" / WEIGHTS)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)

    for path in (middle, tmp_path / "through"):  # a checkpoint is an adapter, too
        model = base_of(dit_base)
        sl.load_serial_lora(model, path)
        assert torch.allclose(output(model), output(by_hand(dit_base, path)), atol=1e-5)
    assert not torch.equal(read_adapter(middle)[f"{SAVED['proj_out_2']}weight"], trained["weight"])


def test_what_was_trained_is_fused_exactly_and_refused_as_a_lora(dit_base, tmp_path):
    path = train(dit_base, tmp_path / "run", "--max_train_steps", "3")
    base, model = base_of(dit_base), base_of(dit_base)
    sl.load_serial_lora(model, path)
    live = output(model)
    with pytest.raises(sl.SerialLoraError, match=r"No LoRA can hold the modules .* proj_out_2"):
        sl.export_lora(model, tmp_path / "lora", format="peft")
    assert not (tmp_path / "lora").exists()
    sl.fuse_serial_lora(model)
    assert torch.allclose(output(model), live, atol=1e-5) and not torch.allclose(live, output(base), atol=1e-3)
    model.save_pretrained(tmp_path / "fused")
    assert torch.allclose(output(type(base).from_pretrained(tmp_path / "fused")), live, atol=1e-5)
    sl.unfuse_serial_lora(model)
    sl.unload_serial_lora(model)
    assert torch.equal(output(model), output(base))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "lora"], "goes with Serial LoRA's pairs"),
        (["--modules_to_save", "nowhere"], "'nowhere'"),
        (["--modules_to_save", "attn1"], "pairs work inside it"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused_before_training(dit_base, tmp_path, flags, message):
    with pytest.raises(sl.SerialLoraError, match=message):
        train(dit_base, tmp_path / "run", "--max_train_steps", "1", *flags)
    assert not (tmp_path / "run" / WEIGHTS).exists()
