"""What must hold when a damaged file is read: it is taken, or refused in one sentence, soon, and nothing changed."""

from __future__ import annotations

import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from slora_diffusers.errors import SerialLoraError

CPU_SECONDS = 3.0
"""Processor time that one input may take; wall time would depend on what else the machine does."""
MEMORY = 2**30
"""Bytes that one input may ask for, beyond what the process holds."""
LETTERS = 1200
"""Length of the longest message that is still a sentence or two."""


class TooLongError(BaseException):
    """An input took more processor time than it may."""


@dataclass(frozen=True)
class Reader:
    """One way in for a file.

    Args:
        write: From a source of chance and a folder to the path of a damaged file in it.
        read: Opens the file as a user does.
        state: What must be as it was after a refusal, and after `undo`.
        undo: Takes back what an accepted file did.
    """

    write: Callable[[Random, Path], Any]
    read: Callable[[Any], Any]
    state: Callable[[], Any] = lambda: None
    undo: Callable[[], Any] = lambda: None


@dataclass
class Tally:
    """What came of many inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return f"{sum(self.outcomes.values()):,} inputs: {counts}; the slowest took {self.slowest:.2f} s"


def judge(name: str, reader: Reader, numbers: Iterable[int], folder: Path) -> Tally:
    """Read the inputs of these numbers and say of each whether it was taken, refused or did harm."""
    tally = Tally()
    before = reader.state()
    with bounded_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            given = reader.write(Random(f"{name} {number}"), folder)
            began = time.process_time()
            outcome = one(reader, given)
            tally.slowest = max(tally.slowest, time.process_time() - began)
            if outcome == "taken":
                reader.undo()
            if reader.state() != before:
                outcome = f"changed the state ({outcome})"
                before = reader.state()
            tally.outcomes[outcome if outcome in ("taken", "refused") else "failed"] += 1
            if outcome not in ("taken", "refused"):
                tally.failures.append(f"{name} {number}: {outcome}")
    return tally


def one(reader: Reader, given: Any) -> str:
    """ "taken", "refused", or what went wrong."""
    try:
        with bounded_time():
            reader.read(given)
    except SerialLoraError as error:
        return fault_of(str(error)) or "refused"
    except TooLongError:
        return f"took more than {CPU_SECONDS} s"
    except Exception as error:  # whatever it is, it is not for the user's eyes
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "slora_diffusers" in f.filename]
        where = own[-1] if own else place
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    return "taken"


def fault_of(message: str) -> str | None:
    """What is wrong with an error's message, if anything."""
    if not message.isprintable():
        return f"message of several lines, or with control characters: {message[:200]!r}"
    if not 20 <= len(message) <= LETTERS:
        return f"message of {len(message)} letters: {message[:200]!r}"
    return None


@contextmanager
def bounded_time() -> Iterator[None]:
    """Inside, `TooLongError` is raised after so much processor time."""

    def stop(number: int, frame: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Inside, the process gets no more than so much memory beyond what it has; where the system can say so."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
