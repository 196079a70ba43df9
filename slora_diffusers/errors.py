"""The errors that users meet. Each message says what was given, what is allowed, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class SerialLoraError(ValueError):
    """Base of every error that slora_diffusers raises on bad input or in a state that forbids the call."""


class ArchitectureError(SerialLoraError):
    """The model, or one of its attentions, is not one that a serial pair can serve exactly."""


class AdapterFileError(SerialLoraError):
    """A saved adapter is missing, damaged, or does not fit the model."""


class AdapterStateError(SerialLoraError):
    """The call does not fit the state of the adapters: unknown name, fused weights, a name already taken."""


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's main; an error of this library ends it with the message alone, which says what to do."""
    try:
        main()
    except SerialLoraError as error:
        sys.exit(f"error: {error}")
