"""--init_from: a run that starts where an adapter is, instead of at the base."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from accelerate.logging import get_logger
from torch import nn

from ..config import SerialLoraConfig
from ..core.pair import GRADIENT
from ..core.state import tensors_of
from ..errors import SerialLoraError
from ..files.fingerprint import describe_base, warn_of_other_base
from ..files.format import AdapterFile, Component
from .checkpoint import load_parameters
from .options import AdapterOptions

logger: Any = get_logger(__name__)
_OF_TRAINING = ("dropout", "init")  # fields of a config that no trained weight depends on


def start_of(options: AdapterOptions, component: str) -> tuple[SerialLoraConfig, Component | None]:
    """The config of a component's adapter, and the part of --init_from that it starts from, None for none.

    Raises:
        SerialLoraError: If the file cannot be read, or an option asks for another shape than it has.
    """
    ours = options.config()
    if ours.modules_to_save and options.adapter != "serial":
        raise SerialLoraError(f"--modules_to_save goes with Serial LoRA's pairs; --adapter is {options.adapter}.")
    if options.init_from is None:
        return ours, None
    if options.adapter != "serial":
        raise SerialLoraError(f"--init_from starts from a Serial LoRA adapter; --adapter is {options.adapter}.")
    if options.init == GRADIENT:
        raise SerialLoraError("--init gradient looks for a start, and --init_from has one: give one of them.")
    file = AdapterFile.read(options.init_from)
    part = file.components.get(component)
    if part is None or part.config is None:
        have = ", ".join(file.components) or "no component"
        if part is None and component in ("transformer", "model"):
            raise SerialLoraError(f"--init_from {options.init_from} has nothing for {component}; it has {have}.")
        logger.warning("--init_from %s has %s: %s starts from scratch", options.init_from, have, component)
        return ours, None
    usual = type(options)().config()
    for name in (f.name for f in fields(SerialLoraConfig) if f.name not in _OF_TRAINING):
        given, has = getattr(ours, name), getattr(part.config, name)
        if given not in (getattr(usual, name), has):
            raise SerialLoraError(
                f"--{name} is {given}, and {options.init_from} has {has}: leave it out to go on with what the file has."
            )
    return replace(part.config, **{name: getattr(ours, name) for name in _OF_TRAINING}), part


def start_from(part: Component, model: nn.Module, source: str) -> None:
    """Put a part's matrices where `add_serial_lora` has made room for them.

    Raises:
        SerialLoraError: If they do not fit.
    """
    try:
        load_parameters(list(tensors_of(model, "default").items()), part.tensors)
    except SerialLoraError as error:
        raise SerialLoraError(f"--init_from {source} does not fit {type(model).__name__}: {error}") from error
    if part.base.fingerprint:
        warn_of_other_base("adapter", part.base, describe_base(model), stacklevel=4)
