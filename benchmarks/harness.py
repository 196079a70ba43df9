"""What every benchmark needs: alternating runs, medians with their spread, ratios, versions, JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Ways to take the time. `cpu`, with one thread, leaves out what other programs on the machine take."""


@dataclass(frozen=True)
class Timer:
    """How long calls take, in turns, so that a drift of the machine meets all of them alike.

    Args:
        rounds: Number of times that every call is timed.
        warmup: Number of rounds before, not timed.
        clock: Key of `CLOCKS`.
    """

    rounds: int
    warmup: int = 1
    clock: str = "wall"

    def alternate(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """{name: seconds of each round}; every round starts with another call, so that none always follows another."""
        names, seconds = list(calls), {name: [] for name in calls}
        for i in range(self.warmup + self.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                taken = self.time(calls[name])
                if i >= self.warmup:
                    seconds[name].append(taken)
        return seconds

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds that one call takes."""
        now = CLOCKS[self.clock]
        start = now()
        call()
        return now() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3}


def compare(seconds: Mapping[str, Sequence[float]], over: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per name: its seconds, and their ratio to those of each name in `over` within a round: median and quartiles."""
    return {
        name: {
            "seconds": spread(values),
            **{f"over_{o}": spread([a / b for a, b in zip(values, seconds[o], strict=True)]) for o in over},
        }
        for name, values in seconds.items()
    }


def machine() -> dict[str, Any]:
    """Versions, processor and date, to be written beside every result."""
    packages = ("torch", "diffusers", "transformers", "peft")
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "processor": models[0].partition(": ")[2] if models else platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def write_results(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<folder>/<name>.json`, numbers to four significant digits, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_rounded(results), indent=1) + "\n")
    return path


def read_results(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What `write_results` wrote under a name."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
