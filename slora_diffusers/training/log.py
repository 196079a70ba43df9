"""What a run writes down while it trains: numbers in metrics.jsonl, pictures in a folder, both to the trackers.

`index.html` shows them.

A run is worth more than its log: a tracker that fails, or a disk that takes no picture, is a warning, given once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from PIL import Image

from .options import BaseOptions
from .page import METRICS, PAGE, Page
from .parsing import specs_of
from .place import Place

logger: Any = get_logger(__name__)
ABANDONED = "abandoned-metrics.jsonl"

# What each tracker calls a run's name; TensorBoard's is a folder, see `Place`.
_RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
_RUN_NAMES |= {"clearml": "task_name"}


class Log:
    """Numbers and pictures of a run.

    Args:
        place: The processes; the main one writes.
        options: What the trackers are told of the run.
    """

    def __init__(self, place: Place, options: BaseOptions) -> None:
        self._accelerator, self.folder = place.accelerator, place.output_dir
        self._failed: set[str] = set()
        self._pictured: set[int] = set()  # steps that have a picture of this run
        self._began = -1  # the step that it goes on from
        self._page = Page(self.folder, self._all_pictures)
        if options.report_to:
            specs = specs_of(options)
            settings = {name: str(getattr(options, name)) for name in specs if not specs[name][0].secret}
            named = {tracker: {key: options.run_name} for tracker, key in _RUN_NAMES.items() if options.run_name}
            with self._only_warned(f"starting {', '.join(options.report_to)}"):
                self._accelerator.init_trackers(options.tracker_project_name, settings, named)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers to `<output_dir>/metrics.jsonl` and send them to the trackers."""
        if not self._accelerator.is_main_process:
            return
        with self._only_warned(METRICS), open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        with self._only_warned(PAGE):
            self._page.refresh()
        self._to_trackers(lambda tracker: tracker.log(dict(values), step=step))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Write a picture to `<output_dir>/validation` and send it to the trackers that take pictures."""
        if not self._accelerator.is_main_process:
            return
        folder = self.folder / "validation"
        with self._only_warned("the folder of pictures"):
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{name}-{step:06d}.png")
            self._pictured.add(step)

        def send(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image]}, step=step)

        self._to_trackers(send)

    def pictures(self, name: str) -> dict[int, Path]:
        """{step: picture} of this run so far, with those of before it was resumed."""
        return self._all_pictures().get(name, {})

    def introduce(self, lines: Mapping[str, str]) -> None:
        """Put what is said of the run at its start on its page."""
        self._page.about = dict(lines)

    def end(self) -> None:
        """Tell the trackers that the run is over, and write its last page."""
        self.last_page()
        with self._only_warned("the trackers' end"):
            self._accelerator.end_training()

    def last_page(self) -> None:
        """Write the page of a run that takes no further step, however it ended."""
        if self._accelerator.is_main_process:
            with self._only_warned(PAGE):
                self._page.write(ended=True)

    def set_aside_after(self, step: int) -> None:
        """Move measurements of later steps, and lines that are cut off, to another file: this run writes its own."""
        path, self._began = self.folder / METRICS, step or -1
        if not path.exists():
            return
        kept, later = [], []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            number = _step_of(line)
            (later if number is None or number > step or not step else kept).append(line)
        if not later:
            return
        with open(self.folder / ABANDONED, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in later)
        half = path.with_name(f".{METRICS}.tmp")
        half.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(half, path)
        logger.warning("%d measurements of another run, or cut off, are moved to %s", len(later), ABANDONED)

    def _all_pictures(self) -> dict[str, dict[int, Path]]:
        found: dict[str, dict[int, Path]] = {}
        for path in sorted((self.folder / "validation").glob("*-*.png")):
            name, _, step = path.stem.rpartition("-")
            if step.isdecimal() and (int(step) in self._pictured or int(step) <= self._began):
                found.setdefault(name, {})[int(step)] = path
        return found

    def _to_trackers(self, send: Callable[[Any], None]) -> None:
        for tracker in self._accelerator.trackers:
            with self._only_warned(f"the tracker {tracker.name}"):
                send(tracker)

    @contextmanager
    def _only_warned(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                logger.warning("%s failed, and the run goes on without it: %s: %s", what, type(error).__name__, error)


def _step_of(line: str) -> int | None:
    """The step of a line of metrics; None for a line that is cut off."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
