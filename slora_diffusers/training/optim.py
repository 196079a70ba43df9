"""Optimizers from their libraries, and parameter groups for LoRA+."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import SerialLoraError


@dataclass(frozen=True)
class OptimizerChoice:
    """Where an optimizer comes from: `module.name`, of the package `package`, and which of Adam's numbers it takes."""

    module: str
    name: str
    package: str = "torch"
    takes: tuple[str, ...] = ("betas", "eps")
    settings: Mapping[str, Any] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": OptimizerChoice("torch.optim", "AdamW"),
    "adamw8bit": OptimizerChoice("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "schedulefree": OptimizerChoice("schedulefree", "AdamWScheduleFree", "schedulefree"),
    "prodigy": OptimizerChoice(
        "prodigyopt", "Prodigy", "prodigyopt", settings={"use_bias_correction": True, "safeguard_warmup": True}
    ),  # as diffusers' script sets it
    "sgd": OptimizerChoice("torch.optim", "SGD", takes=()),
    "adafactor": OptimizerChoice(
        "transformers.optimization", "Adafactor", "transformers", (), {"scale_parameter": False, "relative_step": False}
    ),  # at the rate that is given
    "lion": OptimizerChoice("bitsandbytes.optim", "Lion", "bitsandbytes", takes=()),
    "lion8bit": OptimizerChoice("bitsandbytes.optim", "Lion8bit", "bitsandbytes", takes=()),
    "came": OptimizerChoice("came_pytorch", "CAME", "came-pytorch", takes=()),
}


def optimizer_name(text: str) -> str:
    """The name as `OPTIMIZERS` has it, in any case of letters; a class's path stays as it is."""
    return text.lower() if text.lower() in OPTIMIZERS else text


def _choice(name: str) -> OptimizerChoice:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise SerialLoraError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, or module.Class; got {name!r}.")
    return OptimizerChoice(module, attribute, module.partition(".")[0], takes=())


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name of `OPTIMIZERS`, or module.Class.

    Raises:
        SerialLoraError: If the name is unknown, its library is not installed, or it is not an optimizer.
    """
    choice = _choice(name)
    try:
        found = getattr(importlib.import_module(choice.module), choice.name, None)
    except ImportError as error:
        raise SerialLoraError(
            f"--optimizer {name} needs the package {choice.package}: pip install {choice.package} ({error})."
        ) from error
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise SerialLoraError(f"--optimizer {name}: {choice.module} has no optimizer of torch's kind of that name.")
    return found


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
    name: str, groups: list[dict[str, Any]], betas: tuple[float, float], weight_decay: float, eps: float,
    more: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer called `name` over parameter groups that hold their own learning rates.

    Args:
        name: A name of `OPTIMIZERS`, or module.Class.
        groups: The parameters.
        betas: Decays of Adam's moments, for those that take them.
        weight_decay: Weight decay.
        eps: Epsilon of Adam, for those that take it.
        more: Further settings, which win.

    Raises:
        SerialLoraError: If the optimizer takes no such setting.
    """
    chosen: Any = optimizer_class(name)
    adam = {"betas": betas, "eps": eps}
    own = {key: value for key, value in adam.items() if key in _choice(name).takes}
    settings = {"weight_decay": weight_decay, **_choice(name).settings, **own, **(more or {})}
    try:
        optimizer = chosen(groups, lr=groups[0]["lr"], **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise SerialLoraError(f"--optimizer {name} does not take {settings}: {error}.") from error
    if hasattr(optimizer, "train"):  # schedule-free optimizers begin in the mode that evaluates
        optimizer.train()
    return optimizer


@contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters are those to evaluate and save: schedule-free optimizers train at another point."""
    inner = getattr(optimizer, "optimizer", optimizer)
    switches = hasattr(inner, "eval") and hasattr(inner, "train")
    trained = [p for group in inner.param_groups for p in group["params"]] if switches else []
    kept = [p.detach().clone() for p in trained]
    if switches:
        inner.eval()
    try:
        yield
    finally:
        if switches:
            inner.train()
            with torch.no_grad():
                for parameter, value in zip(trained, kept, strict=True):
                    parameter.copy_(value)  # there and back again rounds
