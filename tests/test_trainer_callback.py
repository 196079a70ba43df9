"""Training with transformers' Trainer: its checkpoints hold the adapter, resume with it and give back the best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from slora_diffusers import AdapterStateError, SerialLoraConfig, SerialLoraError, add_serial_lora, load_serial_lora
from slora_diffusers.training.trainer_callback import SerialLoraCallback
from tests.tiny.vision import SIZE, VISION

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Stripes(torch.utils.data.Dataset):
    """Images with a bright half, and which half."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        image[:, : SIZE // 2] += 2 * (index % 2)
        return {"pixel_values": image, "labels": torch.tensor(index % 2)}


def model(rank: int = 2) -> Any:
    base = VISION["ViTForImageClassification"].build()
    add_serial_lora(base, SerialLoraConfig(rank=rank))
    base.classifier.requires_grad_(True)
    return base


def trainer(built: nn.Module, folder: Any, **arguments: Any) -> Trainer:
    settings = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "seed": 3}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 4, **arguments}
    return Trainer(
        built,
        TrainingArguments(str(folder), **settings),
        train_dataset=Stripes(),
        eval_dataset=Stripes(),
        callbacks=[SerialLoraCallback()],
    )


def weights(built: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.named_parameters()}


def test_resuming_ends_where_an_unbroken_run_ends(tmp_path):
    whole = model()
    trainer(whole, tmp_path / "a").train()
    first = trainer(model(), tmp_path / "a")
    resumed = trainer(rest := model(), tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert all(torch.equal(tensor, weights(rest)[name]) for name, tensor in weights(whole).items())
    assert not all(torch.equal(tensor, weights(first.model)[name]) for name, tensor in weights(whole).items())


def test_checkpoint_opens_as_a_base_and_an_adapter(tmp_path):
    trained = model()
    trainer(trained, tmp_path).train()
    opened = type(trained).from_pretrained(tmp_path / "checkpoint-8").eval()
    load_serial_lora(opened, tmp_path / "checkpoint-8")
    image = Stripes()[0]["pixel_values"][None]
    assert torch.equal(opened(image).logits, trained.eval()(image).logits)


def test_best_checkpoint_is_what_training_ends_with(tmp_path):
    """A rate that ruins the model: the first evaluation is the best."""
    trained = model()
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "constant",
    }
    run = trainer(trained, tmp_path, learning_rate=3.0, **arguments)
    run.train()
    best = type(trained).from_pretrained(run.state.best_model_checkpoint).eval()
    load_serial_lora(best, run.state.best_model_checkpoint)
    assert all(torch.equal(tensor, weights(trained)[name]) for name, tensor in weights(best).items())
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_model_without_an_adapter_or_with_another_is_refused(tmp_path):
    with pytest.raises(AdapterStateError, match="no Serial LoRA adapter"):
        trainer(VISION["ViTForImageClassification"].build().requires_grad_(True), tmp_path / "none").train()
    trainer(model(), tmp_path, max_steps=4).train()
    with pytest.raises(SerialLoraError, match="does not fit"):
        trainer(model(rank=3), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
