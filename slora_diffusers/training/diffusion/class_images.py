"""Images of the class, for prior preservation: a person's own, and those that the base draws, which say what drew them.

A drawn image carries the key of its prompt, its base and its settings inside the file, so that after any of them has
changed it is not taken for one of today's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from ..data.folders import uncaptioned
from ..data.images import SUFFIXES, Item, read_tag
from ..place import Place
from ..randomness import generator

logger = logging.getLogger(__name__)
TAG = "serial_lora_class_image"  # the PNG's text chunk that holds the key
Draw = Callable[[int, list[torch.Generator]], Sequence[Image.Image]]


@dataclass(frozen=True)
class ClassImages:
    """What a run wants of the class.

    Args:
        folder: Where the images are, and where missing ones go.
        prompt: Their caption.
        count: How many there are to be.
        made_by: Key of the prompt, the base and the settings that draw missing ones.
    """

    folder: Path
    prompt: str
    count: int
    made_by: str

    def find(self) -> list[Item]:
        """The images that are there and may be used: a person's own first, then those drawn by today's key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not any(path.suffix.lower() in SUFFIXES for path in self.folder.rglob("*")):
            return []
        items = [replace(item, caption=self.prompt) for item in uncaptioned(self.folder).items]
        tags = [read_tag(self.folder / item.name, TAG) for item in items]
        own = [item for item, tag in zip(items, tags, strict=True) if tag is None]
        drawn = [item for item, tag in zip(items, tags, strict=True) if tag == self.made_by]
        if others := len(items) - len(own) - len(drawn):
            logger.warning(
                "%s holds %d images that another class prompt, base or setting drew: they are not used",
                self.folder, others,
            )  # fmt: skip
        return [*own, *drawn]

    def complete(self, place: Place, seed: int, batch_size: int, draw: Draw) -> list[Item]:
        """The images, with missing ones drawn first; every process calls, and they share the work.

        Args:
            place: The processes.
            seed: The run's seed.
            batch_size: How many are drawn at a time.
            draw: Draws a number of images of the class, from as many generators.
        """
        there = len(self.find())
        free = (number for number in count() if not self._path(number).exists())
        missing = list(islice(free, max(0, self.count - there)))
        place.wait()  # every process has counted before any of them adds to the folder
        (numbers,) = place.share(missing)
        for chosen in (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)):
            draws = [generator(seed, "class image", number) for number in chosen]
            for number, image in zip(chosen, draw(len(chosen), draws), strict=True):
                self._save(image, self._path(number))
        place.wait()
        return self.find()[: self.count]

    def _path(self, number: int) -> Path:
        return self.folder / f"class-{number:05d}.png"

    def _save(self, image: Image.Image, path: Path) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_text(TAG, self.made_by)
        half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        image.save(half, "png", pnginfo=text)
        os.replace(half, path)
