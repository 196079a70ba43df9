"""What a user of diffusers' scripts, accelerate or an earlier run meets: settings, folders and checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.heads.preprocessing import upright_rgb
from slora_diffusers.recipes import dreambooth_sd3 as train_dreambooth_sd3
from slora_diffusers.training.checkpoint import checkpoints
from slora_diffusers.training.data.folders import find_images
from slora_diffusers.training.optim import make_optimizer
from tests.tiny.pipelines import tiny_pixart_pipeline, tiny_sd3_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder, r = tmp_path_factory.mktemp("subject"), np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(r.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def train(base, subject, out, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--pretrained_model_name_or_path", str(base), "--instance_data_dir", str(subject), "--output_dir", str(out)]
    argv += ["--instance_prompt", "a cat", "--rank", "2", "--train_batch_size", "1", "--resolution", "32"]
    argv += ["--max_sequence_length", "16", "--validation_steps", "0", "--checkpointing_steps", "0"]
    return train_dreambooth_sd3.main([*argv, "--max_train_steps", "2", *flags])


def config(out):
    return yaml.safe_load((out / "config.yaml").read_text())


def log(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_precision_and_accumulation_of_accelerate_launch_hold_unless_flags_differ(base, subject, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    train(base, subject, tmp_path / "launched")
    assert config(tmp_path / "launched")["mixed_precision"] == "bf16"
    assert config(tmp_path / "launched")["gradient_accumulation_steps"] == 2
    train(base, subject, tmp_path / "flag", "--mixed_precision", "no")
    assert config(tmp_path / "flag")["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises((SerialLoraError, ImportError, ValueError)):
        train(base, subject, tmp_path / "fp8")


def test_steps_win_over_epochs_as_in_diffusers_script(base, subject, tmp_path):
    train(base, subject, tmp_path / "steps", "--num_train_epochs", "9")
    assert log(tmp_path / "steps")[-1] == 2
    flags = config(tmp_path / "steps")
    assert flags["max_train_steps"] == 2


def test_nothing_is_trained_and_said_so_where_a_checkpoint_has_all_steps(base, subject, tmp_path, caplog):
    train(base, subject, tmp_path, "--checkpointing_steps", "2")
    before = load_file(tmp_path / "serial_lora_weights.safetensors")
    train(base, subject, tmp_path, "--max_train_steps", "1", "--resume_from_checkpoint", "latest")
    assert "nothing to train" in caplog.text
    after = load_file(tmp_path / "serial_lora_weights.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_rate_holds_from_where_a_run_is_resumed(base, subject, tmp_path):
    train(base, subject, tmp_path, "--checkpointing_steps", "2", "--learning_rate", "1e-3")
    flags = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest", "--learning_rate", "5e-3")
    train(base, subject, tmp_path, *flags)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == [1e-3, 1e-3, 5e-3, 5e-3]


def test_script_ends_with_the_message_alone(tmp_path):
    command = [sys.executable, "train_scripts/train_dreambooth_sd3.py", "--pretrained_model_name_or_path", "none"]
    command += ["--instance_data_dir", str(tmp_path / "missing")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "error: " in ended.stderr and "missing is not a folder" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_accumulation_of_accelerate_resumes_to_the_bit(base, subject, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    flags = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--learning_rate", "1e-2"]
    whole = load_file(train(base, subject, tmp_path / "whole", *flags))
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    resumed = load_file(train(base, subject, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest"))
    assert all(resumed[key].equal(whole[key]) for key in whole)


def test_prodigy_takes_one_rate_for_all_and_learns(base, subject, tmp_path, caplog):
    flags = ["--optimizer", "prodigy", "--train_text_encoder", "--max_train_steps", "4"]
    saved = load_file(train(base, subject, tmp_path / "a", *flags, "--learning_rate", "1"))
    assert any(tensor.abs().max() > 0 for key, tensor in saved.items() if key.endswith("lora_B.weight"))
    assert "1 is usual" not in caplog.text
    train(base, subject, tmp_path / "b", *flags)
    assert "1 is usual" in caplog.text
    with pytest.raises(SerialLoraError, match="lora_plus_ratio"):
        train(base, subject, tmp_path / "c", *flags, "--lora_plus_ratio", "4")
    group = {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}
    settings = make_optimizer("prodigy", [group], (0.9, 0.99), 0.0, 1e-8).param_groups[0]
    assert settings["decouple"] and settings["use_bias_correction"] and settings["safeguard_warmup"]


def test_metadata_names_images_in_folders_and_may_be_a_table(subject, tmp_path):
    for name in ("a.png", "inside/a.png", "other/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((subject / "0.png").read_bytes())
    rows = [("a.png", "top"), ("inside/a.png", "a, with a comma")]
    table = "file_name,text\n" + "\n".join(f'{name},"{text}"' for name, text in rows)
    lines = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows)
    for file, text in (("metadata.csv", table), ("metadata.jsonl", lines)):
        (tmp_path / file).write_text(text)
        found = find_images(tmp_path)
        assert [(item.name, item.caption) for item in found.items] == rows
        assert [name for name, _ in found.skipped] == ["other"]
        assert found.items[1].read().size == (40, 40)


def test_class_images_fill_gaps_and_write_over_none(base, subject, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for number in (0, 2):
        (folder / f"class-{number:05d}.png").write_bytes((subject / "0.png").read_bytes())
    flags = ["--with_prior_preservation", "--class_data_dir", str(folder), "--class_prompt", "a dog"]
    train(base, subject, tmp_path / "out", *flags, "--num_class_images", "4", "--validation_inference_steps", "1")
    assert sorted(path.name for path in folder.iterdir()) == [f"class-{n:05d}.png" for n in range(4)]
    for number in (0, 2):
        assert (folder / f"class-{number:05d}.png").read_bytes() == (subject / "0.png").read_bytes()


def test_null_in_a_config_is_the_default(base, subject, tmp_path):
    (tmp_path / "run.yaml").write_text("rank: null\ntargets: null\nlearning_rate: null\n")
    train(base, subject, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))
    assert config(tmp_path / "out")["learning_rate"] == 1e-4
    (tmp_path / "run.yaml").write_text("pretrained_model_name_or_path: null\n")
    with pytest.raises(SystemExit):
        train_dreambooth_sd3.main(["--config", str(tmp_path / "run.yaml")])


def test_floating_point_images_of_zero_to_one_keep_their_contrast():
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    made = np.asarray(upright_rgb(Image.fromarray(values)))
    assert np.abs(made[..., 0] - 255 * values).max() <= 0.5


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--lora_plus_ratio", "4"]])
def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_is_loaded(flags, base, subject, tmp_path):
    train(base, subject, tmp_path, "--checkpointing_steps", "1")
    with pytest.raises(SerialLoraError, match=f"written with {flags[0]}"):
        train(base, subject, tmp_path, "--max_train_steps", "3", "--resume_from_checkpoint", "latest", *flags)


def test_a_new_run_in_an_old_folder_leaves_what_was_there_behind(base, subject, tmp_path):
    train(base, subject, tmp_path, "--checkpointing_steps", "1", "--max_train_steps", "3")
    train(base, subject, tmp_path, "--checkpointing_steps", "1")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "abandoned-checkpoint-3").is_dir() and log(tmp_path) == [1, 2]
    train(base, subject, tmp_path, "--max_train_steps", "3", "--resume_from_checkpoint", "checkpoint-1")
    assert log(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_blocks", "12,13"], "--layers"),
        (["--validation_epochs=3"], "--validation_steps"),
        (["--use_8bit_adam", "--optimizer", "prodigy"], "give one"),
    ],
)
def test_flags_without_a_namesake_say_what_to_use(flags, message, base, subject, tmp_path):
    with pytest.raises(SerialLoraError, match=message):
        train(base, subject, tmp_path, *flags)


def test_a_pipeline_of_another_family_is_named(subject, tmp_path):
    tiny_pixart_pipeline("sigma").save_pretrained(tmp_path / "pixart")
    with pytest.raises(SerialLoraError, match="has a PixArtTransformer2DModel"):
        train(tmp_path / "pixart", subject, tmp_path / "out")
