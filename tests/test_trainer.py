"""SerialLoraTrainer on every kind of model: it resumes what was given, ends with the best, and what it saves opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from slora_diffusers import (
    SerialLoraConfig,
    SerialLoraError,
    SerialLoraForImageClassification,
    SerialLoraForPromptableSegmentation,
    SerialLoraForSemanticSegmentation,
    add_serial_lora,
    load_serial_lora,
)
from slora_diffusers.errors import AdapterStateError
from slora_diffusers.training import SerialLoraTrainer, SerialLoraTrainerMixin
from slora_diffusers.training.trained_parts import REST_NAME
from slora_diffusers.training.trainer_callback import SerialLoraCallback
from tests.test_vision import PREPARE
from tests.test_vision_promptable import MODELS, batch, make
from tests.tiny.text import TEXT
from tests.tiny.vision import SIZE, VISION

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    # transformers renames it to activation_checkpointing; what users write today has to work.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]
CONFIG = SerialLoraConfig(rank=2)


class Rows(torch.utils.data.Dataset):
    """Sixteen rows, each made from its index."""

    def __init__(self, row: Callable[[int, torch.Generator], dict[str, Tensor]]) -> None:
        self.row = row

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index, torch.Generator().manual_seed(index))


def picture(index: int, draw: torch.Generator) -> dict[str, Tensor]:
    """An image with a bright half, and which half."""
    image = torch.randn(3, SIZE, SIZE, generator=draw)
    image[:, : SIZE // 2] += 2 * (index % 2)
    return {"pixel_values": image, "labels": torch.tensor(index % 2)}


def scene(index: int, draw: torch.Generator) -> dict[str, Tensor]:
    image = picture(index, draw)["pixel_values"]
    return {"pixel_values": image, "labels": (image.mean(0) > 0).long()}


def prompted(index: int, draw: torch.Generator) -> dict[str, Tensor]:
    given = {key: tensor[0] for key, tensor in batch("sam").items()}
    return {**given, "pixel_values": torch.randn(given["pixel_values"].shape, generator=draw)}


def text(index: int, draw: torch.Generator) -> dict[str, Tensor]:
    ids = (torch.arange(8) * (1 + index % 3) + index) % 48
    return {"input_ids": ids, "labels": ids}


def vit() -> nn.Module:
    model = VISION["ViTForImageClassification"].build()
    add_serial_lora(model, CONFIG)
    model.classifier.requires_grad_(True)
    return model


def llama() -> nn.Module:
    model = TEXT["LlamaForCausalLM"].build()
    add_serial_lora(model, CONFIG)
    return model


def reopen_vit(folder: Path) -> nn.Module:
    model = type(VISION["ViTForImageClassification"].build()).from_pretrained(folder)
    load_serial_lora(model, folder)
    return model


def reopen_llama(folder: Path) -> nn.Module:
    model = TEXT["LlamaForCausalLM"].build()
    load_serial_lora(model, folder)
    return model


def classifier() -> nn.Module:
    return SerialLoraForImageClassification.from_backbone(
        VISION["Dinov2Model"].build(), 2, CONFIG, preprocessing=PREPARE
    )


def segmenter() -> nn.Module:
    base = VISION["Dinov2Model"].build()
    return SerialLoraForSemanticSegmentation.from_backbone(
        base, 2, CONFIG, head="convolutional", width=8, preprocessing=PREPARE
    )


@dataclass(frozen=True)
class Kind:
    build: Callable[[], nn.Module]
    row: Callable[[int, torch.Generator], dict[str, Tensor]]
    reopen: Callable[[Path], nn.Module]


def _head(kind: Any, base: Callable[[], nn.Module]) -> Callable[[Path], nn.Module]:
    return lambda folder: kind.from_pretrained(folder, backbone=base())


KINDS = {
    "vit": Kind(vit, picture, reopen_vit),
    "llama": Kind(llama, text, reopen_llama),
    "classifier": Kind(
        classifier, picture, _head(SerialLoraForImageClassification, lambda: VISION["Dinov2Model"].build())
    ),
    "segmenter": Kind(
        segmenter, scene, _head(SerialLoraForSemanticSegmentation, lambda: VISION["Dinov2Model"].build())
    ),
    "sam": Kind(make, prompted, _head(SerialLoraForPromptableSegmentation, lambda: MODELS["sam"][0].build())),
}


SLOW = ("llama", "classifier", "segmenter")


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    return KINDS[name].build()


def trainer(model: nn.Module, name: str, folder: Path, kind: Any = SerialLoraTrainer, **arguments: Any) -> Any:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.02, "seed": 3}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 2, **arguments}
    rows = Rows(KINDS[name].row)
    more = {"callbacks": [SerialLoraCallback()]} if kind is Trainer else {}
    return kind(model, TrainingArguments(str(folder), **settings), train_dataset=rows, eval_dataset=rows, **more)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.named_parameters()}


def same(one: nn.Module | dict[str, Tensor], other: nn.Module) -> bool:
    first, second = one if isinstance(one, dict) else weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def moved_run(name: str, tmp_path: Path, kind: Any) -> tuple[nn.Module, Path]:
    """A whole run whose folder then moves; another run's checkpoints of the same numbers are in "here"."""
    whole = build(name)
    trainer(whole, name, tmp_path / "was", kind).train()
    trainer(build(name), name, tmp_path / "here", kind, learning_rate=0.1, seed=4).train()
    shutil.move(tmp_path / "was", tmp_path / "moved")
    return whole, tmp_path / "moved" / "checkpoint-2"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, SerialLoraTrainer) for name in KINDS),
        *(pytest.param(name, Trainer, marks=pytest.mark.slow if name in SLOW else ()) for name in KINDS),
    ],
)
def test_resuming_takes_the_checkpoint_that_was_given(name: str, kind: Any, tmp_path):
    whole, checkpoint = moved_run(name, tmp_path, kind)
    resumed = build(name)
    trainer(resumed, name, tmp_path / "here", kind).train(resume_from_checkpoint=str(checkpoint))
    assert same(whole, resumed)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_opens_as_it_was_trained(name: str, tmp_path):
    model = build(name)
    run = trainer(model, name, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "final"))
    row = {key: tensor[None] for key, tensor in Rows(KINDS[name].row)[3].items()}
    with torch.no_grad():
        expected = model.eval()(**row).loss
        for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-4"):
            assert torch.equal(KINDS[name].reopen(folder).eval()(**row).loss, expected)


