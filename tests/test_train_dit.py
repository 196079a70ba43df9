"""train_scripts/train_dit.py from its command line: what it learns, saves, resumes and refuses."""

import json
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from diffusers.models.embeddings import LabelEmbedding
from PIL import Image
from safetensors.torch import load_file

from pipelines.generate_dit import main as generate
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import dit as train_dit
from slora_diffusers.training.checkpoint import STATE_NAME, checkpoints
from slora_diffusers.training.diffusion.denoising import Denoising
from slora_diffusers.training.loop import DivergedError
from slora_diffusers.training.run import Run
from tests.tiny.pipelines import tiny_dit_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
WEIGHTS = "serial_lora_weights.safetensors"
QUIET = ["--validation_steps", "0", "--checkpointing_steps", "0", "--train_batch_size", "3", "--rank", "4"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for prediction in ("epsilon", "v_prediction", "flow_prediction"):
        tiny_dit_pipeline(prediction, learned_sigma=prediction == "epsilon").save_pretrained(folder / prediction)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven stripes and gradients in two classes: seven is odd, so batches of three cross the epochs."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(7):
        image = np.zeros((32, 32, 3), np.uint8)
        image[:, index * 4 : index * 4 + 6] = (255, 30 * index, 120)
        place = folder / ("3" if index % 2 else "207")
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return folder


def train(base, photos, out, *flags):
    argv = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(photos), "--output_dir", str(out)]
    return train_dit.main([*argv, *QUIET, *flags])


