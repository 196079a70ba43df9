"""The errors that users meet. Each message says what was given, what is allowed, and what to do."""

from __future__ import annotations


class SerialLoraError(ValueError):
    """Base of every error that slora_diffusers raises on bad input or in a state that forbids the call."""


class ArchitectureError(SerialLoraError):
    """The model, or one of its attentions, is not one that a serial pair can serve exactly."""


class AdapterFileError(SerialLoraError):
    """A saved adapter is missing, damaged, or does not fit the model."""


class AdapterStateError(SerialLoraError):
    """The call does not fit the state of the adapters: unknown name, fused weights, a name already taken."""
