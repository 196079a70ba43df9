"""Training: the recipes' loop, methods and data, and `SerialLoraTrainer` for those who use transformers' Trainer."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`SerialLoraTrainer` and its mixin, which import transformers' Trainer: only once they are asked for."""
    if name in ("SerialLoraTrainer", "SerialLoraTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