def log(out, name="loss"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_the_validation_loss_falls_and_the_adapter_loads_into_a_fresh_pipeline(bases, photos, tmp_path, prediction):
    flags = ["--max_train_steps", "25", "--validation_steps", "25", "--learning_rate", "2e-2", "--cache_latents"]
    flags += ["--validation_inference_steps", "2", "--num_validation_images", "1", "--label_dropout", "0"]
    path = train(bases / prediction, photos, tmp_path, *flags)
    losses = log(tmp_path, "validation_loss")
    assert set(losses) == {0, 25} and losses[25] < 0.97 * losses[0]
    pipe: Any = DiTPipeline.from_pretrained(bases / prediction)
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    before = pipe([3, 207], num_inference_steps=2, generator=noise, output_type="np").images
    pipe.load_serial_lora(path)
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    after = pipe([3, 207], num_inference_steps=2, generator=noise, output_type="np").images
    assert np.abs(after - before).max() > 1e-3
    pictures = sorted(file.name for file in (tmp_path / "validation").iterdir())
    assert pictures == ["images-000000.png", "images-000025.png"]


def test_step_0_validates_the_base_itself(bases, photos, tmp_path):
    flags = ["--validation_inference_steps", "2", "--num_validation_images", "1", "--validation_steps", "1"]
    train(bases / "epsilon", photos, tmp_path / "a", "--max_train_steps", "1", *flags)
    train(bases / "epsilon", photos, tmp_path / "b", "--max_train_steps", "1", *flags, "--adapter", "full")
    first = [(tmp_path / name / "validation" / "images-000000.png").read_bytes() for name in "ab"]
    assert first[0] == first[1]
    assert log(tmp_path / "a", "validation_loss")[0] == log(tmp_path / "b", "validation_loss")[0]


def test_every_adapter_sees_the_same_samples_noise_and_times(bases, photos, tmp_path):
    flags = ["--max_train_steps", "3", "--learning_rate", "0", "--adam_weight_decay", "0"]
    for adapter in ("serial", "lora", "full"):
        train(bases / "epsilon", photos, tmp_path / adapter, *flags, "--adapter", adapter)
    serial, lora, full = (log(tmp_path / adapter) for adapter in ("serial", "lora", "full"))
    assert len(serial) == 3 and serial == lora == full


@pytest.mark.parametrize(
    "flags",
    [
        ["--dropout", "0.2", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"],
        ["--optimizer", "schedulefree"],
        ["--adapter", "lora"],
        ["--cache_latents", "--random_flip", "--lora_plus_ratio", "4"],
    ],
    ids=["dropout-ema-cosine", "schedulefree", "peft", "cached-flipped-loraplus"],
)
def test_stopping_and_resuming_equals_going_on_to_the_bit(bases, photos, tmp_path, flags):
    if "schedulefree" in flags:
        pytest.importorskip("schedulefree")
    flags = [*flags, "--max_train_steps", "9", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "5"]
    through = train(bases / "epsilon", photos, tmp_path / "through", *flags, "--learning_rate", "1e-2")
    # Five steps of two batches of three are in the middle of an epoch of seven images.
    again = tmp_path / "again"
    with pytest.raises(Killed):
        train_until(6, bases / "epsilon", photos, again, *flags, "--learning_rate", "1e-2")
    flags += ["--resume_from_checkpoint", "latest"]
    resumed = train(bases / "epsilon", photos, again, *flags, "--learning_rate", "1e-2")
    one, other = load_file(through), load_file(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = log(tmp_path / "through")
    assert log(again) == losses and len(losses) == 9


class Killed(BaseException):
    """Stands for a process that is gone."""


def train_until(step, base, photos, out, *flags):
    log_of = Run.log

    def log_then_die(self, values, number):
        log_of(self, values, number)
        if number == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_then_die)
        patch.setattr(Run, "_rescue", lambda *_: None)  # a process that is gone saves nothing
        train(base, photos, out, *flags)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_ends_the_run(bases, photos, tmp_path, number, monkeypatch):
    losses = Denoising.losses

    def interrupted(self, batch, *times):
        if batch.number == 3:
            os.kill(os.getpid(), number)
        return losses(self, batch, *times)

    monkeypatch.setattr(Denoising, "losses", interrupted)
    before = signal.getsignal(number)
    path = train(bases / "epsilon", photos, tmp_path, "--max_train_steps", "50")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert path.exists() and len(log(tmp_path)) == 4
    assert signal.getsignal(number) == before


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_checkpoint(
    bases, photos, tmp_path, monkeypatch
):
    losses = Denoising.losses

    def poisoned(self, batch, *times):
        return losses(self, batch, *times) * (float("nan") if batch.number == 4 else 1.0)

    monkeypatch.setattr(Denoising, "losses", poisoned)
    with pytest.raises(DivergedError, match="step 5 has loss nan"):
        train(bases / "epsilon", photos, tmp_path, "--max_train_steps", "9", "--checkpointing_steps", "2")
    last = checkpoints(tmp_path)[-1]
    assert last.name == "checkpoint-4"
    trained = torch.load(last / STATE_NAME, weights_only=True)["trained"]
    assert all(tensor.isfinite().all() for tensor in trained.values())


def test_checkpoints_are_limited_in_number_and_what_is_half_written_is_not_one(bases, photos, tmp_path):
    half = tmp_path / ".checkpoint-9.123.tmp"
    half.mkdir(parents=True)
    flags = ["--max_train_steps", "6", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    train(bases / "epsilon", photos, tmp_path, *flags)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    assert not half.exists()


def test_gradient_checkpointing_changes_no_gradient(bases, photos, tmp_path):
    flags = ["--max_train_steps", "4", "--learning_rate", "1e-2"]
    plain = load_file(train(bases / "epsilon", photos, tmp_path / "a", *flags))
    recomputed = load_file(train(bases / "epsilon", photos, tmp_path / "b", *flags, "--gradient_checkpointing"))
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-5, atol=1e-6)


def test_labels_drop_once_per_sample_and_the_blocks_embeddings_drop_none(bases, photos, tmp_path, monkeypatch):
    seen, modes = [], set()
    forward = LabelEmbedding.forward

    def watch(self, labels, *rest):
        seen.append(labels.tolist())
        modes.add(self.training)
        return forward(self, labels, *rest)

    monkeypatch.setattr(LabelEmbedding, "forward", watch)
    train(bases / "epsilon", photos, tmp_path, "--max_train_steps", "12", "--label_dropout", "0.5")
    assert modes == {False}
    per_step = [seen[i : i + 3] for i in range(0, len(seen), 3)]  # two blocks, and the output layer's condition
    assert len(per_step) == 12 and all(step[0] == step[1] == step[2] for step in per_step)
    dropped = np.mean([label == 1000 for step in per_step for label in step[0]])
    assert 0.2 < dropped < 0.8


def test_trained_weights_stay_fp32_in_bf16_runs_also_after_validation(bases, photos, tmp_path):
    flags = ["--mixed_precision", "bf16", "--max_train_steps", "4", "--validation_steps", "2", "--use_ema"]
    flags += ["--validation_inference_steps", "2", "--num_validation_images", "1", "--learning_rate", "1e-2"]
    path = train(bases / "epsilon", photos, tmp_path, *flags)
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)


def test_glyphs_train_on_the_seen_letters_and_validate_on_the_others(bases, tmp_path):
    argv = ["--pretrained_model_name_or_path", str(bases / "flow_prediction"), "--glyphs", "script"]
    argv += ["--output_dir", str(tmp_path), *QUIET, "--glyph_variations", "1", "--max_train_steps", "1"]
    options = train_dit.parse(train_dit.Options, "", argv[:4])
    items, unseen = train_dit.find_items(options)
    assert {item.label for item in items} == set(range(0, 26, 2))
    assert {item.label for item in unseen} == set(range(1, 26, 2))
    assert train_dit.main(argv).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data_dir", "/none"], "/none is not a folder"),
        (["--targets", "nothing"], "nothing"),
        (["--layers", "99"], "99"),
        (["--glyphs", "script"], "give one of"),
        (["--pretrained_model_name_or_path", "/none"], "/none"),
        (["--snr_gamma", "5"], "snr_gamma"),
        (["--resume_from_checkpoint", "checkpoint-3"], "is not a checkpoint"),
    ],
)
def test_mistakes_are_found_before_training(bases, photos, tmp_path, flags, message):
    with pytest.raises(SerialLoraError, match=message):
        train(bases / "flow_prediction", photos, tmp_path, "--max_train_steps", "1", *flags)
    assert not (tmp_path / WEIGHTS).exists()


