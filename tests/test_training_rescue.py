"""Whatever ends a run, its work is kept; what is not the run itself (trackers, pictures, logs) cannot end it."""

from __future__ import annotations

import json
import os
import signal
import sys
import types

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTPipeline
from safetensors.torch import load_file

from slora_diffusers.recipes import dit
from slora_diffusers.training import loop
from slora_diffusers.training.checkpoint import checkpoints, read_checkpoint
from slora_diffusers.training.diffusion.denoising import Denoising
from slora_diffusers.training.log import ABANDONED, METRICS
from slora_diffusers.training.place import Place
from tests.tiny_runs import glyph_run
from tests.vision_recipes import classify

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
WEIGHTS = "serial_lora_weights.safetensors"


def train(base, out, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = glyph_run(base, out)
    argv += ["--max_train_steps", "4", "--validation_inference_steps", "1", "--num_validation_images", "1"]
    return dit.main([*argv, "--checkpointing_steps", "0", *flags])


def lines(out, name=METRICS):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def fail_at(monkeypatch, where, number, error):
    """Raise in the loss, in the optimizer or in the validation of one step."""
    if where == "loss":
        losses = Denoising.losses

        def failing(self, batch, *times):
            if batch.number == number - 1:
                raise error
            return losses(self, batch, *times)

        monkeypatch.setattr(Denoising, "losses", failing)
    elif where == "validation":
        validate = Denoising.validate

        def failing_validation(self, step):
            if step == number:
                raise error
            return validate(self, step)

        monkeypatch.setattr(Denoising, "validate", failing_validation)
    else:
        step, count = torch.optim.AdamW.step, [0]

        def failing_step(self, *arguments, **more):
            count[0] += 1
            result = step(self, *arguments, **more)
            if count[0] == number:
                raise error
            return result

        monkeypatch.setattr(torch.optim.AdamW, "step", failing_step)


class Odd(Exception):
    """One that nobody foresees."""


@pytest.mark.parametrize(
    "error", [Odd("?"), RuntimeError("CUDA error"), KeyboardInterrupt(), SystemExit(3), OSError(5)]
)
@pytest.mark.parametrize(("where", "kept"), [("loss", 2), ("validation", 3)])
def test_any_exception_saves_the_last_step_first_and_it_resumes_to_the_bit(
    error, where, kept, dit_base, tmp_path, monkeypatch
):
    flags = ["--validation_steps", "3"] if where == "validation" else []
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        fail_at(patch, where, 3, error)
        train(dit_base, tmp_path / "broken", *flags)
    (saved,) = checkpoints(tmp_path / "broken")
    assert saved.name == f"checkpoint-{kept}" and (saved / WEIGHTS).is_file()
    if isinstance(error, Odd):
        resumed = load_file(train(dit_base, tmp_path / "broken", *flags, "--resume_from_checkpoint", "latest"))
        through = load_file(train(dit_base, tmp_path / "through", *flags))
        assert all(resumed[key].equal(through[key]) for key in through)


def test_an_exception_between_two_steps_saves_the_weights_and_no_state_that_does_not_fit_them(
    dit_base, tmp_path, monkeypatch
):
    fail_at(monkeypatch, "optimizer", 3, Odd())
    with pytest.raises(Odd):
        train(dit_base, tmp_path, "--checkpointing_steps", "2")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert load_file(tmp_path / "rescued-2" / WEIGHTS)


def test_nothing_is_saved_where_nothing_was_learnt(dit_base, tmp_path, monkeypatch):
    fail_at(monkeypatch, "loss", 1, Odd())
    with pytest.raises(Odd):
        train(dit_base, tmp_path)
    assert not checkpoints(tmp_path) and not list(tmp_path.glob("rescued-*"))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_the_step_with_everything_saved(name, dit_base, tmp_path, monkeypatch):
    losses = Denoising.losses

    def dropped(self, batch, *times):
        if batch.number == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return losses(self, batch, *times)

    monkeypatch.setattr(Denoising, "losses", dropped)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal
    try:
        assert train(dit_base, tmp_path).exists()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_signal_that_was_ignored_stays_so(monkeypatch):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Tracker:
    """One of accelerate's, whose every call fails from some call on."""

    name, requires_logging_directory, main_process_only = "failing", False, True

    def __init__(self, good):
        self.good, self.calls = good, 0

    def _call(self, *_, **__):
        self.calls += 1
        if self.calls > self.good:
            raise ConnectionError("no network")

    log = log_images = store_init_configuration = finish = start = _call


@pytest.mark.parametrize("good", [0, 3])
def test_a_trackers_failure_is_a_warning(good, dit_base, tmp_path, monkeypatch, caplog):
    tracker = Tracker(good)
    place = Place.__init__

    def with_tracker(self, options):
        place(self, options)
        self.accelerator.trackers = [tracker]

    monkeypatch.setattr(Place, "__init__", with_tracker)
    assert train(dit_base, tmp_path, "--validation_steps", "2").exists()
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]
    assert tracker.calls > 4 and caplog.text.count("the run goes on without it") == 2  # logging, and its end


