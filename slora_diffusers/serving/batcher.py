"""The queue of a server, and the thread that draws what is in it, batch by batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SerialLoraError
from .adapters import Adapters
from .errors import Busy, Closing, Failed, NoRoom, NotFound, RequestError
from .jobs import Done, Job, new_name
from .metrics import Metrics
from .requests import Request
from .studio import Entry, Studio

logger = logging.getLogger("diffusers.slora_diffusers")


@dataclass(frozen=True)
class Policy:
    """How requests are joined.

    Args:
        batch: Requests of a batch at most.
        wait: Seconds that a request waits for others to share its batch.
        queue: Requests that may wait.
        timeout: Seconds until a request is given up, unless it asks for less.
    """

    batch: int = 8
    wait: float = 0.02
    queue: int = 256
    timeout: float = 300.0


POLICY = Policy()


class _Abandoned(Exception):
    """Every request of the running batch has ended; there is nobody to draw for."""


class Batcher:
    """Joins requests of one shape and schedule in batches, whatever their adapters, and draws them in turn.

    One thread owns the pipeline: it loads adapters between batches and never during one. A batch that fails is drawn
    again request by request, so that a bad request takes no other along; a thread that dies is replaced, and another
    draws what it had begun.

    Args:
        studio: Draws.
        adapters: Gives the studio's pipeline the adapters of a batch.
        policy: How requests are joined.
        metrics: Counts.
    """

    def __init__(self, studio: Studio, adapters: Adapters, policy: Policy = POLICY, metrics: Metrics | None = None):
        self.studio, self.adapters, self.policy = studio, adapters, policy
        self.metrics = metrics or Metrics()
        self.metrics.watch(self)
        self._queue: list[Job] = []  # in the order of arrival
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._supervisor: threading.Thread | None = None
        self.worker: threading.Thread | None = None

    def start(self) -> None:
        """Begin to draw."""
        self._supervisor = threading.Thread(target=self._supervise, name="slora-supervisor", daemon=True)
        self._supervisor.start()

    def close(self) -> None:
        """Take no more requests, draw those that are there, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._supervisor is not None:
            self._supervisor.join()

    def submit(
        self,
        request: Request,
        timeout: float | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        name: str | None = None,
    ) -> Job:
        """Put a request into the queue.

        Args:
            request: The request.
            timeout: Seconds until it is given up; the policy's at most.
            on_event: Called, from the drawing thread, with every event of it.
            name: What to cancel it by.

        Raises:
            RequestError: If an adapter is unknown, the queue is full, the name is taken, or the server closes.
        """
        for adapter, _ in request.adapters:
            self.adapters.catalogue.check(adapter)
        seconds = min(timeout or self.policy.timeout, self.policy.timeout)
        job = Job(request, self.studio.key(request), name or new_name(), seconds, on_event)
        with self._changed:
            if self._closing:
                raise Closing("The server is shutting down. Send the request again in a moment.")
            self._queue = [waiting for waiting in self._queue if not waiting.over]
            if len(self._queue) >= self.policy.queue:
                raise Busy(f"{len(self._queue)} requests are waiting, as many as may. Try again in a moment.")
            if any(job.name == other.name for other in (*self._queue, *self._running)):
                raise RequestError(f"id: {job.name!r} is the id of a request that is not done yet. Choose another.")
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, name: str) -> None:
        """End a request without an answer; a batch goes on for its others.

        Raises:
            NotFound: If no request of that name is waiting or running.
        """
        with self._changed:
            job = next((job for job in (*self._queue, *self._running) if job.name == name and not job.over), None)
        if job is None:
            raise NotFound(f"No request {name!r} is waiting or running.")
        job.cancel()

    @property
    def alive(self) -> bool:
        """Whether requests are taken and drawn."""
        return not self._closing and self._supervisor is not None and self._supervisor.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        with self._changed:
            return sum(not job.over for job in self._queue)

    @property
    def running(self) -> int:
        """Number of requests that are being drawn."""
        return len(self._running)

    def _supervise(self) -> None:
        """Keep one worker alive until the server closes and nothing is left to do."""
        while not (self._closing and not self._queue and not self._running):
            self.worker = threading.Thread(target=self._work, name="slora-worker", daemon=True)
            self.worker.start()
            self.worker.join()
            if self._running:
                logger.error("The drawing thread ended in the middle of a batch; another takes over.")
                self._again(self._running, Failed("The drawing thread ended every time it drew this request."))

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._serve(jobs)
            except _Abandoned:
                pass
            except Exception as error:
                known = isinstance(error, SerialLoraError)
                logger.warning("A batch of %d failed: %s", len(jobs), error, exc_info=not known)
                if not known:
                    error = Failed(f"Drawing failed: {type(error).__name__}: {error}")
                left = [job for job in self._running if not job.over]
                if len(left) == 1:  # it was alone: the error is its own
                    left[0].fail(error)
                else:
                    self._again(left, error)
            self._running = []

    def _next(self) -> list[Job]:
        """The next batch, the longest waiting request first; empty once the server closes and nothing is left."""
        with self._changed:
            while True:
                self._queue = [job for job in self._queue if not job.over]
                if not self._queue and self._closing:
                    return []
                if self._queue:
                    first = self._queue[0]
                    jobs = [job for job in self._queue if job.key == first.key][: self.policy.batch]
                    left = first.arrived + self.policy.wait - time.monotonic()
                    if len(jobs) == self.policy.batch or left <= 0 or self._closing:
                        self._running = jobs
                        self._queue = [job for job in self._queue if job not in jobs]
                        return jobs
                self._changed.wait(left if self._queue else None)

    def _serve(self, jobs: list[Job]) -> None:
        drawn: list[tuple[Job, Entry, tuple[str, ...]]] = []
        later: list[Job] = []
        in_use: set[str] = set()
        for job in jobs:
            try:
                entry, said = self.adapters.take(dict(job.request.adapters), in_use)
            except NoRoom as error:
                if drawn:  # its adapters may fit one of the next batches, where it comes first
                    later.append(job)
                else:
                    job.fail(error)
            except SerialLoraError as error:
                job.fail(error)
            else:
                in_use |= set(entry)
                drawn.append((job, entry or None, tuple(said)))
        with self._changed:
            self._queue = later + self._queue
            self._running = [job for job, _, _ in drawn]
        if drawn:
            self._draw(drawn)

    def _draw(self, drawn: list[tuple[Job, Entry, tuple[str, ...]]]) -> None:
        jobs = [job for job, _, _ in drawn]
        for job in jobs:
            job.tell(event="running", batch=len(jobs))

        def on_step(done: int, steps: int) -> None:
            if all(job.over for job in jobs):
                raise _Abandoned
            for job in jobs:
                job.tell(event="progress", step=done, steps=steps)

        with self.metrics.batch(len(jobs)):
            pictures = self.studio.draw([job.request for job in jobs], [entry for _, entry, _ in drawn], on_step)
        for (job, _, said), picture in zip(drawn, pictures, strict=True):
            if isinstance(picture, SerialLoraError):
                job.fail(picture)
            elif not job.over:
                job.finish(Done(picture, len(jobs), time.monotonic() - job.arrived, said))

    def _again(self, jobs: list[Job], error: BaseException) -> None:
        """Draw again, each alone, the requests of a batch that failed; after three batches a request has failed."""
        again = []
        for job in (job for job in jobs if not job.over):
            job.attempts += 1
            if job.attempts == 3:
                job.fail(error)
            else:
                job.key = id(job)
                again.append(job)
        with self._changed:
            self._running = []
            self._queue = again + self._queue
            self._changed.notify_all()
