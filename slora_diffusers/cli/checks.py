"""Options are checked before a base is loaded, which may take minutes and gigabytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import SerialLoraError

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("diffusers", "peft", "kohya")
PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    """Raise SerialLoraError unless an option has one of the values that it can have."""
    allowed = list(allowed)
    if value not in allowed:
        raise SerialLoraError(f"{option} must be one of {', '.join(allowed)}; got {value!r}.")


def rank_of(text: str | None) -> int | str | None:
    """The rank of a --rank that may also be `auto`."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise SerialLoraError(f"--rank must be a whole number of at least 1, or auto; got {text!r}.")
    return int(text)


def at_least(option: str, value: float | None, least: float) -> None:
    """Raise SerialLoraError unless a number is finite, and not below its least."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise SerialLoraError(f"{option} must be a finite number of at least {least:g}; got {value:g}.")


def weights_of(adapters: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """A weight for each adapter, 1 without --weight."""
    if weights and len(weights) != len(adapters):
        raise SerialLoraError(f"{len(adapters)} adapters need as many --weight; got {len(weights)}.")
    for weight in weights or ():
        finite("--weight", weight)
    return list(weights or [1.0] * len(adapters))


def finite(option: str, value: float) -> None:
    """Raise SerialLoraError unless a number is finite."""
    if not math.isfinite(value):
        raise SerialLoraError(f"{option} must be a finite number; got {value:g}.")


def picture(path: Path | None) -> None:
    """Raise SerialLoraError unless a picture can be written there."""
    if path is None:
        return
    one_of("--plot's ending", path.suffix.lower(), PICTURES)
    folder(path.parent)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SerialLoraError("Plots need matplotlib: pip install 'slora_diffusers[cli]'.") from error


def folder(path: Path) -> None:
    """Raise SerialLoraError unless a folder is there or can be made."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise SerialLoraError(f"{path} cannot be a folder: {part} is a file. Choose another --output.")
            return


def nothing_to_overwrite(output: Path, names: Iterable[str], force: bool, more: Iterable[Path | None] = ()) -> None:
    """Raise SerialLoraError if files that a command writes are there already, unless --force allows it."""
    folder(output)
    there = sorted(path for name in names for path in output.glob(name)) if output.exists() else []
    there += [path for path in more if path is not None and path.exists()]
    if there and not force:
        shown = ", ".join(map(str, there[:3])) + (", ..." if len(there) > 3 else "")
        raise SerialLoraError(f"{shown} would be overwritten. Choose another --output, or say --force.")
