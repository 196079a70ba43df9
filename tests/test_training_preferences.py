"""DPO from a folder of pairs, several validation prompts with what is their own, and starting from an adapter."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from slora_diffusers import serial_lora_scale
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import dreambooth_pixart, dreambooth_sd3
from slora_diffusers.training.diffusion.preferences import DPO
from tests.vision_recipes import classify

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
RECIPES = {"sd3": dreambooth_sd3, "sigma": dreambooth_pixart}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Stripes are chosen, noise is rejected; the rejected have another suffix, and lie in another order."""
    folder, r = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for part in ("chosen", "rejected"):
        (folder / part / "inside").mkdir(parents=True)
    for index, name in enumerate(("c", "a", "inside/b")):
        stripes = np.zeros((32, 32, 3), np.uint8)
        stripes[:: 2 + index] = 220
        Image.fromarray(stripes).save(folder / "chosen" / f"{name}.png")
        Image.fromarray(r.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "rejected" / f"{name}.bmp")
    return folder


def train(family, bases, images, out, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--pretrained_model_name_or_path", str(bases / family), "--output_dir", str(out), "--resolution", "32"]
    argv += ["--instance_data_dir", str(images), "--instance_prompt", "a cat", "--rank", "2", "--train_batch_size", "3"]
    argv += ["--max_sequence_length", "16", "--validation_steps", "0", "--checkpointing_steps", "0"]
    return RECIPES[family].main([*argv, "--max_train_steps", "3", "--validation_inference_steps", "1", *flags])


def log(out, name="loss"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("family", ["sd3", "sigma"])
def test_dpo_is_diffusers_formula_on_pairs_of_one_noise_time_and_caption(
    family, text_bases, pairs, tmp_path, monkeypatch
):
    seen = []
    losses = DPO.losses

    def watched(self, model, noised):
        outputs = []

        class Spy:
            __call__ = staticmethod(lambda n: outputs.append(model(n)) or outputs[-1])
            base = staticmethod(lambda n: outputs.append(model.base(n)) or outputs[-1])

        result = losses(self, Spy(), noised)
        seen.append((self, noised, *(o.detach() for o in outputs), result.detach()))
        return result

    monkeypatch.setattr(DPO, "losses", watched)
    flags = ["--rejected_data_dir", str(pairs / "rejected"), "--objective", "dpo", "--objective_args", "beta=50"]
    train(family, text_bases, pairs / "chosen", tmp_path, *flags, "--learning_rate", "1e-2", "--cache_latents")
    logged = log(tmp_path)
    assert logged[0] == pytest.approx(np.log(2), abs=1e-4) and len(seen) == 3  # untrained, both are the base
    for (objective, noised, output, base, result), loss in zip(seen, logged, strict=True):
        n = len(noised.x0) // 2
        names = [item.name for item in noised.batch.items]
        assert [name.rpartition(".")[0] for name in names[:n]] == [name.rpartition(".")[0] for name in names[n:]]
        assert all(name.endswith(".bmp") for name in names[n:]) and noised.times[:n].equal(noised.times[n:])
        assert noised.noise[:n].equal(noised.noise[n:]) and not noised.x0[:n].equal(noised.x0[n:])
        target = objective.process.target(noised.x0, noised.noise, noised.times).double()
        ours, theirs = (((o[:, :4].double() - target) ** 2).mean(dim=(1, 2, 3)) for o in (output, base))
        inside = -0.5 * 50 * ((ours[:n] - ours[n:]) - (theirs[:n] - theirs[n:]))  # diffusers' train_diffusion_dpo.py
        torch.testing.assert_close(result[:n].double(), -F.logsigmoid(inside), rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(-F.logsigmoid(inside).mean().item(), rel=1e-4)


def test_dpo_learns_to_prefer_what_was_chosen(text_bases, pairs, tmp_path):
    flags = ["--rejected_data_dir", str(pairs / "rejected"), "--objective", "dpo", "--objective_args", "beta=500"]
    flags += ["--learning_rate", "2e-2", "--max_train_steps", "25"]
    train("sd3", text_bases, pairs / "chosen", tmp_path, *flags)
    assert np.mean(log(tmp_path)[-5:]) < 0.9 * np.log(2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "dpo"], "needs --rejected_data_dir"),
        (["--rejected_data_dir", "{pairs}/rejected"], "is for --objective dpo"),
        (["--rejected_data_dir", "{pairs}/rejected/inside", "--objective", "dpo"], "has no image for a.png"),
        (["--rejected_data_dir", "{pairs}/none", "--objective", "dpo"], "is not a folder"),
        (["--validation_prompt", "a", "b", "c", "--validation_seeds", "1", "2"], "one for each of 3 prompts; got 2"),
        (["--validation_adapter_weights", "0.5", "--adapter", "full"], "scales Serial LoRA"),
        (["--init_from", "{pairs}/none"], "none"),
        (["--init_from", "x", "--init", "gradient"], "give one of them"),
        (["--init_from", "x", "--adapter", "lora"], "starts from a Serial LoRA adapter"),
    ],
)
def test_what_cannot_be_is_told_before_training(flags, message, text_bases, pairs, tmp_path):
    with pytest.raises(SerialLoraError, match=message):
        train("sd3", text_bases, pairs / "chosen", tmp_path, *(flag.format(pairs=pairs) for flag in flags))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_each_prompt_is_drawn_with_its_own_seed_negative_prompt_and_weight_and_the_steps_stand_side_by_side(
    text_bases, pairs, tmp_path
):
    flags = ["--validation_prompt", "a cat", "a dog", "--validation_negative_prompt", "bad", "worse"]
    flags += ["--validation_seeds", "5", "6", "--validation_adapter_weights", "1", "0", "--num_validation_images", "2"]
    flags += ["--validation_steps", "2", "--max_train_steps", "4", "--learning_rate", "2e-2"]
    path = train("sd3", text_bases, pairs / "chosen", tmp_path, *flags, "--validation_inference_steps", "2")
    pipe: Any = DiffusionPipeline.from_pretrained(text_bases / "sd3")
    pipe.set_progress_bar_config(disable=True)
    from slora_diffusers.training.diffusion.validation import sample_generators

    def drawn(prompt, negative, seed, weight=None):
        with nullcontext() if weight is None else serial_lora_scale(pipe, weight):
            images = pipe(
                [prompt] * 2, negative_prompt=[negative] * 2, generator=sample_generators(seed, 2), height=32, width=32,
                num_inference_steps=2, guidance_scale=4.0, max_sequence_length=16,
            ).images  # fmt: skip
        return np.concatenate([np.array(image, dtype=int) for image in images], axis=1)

    sheets = {step: np.array(Image.open(tmp_path / "validation" / f"images-{step:06d}.png"), int) for step in (0, 2, 4)}
    rows = [("a cat", "bad", 5), ("a dog", "worse", 6)]
    assert np.abs(sheets[0] - np.concatenate([drawn(*row) for row in rows])).max() <= 1
    pipe.load_serial_lora(path)
    expected = np.concatenate([drawn(*row, weight) for row, weight in zip(rows, (1.0, 0.0), strict=True)])
    assert np.abs(sheets[4] - expected).max() <= 1
    assert np.abs(sheets[4][:32] - sheets[0][:32]).max() > 2 and np.abs(sheets[4][32:] - sheets[0][32:]).max() <= 1
    steps = np.array(Image.open(tmp_path / "steps.png"), int)
    assert steps.shape[:2] == (64 + 16, 3 * (64 + 4))
    for column, sheet in enumerate(sheets.values()):
        left = column * 68 + 2
        assert (steps[14 : 14 + 64, left : left + 64] == sheet).all()


