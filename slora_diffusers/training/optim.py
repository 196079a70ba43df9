"""Optimizers from their libraries, and parameter groups for LoRA+."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import SerialLoraError


@dataclass(frozen=True)
class OptimizerChoice:
    """Where an optimizer comes from: `module.name`, of the package `package`."""

    module: str
    name: str
    package: str = "torch"
    takes_betas: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": OptimizerChoice("torch.optim", "AdamW"),
    "adamw8bit": OptimizerChoice("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "schedulefree": OptimizerChoice("schedulefree", "AdamWScheduleFree", "schedulefree"),
    "prodigy": OptimizerChoice(
        "prodigyopt", "Prodigy", "prodigyopt", settings={"use_bias_correction": True, "safeguard_warmup": True}
    ),  # as diffusers' script sets it
    "sgd": OptimizerChoice("torch.optim", "SGD", takes_betas=False),
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name of `OPTIMIZERS`.

    Raises:
        SerialLoraError: If the name is unknown or its library is not installed.
    """
    if name not in OPTIMIZERS:
        raise SerialLoraError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}.")
    choice = OPTIMIZERS[name]
    try:
        return getattr(importlib.import_module(choice.module), choice.name)
    except ImportError as error:
        raise SerialLoraError(
            f"--optimizer {name} needs the package {choice.package}: pip install {choice.package} ({error})."
        ) from error


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for the optimizer: all at `lr`, and with LoRA+ (arXiv 2402.12354) the B's at `lora_plus_ratio` times it.

    Args:
        named: Names and trainable parameters; those of an adapter's B hold `lora_B` in their names.
        lr: Learning rate of everything else.
        lora_plus_ratio: Learning rate of B over that of A; the LoRA+ paper advises 16.

    Raises:
        SerialLoraError: If a ratio is asked for and no parameter is a B.
    """
    named = list(named)
    if lora_plus_ratio == 1.0:
        return [{"params": [parameter for _, parameter in named], "lr": lr}]
    b = [parameter for name, parameter in named if "lora_B" in name]
    rest = [parameter for name, parameter in named if "lora_B" not in name]
    if not b:
        raise SerialLoraError("--lora_plus_ratio needs an adapter with matrices A and B; full fine-tuning has none.")
    return [{"params": rest, "lr": lr}, {"params": b, "lr": lr * lora_plus_ratio}]


def make_optimizer(
    name: str, groups: list[dict[str, Any]], betas: tuple[float, float], weight_decay: float, eps: float
) -> torch.optim.Optimizer:
    """The optimizer called `name` over parameter groups that hold their own learning rates."""
    chosen: Any = optimizer_class(name)
    choice = OPTIMIZERS[name]
    settings = {**choice.settings, **({"betas": betas, "eps": eps} if choice.takes_betas else {})}
    optimizer = chosen(groups, lr=groups[0]["lr"], weight_decay=weight_decay, **settings)
    if hasattr(optimizer, "train"):  # schedule-free optimizers begin in the mode that evaluates
        optimizer.train()
    return optimizer


@contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters are those to evaluate and save: schedule-free optimizers train at another point."""
    inner = getattr(optimizer, "optimizer", optimizer)
    switches = hasattr(inner, "eval") and hasattr(inner, "train")
    if switches:
        inner.eval()
    try:
        yield
    finally:
        if switches:
            inner.train()