def test_a_tracker_that_cannot_even_start_is_a_warning(dit_base, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    assert train(dit_base, tmp_path, "--report_to", "tensorboard").exists()
    assert "starting tensorboard failed" in caplog.text


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["picture", "loss"])
def test_validation_that_does_not_fit_is_skipped_with_a_warning(error, where, dit_base, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise error

    if where == "picture":
        monkeypatch.setattr(DiTPipeline, "__call__", fails)
    else:
        monkeypatch.setattr("slora_diffusers.training.diffusion.denoising.fixed_noise_loss", fails)
    assert train(dit_base, tmp_path, "--validation_steps", "2").exists()
    losses = [line for line in lines(tmp_path) if "validation_loss" in line]
    assert len(losses) == (3 if where == "picture" else 0)
    assert caplog.text.count("does not fit into memory and is skipped") == 3


def test_other_errors_of_validation_are_not_swallowed(dit_base, tmp_path, monkeypatch):
    monkeypatch.setattr(DiTPipeline, "__call__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(dit_base, tmp_path, "--validation_steps", "2")


def test_out_of_memory_in_a_vision_validation_is_skipped_too(vit_base, stripes, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr("slora_diffusers.training.vision.classification.logits_of", fails)
    flags = ["--max_train_steps", "2", "--validation_steps", "1", "--early_stopping", "1", "--shots", "2"]
    assert classify(vit_base, stripes, tmp_path, *flags) == {}
    assert (tmp_path / WEIGHTS).exists() and "is skipped" in caplog.text


@pytest.mark.parametrize("half", ['{"step": 2, "lo', "", "\x00\x00", "[1]", '{"step": "x"}', "[" * 5000, "\udcff"])
def test_half_a_line_of_metrics_blocks_no_resume(half, dit_base, tmp_path):
    train(dit_base, tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "1")
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole + half.encode(errors="surrogateescape"))
    train(dit_base, tmp_path, "--max_train_steps", "3", "--resume_from_checkpoint", "checkpoint-1")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    moved = (tmp_path / ABANDONED).read_bytes().splitlines()
    assert moved[0] == whole.splitlines()[1] and len(moved) == 1 + bool(half)


def test_a_second_run_into_a_folder_keeps_the_first_ones_metrics(dit_base, tmp_path):
    train(dit_base, tmp_path, "--max_train_steps", "3")
    first = lines(tmp_path)
    train(dit_base, tmp_path, "--max_train_steps", "2")
    assert lines(tmp_path, ABANDONED) == first and [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_checkpoint_holds_the_adapter_as_it_would_be_saved(dit_base, tmp_path):
    """Averaged, where the average is what is saved; each step can be loaded and picked."""
    flags = ["--use_ema", "--ema_decay", "0.5", "--max_train_steps", "3", "--checkpointing_steps", "1"]
    final = load_file(train(dit_base, tmp_path, *flags))
    steps = [load_file(tmp_path / f"checkpoint-{n}" / WEIGHTS) for n in (1, 2, 3)]
    assert all(steps[2][key].equal(final[key]) for key in final)
    assert any(not steps[0][key].equal(steps[1][key]) for key in final)
    raw = read_checkpoint(tmp_path / "checkpoint-3")["trained"]
    assert not any(tensor.equal(other) for tensor in raw.values() for other in final.values() if tensor.abs().max() > 0)
    pipe = DiTPipeline.from_pretrained(dit_base)
    pipe.load_serial_lora(tmp_path / "checkpoint-2")
    assert pipe.serial_lora_status()


@pytest.mark.parametrize("adapter", ["lora", "head", "full"])
def test_other_adapters_lie_in_checkpoints_too_and_every_weight_only_once(adapter, vit_base, stripes, tmp_path):
    flags = ["--max_train_steps", "1", "--checkpointing_steps", "1", "--adapter", adapter, "--shots", "2"]
    classify(vit_base, stripes, tmp_path, *flags)
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()} - {"training_state.pt"}
    expected = {"lora": {"pytorch_lora_weights.safetensors", "head.safetensors"}, "head": {WEIGHTS}, "full": set()}
    assert names == expected[adapter]


def test_a_windows_process_knows_its_memory_without_the_module_resource(monkeypatch):
    import psutil

    peak = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=7 * 2**20))
    monkeypatch.setattr(psutil, "Process", lambda: peak)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert loop.peak_memory(torch.device("cpu")) == 7 * 2**20
