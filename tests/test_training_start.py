"""`--init gradient` in the recipes: the start of the loss's first batches, once, for every adapter that has one."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from slora_diffusers.core.pair import ROW_NORM
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.files.format import AdapterFile
from slora_diffusers.recipes import dit as train_dit
from slora_diffusers.training import start
from slora_diffusers.training.checkpoint import read_checkpoint
from tests.tiny_runs import glyph_run
from tests.vision_recipes import classify, losses

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def train(base, out, *flags):
    argv = glyph_run(base, out)
    more = ["--checkpointing_steps", "0", "--init", "gradient", "--init_batches", "3"]
    return train_dit.main([*argv, *more, "--max_train_steps", "3", *flags])


def at_rate_zero(base, out, *flags):
    """{key: A} that a run starts from."""
    tensors = load_file(train(base, out, "--max_train_steps", "1", "--learning_rate", "0", *flags))
    assert all(not tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    return {key: tensor for key, tensor in tensors.items() if "lora_A" in key}


def test_every_a_starts_from_the_gradient_and_the_file_says_so(dit_base, tmp_path):
    starts = at_rate_zero(dit_base, tmp_path / "one")
    assert starts and all(torch.allclose(A @ A.mT, ROW_NORM**2 * torch.eye(4), atol=1e-5) for A in starts.values())
    assert AdapterFile.read(tmp_path / "one").components["transformer"].config.init == "gradient"
    again = at_rate_zero(dit_base, tmp_path / "two")
    assert all(again[key].equal(A) for key, A in starts.items())
    other = at_rate_zero(dit_base, tmp_path / "three", "--init_batches", "1")
    assert not any(other[key].equal(A) for key, A in starts.items())


def test_the_loss_of_the_first_step_is_that_of_the_base_and_the_steps_go_on_from_the_start(dit_base, tmp_path):
    train(dit_base, tmp_path / "gradient")
    train(dit_base, tmp_path / "kaiming", "--init", "kaiming")
    ours, theirs = losses(tmp_path / "gradient"), losses(tmp_path / "kaiming")
    assert ours[0] == theirs[0] and ours[1:] != theirs[1:]


def test_it_reads_the_first_batches_twice_and_shows_how_far_it_is(dit_base, tmp_path, monkeypatch, capsys):
    train(dit_base, tmp_path)
    assert "gradient start: 100%" in capsys.readouterr().err.replace("\r", "\n")


def test_a_run_that_is_resumed_equals_one_that_went_through_and_does_not_start_again(dit_base, tmp_path, monkeypatch):
    flags = ["--checkpointing_steps", "1", "--max_train_steps"]
    through = load_file(train(dit_base, tmp_path / "through", *flags, "3"))
    train(dit_base, tmp_path / "resumed", *flags, "2")
    monkeypatch.setattr(start, "gradient_starts", lambda *arguments: pytest.fail("a second start"))
    path = train(dit_base, tmp_path / "resumed", *flags, "3", "--resume_from_checkpoint", "latest")
    resumed = load_file(path)
    assert resumed.keys() == through.keys() and all(resumed[key].equal(through[key]) for key in through)
    assert AdapterFile.read(path).components["transformer"].config.init == "gradient"


def test_another_start_does_not_fit_a_checkpoint(dit_base, tmp_path):
    train(dit_base, tmp_path, "--checkpointing_steps", "1")
    with pytest.raises(SerialLoraError, match="--init gradient, and now it is kaiming"):
        train(dit_base, tmp_path, "--init", "kaiming", "--resume_from_checkpoint", "latest")


def test_the_average_begins_at_the_start(dit_base, tmp_path):
    train(dit_base, tmp_path, "--use_ema", "--checkpointing_steps", "1", "--learning_rate", "0")
    state = read_checkpoint(tmp_path / "checkpoint-1")
    for average, (_, trained) in zip(state["ema"]["shadow_params"], state["trained"].items(), strict=True):
        assert torch.allclose(average, trained)


def test_accumulated_batches_count_one_by_one(dit_base, tmp_path):
    """Three micro-batches are three, however many make a step."""
    plain = at_rate_zero(dit_base, tmp_path / "plain")
    accumulated = at_rate_zero(dit_base, tmp_path / "accumulated", "--gradient_accumulation_steps", "2")
    assert all(accumulated[key].equal(A) for key, A in plain.items())


def test_mixed_precision_and_checkpointing_find_about_the_same_start(dit_base, tmp_path):
    exact = at_rate_zero(dit_base, tmp_path / "exact", "--rank", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = at_rate_zero(
        dit_base, tmp_path / "mixed", "--rank", "1", "--mixed_precision", "bf16", "--gradient_checkpointing"
    )
    overlaps = [abs((mixed[key] * A).sum().item()) / ROW_NORM**2 for key, A in exact.items()]
    assert min(overlaps) > 0.9


def test_pefts_lora_starts_from_its_own_gradient(dit_base, tmp_path):
    starts = at_rate_zero(dit_base, tmp_path, "--adapter", "lora")
    assert starts and all(torch.allclose(A @ A.mT, ROW_NORM**2 * torch.eye(4), atol=1e-5) for A in starts.values())


def test_pefts_lora_is_drawn_as_asked(dit_base, tmp_path):
    """Of PEFT's own distributions: N(0, 1 / r^2), where its usual start is uniform within 1 / sqrt(d)."""
    flags = ["--max_train_steps", "1", "--learning_rate", "0", "--adapter", "lora", "--init"]
    for init, within in (("gaussian", False), ("kaiming", True)):
        tensors = load_file(train(dit_base, tmp_path / init, *flags, init))
        A = torch.cat([tensor.flatten() for key, tensor in tensors.items() if "lora_A" in key])
        bound = max(tensor.shape[1] ** -0.5 for key, tensor in tensors.items() if "lora_A" in key)
        assert (A.abs().max() <= bound) == within