def test_a_checkpoint_of_another_rank_is_refused(bases, photos, tmp_path):
    train(bases / "epsilon", photos, tmp_path, "--max_train_steps", "1", "--checkpointing_steps", "1")
    with pytest.raises(SerialLoraError, match="does not fit this run"):
        flags = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--rank", "2"]
        train(bases / "epsilon", photos, tmp_path, *flags)


def test_generation_shows_the_adapter_fused_or_not_and_the_base_at_scale_0(bases, photos, tmp_path):
    adapter = train(bases / "epsilon", photos, tmp_path / "run", "--max_train_steps", "5", "--learning_rate", "3e-2")

    def picture(name, *flags):
        argv = [
            "--base",
            str(bases / "epsilon"),
            "--labels",
            "3",
            "207",
            "--steps",
            "3",
            "--output",
            f"{tmp_path}/{name}",
        ]
        return np.array(Image.open(generate([*argv, *flags])), dtype=int)

    base, live = picture("base.png"), picture("live.png", "--adapter", str(adapter))
    fused = picture("fused.png", "--adapter", str(adapter), "--fuse")
    off = picture("off.png", "--adapter", str(adapter), "--scale", "0")
    twice = picture("two.png", "--adapter", str(adapter), str(adapter), "--weights", "0.5", "0.5")
    assert (off == base).all() and np.abs(live - base).max() > 2
    assert np.abs(fused - live).max() <= 1 and np.abs(twice - live).max() <= 1
