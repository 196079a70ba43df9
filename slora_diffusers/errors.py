"""The errors that users meet. Each message says what was given, what is allowed, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

LONGEST_MESSAGE = 1000


class SerialLoraError(ValueError):
    """Base of every error that slora_diffusers raises on bad input or in a state that forbids the call.

    Args:
        message: What was given, what is allowed, and what to do. Becomes one line of printable letters, whatever a file
            holds that it quotes, and is cut in the middle if long.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message), LONGEST_MESSAGE))


class ArchitectureError(SerialLoraError):
    """The model, or one of its attentions, is not one that a serial pair can serve exactly."""


class AdapterFileError(SerialLoraError):
    """A saved adapter is missing, damaged, or does not fit the model."""


class AdapterStateError(SerialLoraError):
    """The call does not fit the state of the adapters: unknown name, fused weights, a name already taken."""


def one_line(text: str, longest: int) -> str:
    """A text without line breaks and control characters, its middle left out where it is longer than that."""
    if len(text) > longest:
        half = (longest - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's main; an error of this library ends it with the message alone, which says what to do."""
    try:
        main()
    except SerialLoraError as error:
        sys.exit(f"error: {error}")
