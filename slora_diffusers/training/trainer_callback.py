"""For those who train with transformers' Trainer: the adapter in its checkpoints.

    add_serial_lora(model, SerialLoraConfig(rank=8))
    trainer = Trainer(model, arguments, train_dataset=images, callbacks=[SerialLoraCallback()])

A model's own save_pretrained writes the base without pairs, so that it opens anywhere; so do the Trainer's checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..core.components import adapted, component_name, the_adapter
from ..core.state import matrices_of, registry_of
from ..files.format import AdapterFile
from ..files.save import save_serial_lora
from .checkpoint import load_parameters


class SerialLoraCallback(TrainerCallback):
    """Saves the adapter beside every checkpoint of the Trainer, and brings it back when that is resumed or is the best.

    Args:
        adapter_name: Which adapter; None takes the only one, or the only active one.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Refuse a model without an adapter; after `resume_from_checkpoint`, take the checkpoint's."""
        registry_of(model)
        if state.global_step:
            self._restore(model, _checkpoint(args, state))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write `serial_lora_weights.safetensors` into the checkpoint that was just made."""
        folder = _checkpoint(args, state)
        save_serial_lora(model, folder, self.adapter_name, is_main_process=state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """With `load_best_model_at_end`, take the adapter of the checkpoint that scored best."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore(model, Path(state.best_model_checkpoint))

    def _restore(self, model: nn.Module, folder: Path) -> None:
        """In place: the optimizer holds these very parameters.

        Raises:
            SerialLoraError: If the checkpoint holds no adapter, or another.
        """
        name = self.adapter_name or the_adapter(adapted(model))
        part = AdapterFile.read(folder).components.get(component_name(model))
        saved = {} if part is None else part.tensors
        load_parameters(list(matrices_of(model, name).items()), saved)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