@pytest.mark.parametrize("adapter", ["full"])
def test_what_has_no_matrices_has_no_such_start(dit_base, tmp_path, adapter):
    with pytest.raises(SerialLoraError, match=f"--adapter {adapter} has none"):
        train(dit_base, tmp_path, "--adapter", adapter)
    assert not tmp_path.joinpath("config.yaml").exists()


@pytest.mark.parametrize("adapter", ["serial", "lora"])
def test_a_new_head_is_warmed_up_for_the_gradient_and_is_new_again(vit_base, stripes, tmp_path, adapter):
    flags = ["--max_train_steps", "3", "--adapter", adapter, "--smallest_crop", "1"]
    classify(vit_base, stripes, tmp_path / "kaiming", *flags)
    classify(vit_base, stripes, tmp_path / "gradient", *flags, "--init", "gradient", "--init_batches", "2")
    ours, theirs = losses(tmp_path / "gradient"), losses(tmp_path / "kaiming")
    assert ours[0] == theirs[0] and ours[2] != theirs[2]


def test_without_a_warm_head_there_is_no_gradient(vit_base, stripes, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "WARMUP_STEPS", 0)
    with pytest.raises(SerialLoraError, match="new head of zeros"):
        classify(vit_base, stripes, tmp_path, "--max_train_steps", "1", "--init", "gradient")


class Scaler:
    """A gradient scaler whose factor overflows."""

    def get_scale(self):
        return 2.0**140


def test_a_factor_that_overflows_is_lowered_and_small_gradients_are_kept():
    model = torch.nn.Module()
    model.lora_A_default = A = torch.nn.Parameter(torch.randn(2, 5))
    model.lora_B_default = B = torch.nn.Parameter(torch.zeros(5, 2))
    G = torch.randn(5, 5)
    assert start._scaled_start({"m": model}, [lambda: ((B @ A) * G).sum()], Scaler()) == []
    assert torch.allclose(A @ A.mT, ROW_NORM**2 * torch.eye(2), atol=1e-5)