@pytest.mark.parametrize("name", ["vit", "llama", "segmenter", "sam"])
def test_best_checkpoint_is_what_training_ends_with(name: str, tmp_path):
    """The loss falls, and the largest is taken for the best: the first evaluation, not the last."""
    model = build(name)
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(model, name, tmp_path, load_best_model_at_end=True, **options)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[-1] < max(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-4)
    assert same(KINDS[name].reopen(Path(run.state.best_model_checkpoint)), model)


@pytest.mark.parametrize("kind", [SerialLoraTrainer, Trainer], ids=["trainer", "callback"])
def test_best_checkpoint_is_found_where_the_run_has_moved(kind: Any, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.7, "lr_scheduler_type": "constant"}
    first = trainer(build("llama"), "llama", tmp_path / "was", kind, load_best_model_at_end=True, **options)
    first.train()
    best = Path(first.state.best_model_checkpoint).name
    assert best == "checkpoint-2"
    shutil.move(tmp_path / "was", tmp_path / "now")
    again = trainer(build("llama"), "llama", tmp_path / "now", kind, load_best_model_at_end=True, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "now" / "checkpoint-4"))
    assert same(KINDS["llama"].reopen(tmp_path / "now" / best), again.model)


@pytest.mark.parametrize("name", KINDS)
def test_checkpointed_activations_give_the_same_weights(name: str, tmp_path):
    trained = []
    for options in ({}, {"gradient_checkpointing": True}):
        trained.append(build(name))
        trainer(trained[-1], name, tmp_path, max_steps=3, save_strategy="no", **options).train()
    for key, tensor in weights(trained[0]).items():
        torch.testing.assert_close(trained[1].get_parameter(key), tensor)
    assert not same(build(name), trained[1])


