"""What a run writes down while it trains: numbers in metrics.jsonl, pictures in a folder, both to the tracker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from PIL import Image

from .options import BaseOptions
from .parsing import specs_of
from .place import Place

logger: Any = get_logger(__name__)
METRICS = "metrics.jsonl"


class Log:
    """Numbers and pictures of a run.

    Args:
        place: The processes; the main one writes.
        options: What the tracker is told of the run.
    """

    def __init__(self, place: Place, options: BaseOptions) -> None:
        self._accelerator, self.folder = place.accelerator, place.output_dir
        if options.report_to:
            specs = specs_of(options)
            settings = {name: str(getattr(options, name)) for name in specs if not specs[name][0].secret}
            self._accelerator.init_trackers("slora", settings)

    def set_aside_after(self, step: int) -> None:
        """Leave measurements of later steps behind: this run writes its own."""
        path = self.folder / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(line for line in lines if step and json.loads(line)["step"] <= step))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers to `<output_dir>/metrics.jsonl` and send them to the tracker."""
        if self._accelerator.is_main_process:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(dict(values), step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Write a picture to `<output_dir>/validation` and send it to the trackers that take pictures."""
        if not self._accelerator.is_main_process:
            return
        folder = self.folder / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}-{step:06d}.png")
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                if tracker.name == "tensorboard":
                    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [image]}, step=step)
