"""One request on its way: waiting, running, done."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .errors import Cancelled, TimedOut
from .requests import Request
from .studio import Picture

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Done:
    """The picture of a request, with what to know about it.

    Args:
        picture: The picture.
        batch: Number of requests in its batch.
        seconds: From arrival to now.
        warnings: What loading its adapters warned of.
    """

    picture: Picture
    batch: int
    seconds: float
    warnings: tuple[str, ...] = ()


class Job:
    """A request, its deadline, and the future of its picture. It ends once, in whatever way comes first.

    Args:
        request: The request.
        key: Jobs of one key may share a batch.
        name: What to cancel it by.
        timeout: Seconds until it is given up.
        on_event: Called, from any thread, with every event: {"event": "running" or "progress", ...}.
    """

    def __init__(
        self,
        request: Request,
        key: Hashable,
        name: str,
        timeout: float,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.request, self.key, self.name, self.timeout = request, key, name, timeout
        self.arrived = time.monotonic()
        self.attempts = 0  # batches that it was in and that failed
        self.future: Future[Done] = Future()
        self._on_event = on_event or (lambda event: None)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.arrived + self.timeout - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether it has ended; one whose deadline has passed ends here."""
        if self.remaining <= 0:
            self.fail(TimedOut(f"The request was not done within its {self.timeout:g} seconds."))
        return self.future.done()

    def tell(self, **event: Any) -> None:
        """Pass an event on."""
        if not self.future.done():
            self._on_event(event)

    def finish(self, done: Done) -> None:
        """End with a picture."""
        self._end(lambda: self.future.set_result(done))

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self._end(lambda: self.future.set_exception(error))

    def cancel(self) -> None:
        """End without an answer: nobody waits for it."""
        self.fail(Cancelled("The request was cancelled."))

    def _end(self, end: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # it ended before
            end()


def new_name() -> str:
    """A name that no other request of this server has."""
    return f"r{next(_NUMBERS)}"
