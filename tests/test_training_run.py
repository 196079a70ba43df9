"""The pieces of a run: the average, the schedule, uploading, compiling, saving what each adapter trains."""

import argparse
import json

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import dit as train_dit
from slora_diffusers.training import checkpoint, preflight
from slora_diffusers.training.checkpoint import STATE_NAME, find_checkpoint, read_checkpoint, write_checkpoint
from slora_diffusers.training.run import Run
from tests.tiny_runs import glyph_run

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
WEIGHTS = "serial_lora_weights.safetensors"


def train(base, out, *flags):
    argv = glyph_run(base, out)
    return train_dit.main([*argv, "--checkpointing_steps", "1", *flags])


def test_the_saved_average_is_the_exponential_moving_average_of_the_steps(dit_base, tmp_path):
    path = train(dit_base, tmp_path, "--max_train_steps", "5", "--use_ema", "--ema_decay", "0.6")
    steps = [read_checkpoint(tmp_path / f"checkpoint-{n}")["trained"] for n in range(1, 6)]
    saved = load_file(path)
    for name in steps[0]:
        site, _, matrix = name.removeprefix("0.").rpartition(".")
        key = f"transformer.{site}.{matrix.removesuffix('_default')}.weight"
        average = steps[0][name].double()
        for number, step in enumerate(steps[1:], start=1):
            decay = min(0.6, (1 + number) / (10 + number))  # diffusers' warm-up of the decay
            average = decay * average + (1 - decay) * step[name].double()
        torch.testing.assert_close(saved[key].double(), average, rtol=1e-5, atol=1e-7)


def test_the_rate_warms_up_and_then_follows_the_cosine(dit_base, tmp_path):
    rates = []
    log = Run.log

    def watch(self, values, step):
        rates.append(values.get("lr"))
        return log(self, values, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", watch)
        train(dit_base, tmp_path, "--max_train_steps", "6", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2")
    pi = torch.pi
    expected = [0, 0.005] + [0.01 * 0.5 * (1 + torch.tensor(pi * n / 4).cos().item()) for n in range(4)]
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("epochs", "accumulation", "steps"), [(1, 1, 7), (3, 4, 6)])
def test_epochs_become_steps_and_the_schedule_ends_with_them(dit_base, tmp_path, epochs, accumulation, steps):
    """13 glyphs in batches of two: 7 batches an epoch."""
    flags = ["--num_train_epochs", str(epochs), "--gradient_accumulation_steps", str(accumulation)]
    train(dit_base, tmp_path, *flags, "--lr_scheduler", "linear", "--checkpointing_steps", "0")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["lr"] == pytest.approx(0.01 / steps)
    assert f"max_train_steps: {steps}\n" in (tmp_path / "config.yaml").read_text()


def test_scale_lr_multiplies_by_the_samples_of_a_step(dit_base, tmp_path):
    train(dit_base, tmp_path, "--max_train_steps", "1", "--scale_lr", "--gradient_accumulation_steps", "3")
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["lr"] == pytest.approx(0.01 * 2 * 3)


def test_full_fine_tuning_saves_a_transformer_that_stock_diffusers_loads(dit_base, tmp_path):
    from diffusers import DiTTransformer2DModel

    train(dit_base, tmp_path, "--max_train_steps", "2", "--adapter", "full", "--learning_rate", "1e-3")
    tuned = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    before = DiTTransformer2DModel.from_pretrained(dit_base / "transformer").state_dict()
    trained = read_checkpoint(tmp_path / "checkpoint-2")["trained"]
    for name, weight in trained.items():
        assert tuned[name.removeprefix("0.")].equal(weight)
    assert any(not tuned[name].equal(before[name]) for name in tuned)


def test_pefts_lora_is_saved_as_diffusers_reads_it(tmp_path):
    from slora_diffusers import SerialLoraConfig
    from slora_diffusers.training.methods import ADAPTERS
    from tests.tiny.pipelines import tiny_sd3_pipeline

    pipe, fresh = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    ADAPTERS["lora"].attach(pipe.transformer, SerialLoraConfig(rank=4, alpha=8))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ADAPTERS["lora"].save({"transformer": pipe.transformer}, tmp_path)
    fresh.load_lora_weights(tmp_path)
    text = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 32)}
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500.0])
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.transformer(x, timestep=t, **text).sample, pipe.transformer(x, timestep=t, **text).sample
        )


@pytest.mark.slow
def test_a_compiled_transformer_trains_to_the_same_weights(dit_base, tmp_path):
    plain = load_file(train(dit_base, tmp_path / "a", "--max_train_steps", "3"))
    compiled = load_file(train(dit_base, tmp_path / "b", "--max_train_steps", "3", "--compile"))
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key], rtol=1e-3, atol=1e-4)


