"""Where pairs sit in every family that is known: data only, one record per family."""

from __future__ import annotations

from . import audio, controlnet, image, text, video, vision
from .base import Architecture

RECORDS: tuple[Architecture, ...] = (
    *image.RECORDS,
    *controlnet.RECORDS,
    *video.RECORDS,
    *audio.RECORDS,
    *vision.RECORDS,
    *text.RECORDS,
)
