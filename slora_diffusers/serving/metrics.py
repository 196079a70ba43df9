"""What a server counts, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .errors import status_of
from .jobs import Done

if TYPE_CHECKING:
    from .batcher import Batcher


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "slora_requests", "Requests answered, by status code.", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "slora_request_seconds",
            "Seconds from a request's arrival to its image.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
            registry=self.registry,
        )
        self.batches = Histogram(
            "slora_batch_requests",
            "Requests in a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.busy = Counter("slora_drawing_seconds", "Seconds spent on batches.", registry=self.registry)

    def watch(self, batcher: Batcher) -> None:
        """Show the state of a batcher and of its adapters whenever the metrics are read."""
        gauges = {
            "slora_queue_requests": ("Requests that wait.", lambda: batcher.waiting),
            "slora_running_requests": ("Requests that are being drawn.", lambda: batcher.running),
            "slora_adapter_bytes": ("Bytes of the adapters that are loaded.", lambda: batcher.adapters.bytes),
            "slora_adapter_loads": ("Adapters loaded so far.", lambda: batcher.adapters.loads),
            "slora_adapter_drops": ("Adapters dropped for others so far.", lambda: batcher.adapters.drops),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def count(self, future: Future[Done]) -> None:
        """Count a request that has ended."""
        error = future.exception()
        self.requests.labels("200" if error is None else str(status_of(error))).inc()
        if error is None:
            self.seconds.observe(future.result().seconds)

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Count a batch, and the seconds inside."""
        self.batches.observe(size)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.busy.inc(time.perf_counter() - start)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
