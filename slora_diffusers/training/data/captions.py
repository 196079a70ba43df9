"""Captions: which text belongs to an image, and the forms of it that training draws from.

A file may hold one caption or one per line; a trigger word goes in front; tags between commas are shuffled and dropped.
Each caption gets a fixed number of such forms before training, so that all of them can be encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import SerialLoraError
from ..randomness import generator

EXTENSIONS = (".txt", ".caption")
MULTILINE = ("whole", "first", "each")
TRIGGER = "[trigger]"


@dataclass(frozen=True)
class CaptionStyle:
    """How a caption becomes what is trained on.

    Args:
        trigger: Word or words put in front of every caption, or in the place of "[trigger]" in it.
        shuffle_caption: Shuffle the tags, which commas part.
        keep_tokens: How many tags keep their place in front; a trigger put there always does.
        tag_dropout: Share of the other tags that are left out.
        caption_variants: Forms of each caption that is shuffled or loses tags; each sample draws one of them.
        multiline_captions: Of a text of several lines, take the "whole" as one caption, the "first" line, or "each"
            line as a caption of its own, of which each sample draws one.
        caption_extension: Ending of the files of captions; .txt or .caption by default.
        seed: Where shuffles and losses come from.
    """

    trigger: str | None = None
    shuffle_caption: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    caption_variants: int = 8
    multiline_captions: str = "whole"
    caption_extension: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.multiline_captions not in MULTILINE:
            raise SerialLoraError(
                f"multiline_captions must be one of {', '.join(MULTILINE)}; got {self.multiline_captions!r}."
            )
        if not 0 <= self.tag_dropout < 1:
            raise SerialLoraError(f"tag_dropout must lie in [0, 1); got {self.tag_dropout}.")
        if self.keep_tokens < 0 or self.caption_variants < 1:
            raise SerialLoraError("keep_tokens must be at least 0, and caption_variants at least 1.")

    def forms(self, texts: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """The caption of an image, for validation, and what training draws from, which is empty for the caption alone.

        Args:
            texts: What was written about the image: one text, or several of which each sample gets one.
        """
        captions = [self._triggered(line) for text in texts for line in self._lines(text)]
        if self.shuffle_caption or self.tag_dropout:
            return captions[0], tuple(self._form(c, n) for c in captions for n in range(self.caption_variants))
        return captions[0], tuple(captions) if len(captions) > 1 else ()

    def read(self, image: Path) -> str | None:
        """The caption in the file beside an image, or None.

        Raises:
            SerialLoraError: If there are two that differ.
        """
        endings = (f".{self.caption_extension.lstrip('.')}",) if self.caption_extension else EXTENSIONS
        found = {path: read_text(path).strip() for e in endings if (path := image.with_suffix(e)).is_file()}
        if len(set(found.values())) > 1:
            names = " and ".join(path.name for path in found)
            raise SerialLoraError(
                f"{image} has two captions, in {names}: remove one, or choose with --caption_extension."
            )
        return next(iter(found.values()), None)

    def _lines(self, text: str) -> list[str]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if self.multiline_captions == "whole" or not lines:
            return [text]
        return lines[:1] if self.multiline_captions == "first" else lines

    def _triggered(self, caption: str) -> str:
        if self.trigger is None:
            return caption
        if TRIGGER in caption:
            return caption.replace(TRIGGER, self.trigger)
        return f"{self.trigger}, {caption}" if caption else self.trigger

    def _form(self, caption: str, number: int) -> str:
        draw = generator(self.seed, "caption form", caption, number)
        tags = _tags(caption)
        trigger = _tags(self.trigger or "")
        keep = max(self.keep_tokens, len(trigger) if tags[: len(trigger)] == trigger else 0)
        kept, tags = tags[:keep], tags[keep:]
        if self.shuffle_caption:
            tags = [tags[i] for i in torch.randperm(len(tags), generator=draw).tolist()]
        dropped = (torch.rand(len(tags), generator=draw) < self.tag_dropout).tolist()
        return ", ".join([*kept, *(tag for tag, gone in zip(tags, dropped, strict=True) if not gone)])


def read_text(path: Path) -> str:
    """A file of UTF-8 text.

    Raises:
        SerialLoraError: If it is not.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise SerialLoraError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]
