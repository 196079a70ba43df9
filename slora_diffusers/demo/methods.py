"""The ways to fine-tune that the demo and its benchmark compare, and how each is set."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from safetensors.torch import save_file
from torch import nn

from .. import SerialLoraConfig, add_serial_lora, initialize_serial_lora, save_serial_lora
from .adapt import Setting, finetune, loss_over, training_data
from .glyphs import Face

RANK = 16  # of the paper's pair: a quarter of the parameters of a LoRA of this rank
BATCHES = 8  # of the training loss that a start from the gradient looks at


def _serial(*inputs: str) -> Callable[[nn.Module], object]:
    return lambda model: add_serial_lora(model, SerialLoraConfig(rank=RANK, inputs=inputs or None))


def _lora(rank: int) -> Callable[[nn.Module], object]:
    """PEFT's, on what Serial LoRA's pair feeds and on the output, which is LoRA's usual choice."""

    def prepare(model: nn.Module) -> None:
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        peft.inject_adapter_in_model(config, model.requires_grad_(False))

    return prepare


def _save_lora(model: nn.Module, folder: Path) -> None:
    import peft

    save_file(peft.get_peft_model_state_dict(model), folder / "lora.safetensors")


def _save_model(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Method:
    """How a method makes a model trainable, writes what it trained, and is set."""

    prepare: Callable[[nn.Module], object]
    save: Callable[[nn.Module, Path], object]
    setting: Setting
    gradient_start: bool = False


ADAPTER = Setting(learning_rate=1e-2)
METHODS = {
    "Serial LoRA": Method(_serial(), save_serial_lora, ADAPTER, gradient_start=True),
    "Serial LoRA, usual start": Method(_serial(), save_serial_lora, ADAPTER),
    "Serial LoRA + output": Method(_serial("hidden_states", "attention_output"), save_serial_lora, ADAPTER),
    "LoRA r=4": Method(_lora(4), _save_lora, ADAPTER),  # as many parameters as Serial LoRA
    "LoRA r=16": Method(_lora(16), _save_lora, ADAPTER),
    "full fine-tuning": Method(lambda model: None, _save_model, Setting(learning_rate=3e-4)),
}
SERIAL, SAME_SIZE, FULL = "Serial LoRA", "LoRA r=4", "full fine-tuning"  # what the demo shows


@dataclass
class FineTuning:
    """One fine-tuning of a pipeline's transformer: `run` it, then `save` what it trained."""

    pipe: DiTPipeline
    method: Method
    setting: Setting
    seconds: float = 0.0

    def run(self, face: Face) -> Iterator[float]:
        """Trains on the seen letters of `face`; yields the loss of every step."""
        started = time.time()
        torch.manual_seed(self.setting.seed)
        model = self.pipe.transformer
        self.method.prepare(model)
        if self.method.gradient_start:
            data = training_data(self.pipe, face, self.setting)
            initialize_serial_lora(model, lambda: loss_over(self.pipe, data, self.setting, BATCHES).backward())
        yield from finetune(self.pipe, self.parameters, face, self.setting)
        self.seconds = time.time() - started

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.pipe.transformer.parameters() if p.requires_grad]

    def size(self) -> int:
        """Bytes of the file that holds what was trained."""
        with tempfile.TemporaryDirectory() as folder:
            self.method.save(self.pipe.transformer, Path(folder))
            return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def fine_tuning(pipe: DiTPipeline, name: str, seed: int, **changes: Any) -> FineTuning:
    """A method by name, with its own setting but for the seed and `changes`."""
    method = METHODS[name]
    return FineTuning(pipe, method, replace(method.setting, seed=seed, **changes))