def test_tensorboard_gets_numbers_and_pictures(dit_base, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--validation_steps", "2", "--validation_inference_steps", "1", "--num_validation_images", "1"]
    train(dit_base, tmp_path, "--max_train_steps", "2", "--report_to", "tensorboard", *flags)
    reader = events.EventAccumulator(str(tmp_path / "logs" / "slora")).Reload()
    assert {"loss", "lr", "grad_norm", "validation_loss"} <= set(reader.Tags()["scalars"])
    assert [event.step for event in reader.Images("images")] == [0, 2]


def test_a_result_is_uploaded_with_its_card_and_without_caches_and_checkpoints(dit_base, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(
        huggingface_hub,
        "create_repo",
        lambda name, **more: argparse.Namespace(repo_id=name if "/" in name else f"me/{name}", **more),
    )
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda **more: uploads.append(more) or argparse.Namespace(commit_url="")
    )
    train(dit_base, tmp_path / "dog", "--max_train_steps", "2", "--push_to_hub", "--hub_token", "t")
    (upload,) = uploads
    assert (upload["repo_id"], upload["token"]) == ("me/dog", "t")
    there = {path.relative_to(tmp_path / "dog") for path in (tmp_path / "dog").rglob("*") if path.is_file()}
    sent = set(huggingface_hub.utils.filter_repo_objects(map(str, there), allow_patterns=upload["allow_patterns"]))
    assert sent == {WEIGHTS, "README.md", "config.yaml"} and len(there) > len(sent)
    card = (tmp_path / "dog" / "README.md").read_text()
    assert "pipe.load_serial_lora('me/dog')" in card and str(dit_base) in card


def test_a_repository_that_cannot_be_had_is_found_before_training(dit_base, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(SerialLoraError, match="The Hub gives no repository dog to push to: no network"):
        train(dit_base, tmp_path / "dog", "--max_train_steps", "1", "--push_to_hub")
    assert not (tmp_path / "dog" / WEIGHTS).exists()


def test_a_checkpoint_that_fails_to_be_written_leaves_the_others(tmp_path):
    write_checkpoint(tmp_path, 1, {"step": 1}, 1, lambda folder: None)

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 2, {"step": 2}, 1, fail)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    write_checkpoint(tmp_path, 3, {"step": 3}, 1, lambda folder: None)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_a_damaged_checkpoint_is_named(tmp_path):
    write_checkpoint(tmp_path, 1, {"step": 1}, None, lambda folder: None)
    (tmp_path / "checkpoint-1" / STATE_NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(SerialLoraError, match="checkpoint-1 is damaged"):
        read_checkpoint(tmp_path / "checkpoint-1")


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(dit_base, tmp_path):
    flags = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "2"]
    train(dit_base, tmp_path, "--max_train_steps", "6", *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--checkpointing_steps", "5", "--checkpoints_total_limit", "1"]
    train(dit_base, tmp_path, "--max_train_steps", "5", *flags, "--resume_from_checkpoint", "checkpoint-4")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5"]
    assert (tmp_path / "abandoned-checkpoint-6" / STATE_NAME).is_file()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"


@pytest.mark.parametrize(("name", "message"), [("wandb", "pip install wandb"), ("nonsense", "must be all or one of")])
def test_trackers_that_are_not_there_are_found_before_training(name, message, dit_base, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "get_available_trackers", lambda: [])
    with pytest.raises(SerialLoraError, match=message):
        train(dit_base, tmp_path / "out", "--max_train_steps", "1", "--report_to", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_checkpoint_that_cannot_take_the_place_of_another_leaves_that_one(error, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, {"step": 1, "of": "before"}, None, lambda folder: (folder / "adapter").touch())
    replace = checkpoint.os.replace

    def fails_for_the_new_one(source, target):
        if source.name.endswith(".old.tmp") or target.name.endswith(".old.tmp"):
            return replace(source, target)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", fails_for_the_new_one)
        with pytest.raises(error):
            write_checkpoint(tmp_path, 1, {"step": 1, "of": "now"}, None, lambda folder: None)
    assert torch.load(tmp_path / "checkpoint-1" / STATE_NAME)["of"] == "before"
    assert (tmp_path / "checkpoint-1" / "adapter").exists()
    write_checkpoint(tmp_path, 1, {"step": 1, "of": "now"}, None, lambda folder: None)
    assert torch.load(tmp_path / "checkpoint-1" / STATE_NAME)["of"] == "now"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
