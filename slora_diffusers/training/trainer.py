"""transformers' Trainer for a model with a Serial LoRA adapter: everything as usual, and the adapter goes along.

    add_serial_lora(model, SerialLoraConfig(rank=8))
    trainer = SerialLoraTrainer(model, TrainingArguments("run"), train_dataset=texts)
    trainer.train(resume_from_checkpoint="run/checkpoint-500")
    trainer.save_model("adapter")  # load_serial_lora(model, "adapter")

A folder that it writes holds what was trained: the adapter; of a model with a head the adapter and the head, so that
`from_pretrained` opens it; and the whole model beside the adapter where more than pairs trains, such as a classifier.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..files.storage import WEIGHT_NAME
from ..heads.card import write_head_card
from .trained_parts import (
    REST_NAME,
    check_trainable,
    follow_best,
    head_of,
    load_trained,
    prepare_checkpointing,
    save_trained,
    trains_more_than_pairs,
)


class SerialLoraTrainerMixin:
    """What `SerialLoraTrainer` adds to a Trainer. Before yours: `class Mine(SerialLoraTrainerMixin, SFTTrainer)`.

    Args:
        *arguments: Of the Trainer.
        adapter_name: The adapter that trains; None takes the only one, or the only active one.
        **named: Of the Trainer.
    """

    args: Any
    model: Any
    state: Any
    label_names: list[str]

    def __init__(self, *arguments: Any, adapter_name: str | None = None, **named: Any) -> None:
        self.adapter_name = adapter_name
        super().__init__(*arguments, **named)
        model = self.model
        check_trainable(model)
        prepare_checkpointing(model, self.args)
        head = head_of(model)
        if head is not None and self.args.label_names is None:
            self.label_names = list(head.label_arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_trained(self.model, folder, self.adapter_name, self.args.should_save)
        if trains_more_than_pairs(self.model):
            super()._save(str(folder), state_dict)  # type: ignore[misc]
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = getattr(self, "processing_class", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed = Path(resume_from_checkpoint)
        load_trained(self.model, self._resumed, self.adapter_name)

    def _load_best_model(self) -> None:
        load_trained(self.model, Path(self.state.best_model_checkpoint), self.adapter_name)

    def _load_callback_state(self) -> None:
        follow_best(self.state, self._resumed)  # the state was read just now
        super()._load_callback_state()  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        for written in (Path(checkpoint_folder) / name for name in (WEIGHT_NAME, REST_NAME)):
            if self.args.should_save and written.is_file():
                shutil.copy(written, Path(self.args.output_dir) / written.name)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def create_model_card(self, *arguments: Any, tags: Any = None, **named: Any) -> None:
        """The Trainer's own card, with the tags serial-lora and lora; for a model with a head, one that opens it."""
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        if (head := head_of(self.model)) is not None:
            repository = self.args.hub_model_id or Path(self.args.output_dir).name
            if self.args.should_save:
                write_head_card(head, Path(self.args.output_dir), repository, tags)
            return
        super().create_model_card(*arguments, tags=[*tags, "serial-lora", "lora"], **named)  # type: ignore[misc]


class SerialLoraTrainer(SerialLoraTrainerMixin, Trainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' Trainer, which saves, resumes and pushes the adapter, and the head of a model that has one.

    Args:
        *arguments: Of the Trainer.
        adapter_name: The adapter that trains; None takes the only one, or the only active one.
        **named: Of the Trainer.

    Raises:
        AdapterStateError: If the model has neither an adapter nor a head of this library.
    """


__all__ = ["SerialLoraTrainer", "SerialLoraTrainerMixin"]