def test_a_run_starts_from_an_adapter_with_its_rank_and_places(text_bases, pairs, tmp_path):
    first = train("sd3", text_bases, pairs / "chosen", tmp_path / "a", "--learning_rate", "1e-2", "--layers", "0")
    still = ["--learning_rate", "0", "--adam_weight_decay", "0", "--init_from", str(tmp_path / "a"), "--dropout", "0.1"]
    second = train("sd3", text_bases, pairs / "chosen", tmp_path / "b", *still)
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    assert any(tensor.abs().max() > 0 for key, tensor in one.items() if "lora_B" in key)
    with pytest.raises(SerialLoraError, match=r"--rank is 3, and .* has 2: leave it out"):
        train("sd3", text_bases, pairs / "chosen", tmp_path / "c", *still, "--rank", "3")
    with pytest.raises(SerialLoraError, match=r"does not fit|has nothing for|transformer"):
        train("sigma", text_bases, pairs / "chosen", tmp_path / "d", "--init_from", str(tmp_path / "a"))


def test_a_vision_run_starts_from_an_adapter(vit_base, stripes, tmp_path):
    flags = ["--max_train_steps", "2", "--shots", "2", "--lr_warmup_steps", "0"]
    classify(vit_base, stripes, tmp_path / "a", *flags, "--learning_rate", "1e-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    still = ["--learning_rate", "0", "--head_learning_rate", "0", "--adam_weight_decay", "0"]
    classify(vit_base, stripes, tmp_path / "b", *flags, *still, "--init_from", str(tmp_path / "a"))
    one, other = (load_file(tmp_path / n / "serial_lora_weights.safetensors") for n in "ab")
    pairs_of_both = [key for key in one if "serial_lora" in key]
    assert pairs_of_both and all(one[key].equal(other[key]) for key in pairs_of_both)