def test_reentrant_checkpoints_reach_the_pairs_too(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trained = [build("llama"), build("llama")]
    trainer(trained[0], "llama", tmp_path, max_steps=3, save_strategy="no").train()
    trainer(trained[1], "llama", tmp_path, max_steps=3, save_strategy="no", **options).train()
    for key, tensor in weights(trained[0]).items():
        torch.testing.assert_close(trained[1].get_parameter(key), tensor)


def test_checkpoints_hold_what_trains_and_no_more(tmp_path):
    trainer(build("llama"), "llama", tmp_path / "llama").train()
    trainer(build("vit"), "vit", tmp_path / "vit").train()
    names = {
        name: {p.name for p in (tmp_path / name / "checkpoint-4").glob("*.safetensors")} for name in ("llama", "vit")
    }
    assert names["llama"] == {"serial_lora_weights.safetensors"}
    assert names["vit"] == {"serial_lora_weights.safetensors", "model.safetensors", REST_NAME}
    with safe_open(tmp_path / "vit" / "checkpoint-4" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "serial_lora" in key]  # noqa: SIM118


def test_a_plain_trainer_with_the_callback_saves_the_adapter_beside_the_model(tmp_path):
    model = build("vit")
    run = trainer(model, "vit", tmp_path / "run", Trainer)
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert same(reopen_vit(tmp_path / "final"), model)


@pytest.mark.parametrize("kind", [SerialLoraTrainer, Trainer], ids=["trainer", "callback"])
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: Any, tmp_path):
    trainer(build("llama"), "llama", tmp_path, kind).train()
    for config, message in (
        (SerialLoraConfig(rank=3), "does not fit"),
        (SerialLoraConfig(rank=2, alpha=7), "was trained with alpha=None"),
        (SerialLoraConfig(rank=2, inputs=("attention_output",)), "does not fit"),
    ):
        model = TEXT["LlamaForCausalLM"].build()
        add_serial_lora(model, config)
        before = weights(model)
        with pytest.raises(SerialLoraError, match=message):
            trainer(model, "llama", tmp_path, kind).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert same(before, model)


def test_another_adapter_in_the_place_of_the_checkpoints_is_not_taken(tmp_path):
    """trainer_state.json tells which adapter it was written with."""
    for name, seed in (("one", 3), ("two", 4)):
        trainer(build("vit"), "vit", tmp_path / name, Trainer, seed=seed).train()
    weights_file = "checkpoint-4/serial_lora_weights.safetensors"
    shutil.copy(tmp_path / "two" / weights_file, tmp_path / "one" / weights_file)
    run = trainer(build("vit"), "vit", tmp_path / "one", Trainer)
    with pytest.raises(SerialLoraError, match=r"has no adapter that its trainer_state\.json tells of"):
        run.train(resume_from_checkpoint=True)


def test_a_model_without_an_adapter_is_refused_before_training(tmp_path):
    with pytest.raises(AdapterStateError, match="no Serial LoRA adapter"):
        trainer(TEXT["LlamaForCausalLM"].build(), "llama", tmp_path)


def test_another_trainer_takes_the_mixin(tmp_path):
    class Mine(SerialLoraTrainerMixin, Seq2SeqTrainer):
        pass

    model = build("llama")
    arguments = Seq2SeqTrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    run = Mine(model, arguments, train_dataset=Rows(text))
    run.train()
    run.save_model()
    assert same(reopen_llama(tmp_path), model)


@pytest.mark.parametrize("name", ["llama", "classifier", "vit"])
def test_what_is_pushed_opens_as_it_was_trained(name: str, tmp_path, monkeypatch):
    pushed: list[set[str]] = []
    hub = tmp_path / "hub"

    def upload(self: Any, *, folder_path: Any, ignore_patterns: Any = (), **_: Any) -> Any:
        shutil.copytree(folder_path, hub, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore_patterns))
        pushed.append({path.name for path in hub.iterdir()})

        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})())
    model = build(name)
    run = trainer(model, name, tmp_path / "run", push_to_hub=True, hub_model_id="me/adapter")
    run.train()
    run.push_to_hub()
    assert all("serial_lora_weights.safetensors" in names for names in pushed)
    assert len(pushed) >= 2
    assert same(KINDS[name].reopen(hub), model)
    assert "serial-lora" in (hub / "README.md").read_text()


def test_dropout_that_differs_is_no_reason_to_refuse(tmp_path):
    trainer(build("llama"), "llama", tmp_path).train()
    model = TEXT["LlamaForCausalLM"].build()
    add_serial_lora(model, SerialLoraConfig(rank=2, dropout=0.1))
    trainer(model, "llama", tmp_path, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
