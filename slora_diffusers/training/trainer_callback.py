"""For those who train with a Trainer of their own: the adapter in what it writes. `SerialLoraTrainer` needs none of it.

    trainer = Trainer(model, arguments, train_dataset=images, callbacks=[SerialLoraCallback()])

The Trainer then writes the model as its own save_pretrained does, without pairs, and the adapter's file beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..adapters.save_pretrained import SavePretrained
from ..core.sites import unwrap
from ..errors import SerialLoraError
from .trained_parts import (
    check_trainable,
    follow_best,
    has_digest,
    load_trained,
    prepare_checkpointing,
    save_trained,
    trained_digest,
)


class SerialLoraCallback(TrainerCallback, ExportableState):
    """Saves the adapter with every checkpoint and model of the Trainer, and brings back the resumed or the best one.

    Args:
        adapter_name: Which adapter; None takes the only one, or the only active one.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self._model: nn.Module | None = None

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: which adapter the checkpoint has, so that no other one is taken for it."""
        digest = None if self._model is None else trained_digest(self._model, self.adapter_name)
        return {"args": {"adapter_name": self.adapter_name}, "attributes": {"digest": digest}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """From now on what the Trainer saves has the adapter beside it."""
        self._prepare(model)
        prepare_checkpointing(model, args)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Refuse a model without an adapter; after `resume_from_checkpoint`, take the checkpoint's."""
        check_trainable(model)
        self._prepare(model)
        self._model = model
        if state.global_step:
            folder = _resumed(args, state)
            load_trained(model, folder, self.adapter_name)
            follow_best(state, folder)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write `serial_lora_weights.safetensors` into the checkpoint that was just made."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_trained(model, folder, self.adapter_name, state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """With `load_best_model_at_end`, take the adapter of the checkpoint that scored best."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_trained(model, Path(state.best_model_checkpoint), self.adapter_name)

    def _prepare(self, model: nn.Module) -> None:
        saver = vars(unwrap(model)).get("save_pretrained")
        if isinstance(saver, SavePretrained):
            saver.beside = lambda folder: save_trained(model, Path(folder), self.adapter_name)


def _resumed(args: Any, state: Any) -> Path:
    """The checkpoint whose state the Trainer took, told by the hash of its adapter.

    Raises:
        SerialLoraError: If it is not where it could be.
    """
    own = state.stateful_callbacks.get(SerialLoraCallback.__name__, {})
    digest = own.get("attributes", {}).get("digest") if isinstance(own, dict) else None
    for folder in _candidates(args, state):
        if has_digest(folder, digest):
            return folder
    raise SerialLoraError(
        "The checkpoint to resume from has no adapter that its trainer_state.json tells of: "
        f"{', '.join(map(str, dict.fromkeys(_candidates(args, state))))}. Was it written without SerialLoraCallback?"
    )


def _candidates(args: Any, state: Any) -> Iterator[Path]:
    """Where the checkpoint may be. Callbacks are not told what `train` was given, so the Trainer's frame is asked."""
    frame = inspect.currentframe()
    while frame is not None:
        given = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(given, str | Path):
            yield Path(given)
        frame = frame.f_back
    if isinstance(args.resume_from_checkpoint, str):
        yield Path(args.resume_from_checkpoint)
    yield Path(args.output_dir) / f"checkpoint-{state.global_step}"
