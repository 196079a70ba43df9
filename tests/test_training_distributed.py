"""Runs in processes of their own: two gloo processes, accelerate launch, and one that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.tiny.pipelines import tiny_dit_pipeline

ROOT = Path(__file__).parents[1]
WEIGHTS = "serial_lora_weights.safetensors"
SCRIPT = [str(ROOT / "train_scripts" / "train_dit.py")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def run(*command, **more):
    return subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, cwd=ROOT, timeout=500, capture_output=True, text=True, **more
    )


def wait_until(true, process):
    """Wait until something is true, while the process that is to make it true lives."""
    deadline = time.monotonic() + 300
    while not true() and time.monotonic() < deadline:
        assert process is None or process.poll() is None, "the process ended before"
        time.sleep(0.02)
    assert true()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_dit_pipeline("epsilon", learned_sigma=True).save_pretrained(folder)
    return folder


def flags(base, out, batch, **options):
    options = {
        "glyphs": "script", "glyph_variations": 1, "max_train_steps": 4, "validation_steps": 2, "rank": 4,
        "validation_inference_steps": 2, "num_validation_images": 1, "validation_labels": 0, "learning_rate": 1e-2,
        "checkpointing_steps": 2, "label_dropout": 0.2, "train_batch_size": batch, **options,
    }  # fmt: skip
    paths = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out)]
    return paths + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def log(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_two_processes_equal_one_at_the_same_global_batch_and_write_one_file(base, tmp_path):
    two = run(*TORCHRUN, *SCRIPT, *flags(base, tmp_path / "two", 3, offload="blocks"))
    assert two.returncode == 0, two.stderr[-3000:]
    one = run(*SCRIPT, *flags(base, tmp_path / "one", 6))
    assert one.returncode == 0, one.stderr[-3000:]
    for name in ("loss", "grad_norm", "validation_loss"):
        ours, theirs = log(tmp_path / "two", name), log(tmp_path / "one", name)
        assert ours.keys() == theirs.keys()
        assert_close([*ours.values()], [*theirs.values()], rtol=1e-4, atol=1e-6)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("two", "one"))
    for key in theirs:
        assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)
    assert [path.name for path in (tmp_path / "two").glob("*.safetensors")] == [WEIGHTS]
    draw = [str(ROOT / "pipelines" / "generate_dit.py"), "--base", str(base), "--labels", "0", "--steps", "2"]
    fresh = run(*draw, "--adapter", str(tmp_path / "two"), "--output", str(tmp_path / "fresh.png"))
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    drawn, in_the_run = (tmp_path / "fresh.png", tmp_path / "two" / "validation" / "images-000004.png")
    with Image.open(drawn) as ours, Image.open(in_the_run) as theirs:
        assert ours.tobytes() == theirs.tobytes()
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_killed_run_resumes_to_the_bit_under_accelerate_launch(base, tmp_path):
    options = {"max_train_steps": 12, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "validation_steps": 0}
    through = run(*LAUNCH, *SCRIPT, *flags(base, tmp_path / "through", 3, **options))
    assert through.returncode == 0, through.stderr[-3000:]
    out = tmp_path / "killed"
    command = [sys.executable, *SCRIPT, *flags(base, out, 3, **options)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((out / "checkpoint-4").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()
    resumed = run(*LAUNCH, *SCRIPT, *flags(base, out, 3, **options, resume_from_checkpoint="latest"))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    one, other = load_file(tmp_path / "through" / WEIGHTS), load_file(out / WEIGHTS)
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    assert log(out, "loss") == log(tmp_path / "through", "loss")


def test_ending_accelerate_launch_saves_a_checkpoint_and_ends_the_run(base, tmp_path):
    out = tmp_path / "out"
    options = {"max_train_steps": 100000, "checkpointing_steps": 0, "validation_steps": 0}
    process = subprocess.Popen(
        [sys.executable, *LAUNCH, *SCRIPT, *flags(base, out, 3, **options)],
        env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(log(out, "loss")) > 3, process)
    process.terminate()
    process.wait(timeout=60)
    wait_until((out / WEIGHTS).exists, None)
    (checkpoint,) = out.glob("checkpoint-*")
    steps = log(out, "loss")
    time.sleep(1)
    assert log(out, "loss") == steps and checkpoint.name == f"checkpoint-{max(steps)}"


@pytest.mark.slow  # four runs; two processes that equal one are tested above
def test_two_processes_train_a_vision_model_whose_weights_are_not_all_used(vit_base, stripes, scenes, tmp_path):
    """DINOv2's mask token, and the pairs of blocks after the last one that the head reads, get no gradient."""
    common = ["--pretrained_model_name_or_path", str(vit_base), "--rank", "4", "--max_train_steps", "3"]
    common += ["--validation_steps", "3", "--checkpointing_steps", "0"]
    labels = ["--label_map", str(scenes / "labels.json"), "--validation_data_dir", str(scenes)]
    head = ["--head", "convolutional", "--head_layers", "0", "--head_width", "8"]
    cases = {
        "classification": ["--train_data_dir", str(stripes), "--adapter", "full"],
        "segmentation": ["--train_data_dir", str(scenes), *labels, *head],
    }
    for name, own in cases.items():
        script = str(ROOT / "train_scripts" / f"train_vit_{name}.py")
        for count, launch in ((2, TORCHRUN), (1, [])):
            out = ["--output_dir", str(tmp_path / f"{name}-{count}"), "--train_batch_size", str(8 // count)]
            done = run(*launch, script, *common, *own, *out)
            assert done.returncode == 0, done.stderr[-3000:]
        for measured in ("loss", "grad_norm", "top1" if name == "classification" else "miou"):
            two, one = (log(tmp_path / f"{name}-{count}", measured) for count in (2, 1))
            assert two.keys() == one.keys() and len(one)
            assert_close([*two.values()], [*one.values()], rtol=1e-3, atol=1e-5)


def test_fsdp2_shards_save_and_resume_as_one_process(tmp_path):
    worker = str(ROOT / "tests" / "fsdp2_worker.py")
    two = run(*TORCHRUN, worker, str(tmp_path / "two"), "2")
    assert two.returncode == 0, two.stderr[-3000:]
    one = run(worker, str(tmp_path / "one"), "1")
    assert one.returncode == 0, one.stderr[-3000:]
    through, resumed = (load_file(tmp_path / "two" / name / WEIGHTS) for name in ("through", "resumed"))
    alone = load_file(tmp_path / "one" / "through" / WEIGHTS)
    for key in alone:
        assert resumed[key].equal(through[key])
        assert_close(through[key], alone[key], rtol=1e-3, atol=1e-4)
