"""Find the training images, whatever form they come in, and read each as upright RGB.

A folder with one prompt, a folder with .txt captions, a folder with metadata.jsonl, a folder per class and a data set
of the `datasets` library all become a list of `Item`, in the order of their names (or rows).
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...errors import SerialLoraError
from ...heads.preprocessing import upright_rgb
from .identity import key_of

logger = logging.getLogger(__name__)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CAPTION_KEYS = ("text", "caption", "prompt")
_DECODE_AT_MOST = 2000  # every image is decoded before training, unless there are more than this


@dataclass(frozen=True)
class Item:
    """One training image: its name, caption, class and size (height, width), and how to read it as RGB."""

    name: str
    read: Callable[[], Image.Image] = field(repr=False, compare=False)
    size: tuple[int, int]
    caption: str = ""
    label: int = 0

    @cached_property
    def content(self) -> str:
        """Key of the pixels: what tells one image from another. Names do not, for 0.png is in many folders."""
        image = self.read()
        return key_of(image.mode, list(image.size), image.tobytes())


@dataclass(frozen=True)
class Found:
    """The items of a source, and what was left out of it: (name, reason)."""

    items: list[Item]
    skipped: list[tuple[str, str]]

    def report(self) -> Found:
        """Log what was left out, one line each; returns itself."""
        for name, reason in self.skipped:
            logger.warning("left out %s: %s", name, reason)
        logger.info("%d images, %d files left out", len(self.items), len(self.skipped))
        return self


def read_image(path: Path) -> Image.Image:
    """One file as upright RGB.

    Raises:
        SerialLoraError: If the file is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise SerialLoraError(f"{path} cannot be read as an image: {error}. Replace or remove it.") from error


def read_tag(path: Path, name: str) -> str | None:
    """A text that was written into a PNG file, or None."""
    with Image.open(path) as image:
        return image.info.get(name)


def uncaptioned(folder: str | Path, captions: Mapping[str, str] | None = None) -> Found:
    """The images of one folder, those alone that `captions` names if it is given, with empty captions.

    Raises:
        SerialLoraError: If the folder is missing or holds no usable image.
    """
    folder = _folder(folder)
    inside = [folder / name for name in captions or () if "/" in name]
    items, skipped = _read_all(folder, [*_files(folder), *sorted(inside)], captions)
    skipped += [
        (path.name, "a folder, and no metadata names an image in it")
        for path in sorted(folder.iterdir())
        if path.is_dir() and not any(path in image.parents for image in inside)
    ]
    if not items:
        raise SerialLoraError(
            f"{folder} holds no usable image: {_list(skipped) or 'it is empty'}. "
            f"Files with these endings are read: {', '.join(sorted(SUFFIXES))}."
        )
    return Found(items, skipped)


def find_images(folder: str | Path, captions: Mapping[str, str] | None = None, prompt: str | None = None) -> Found:
    """The images of one folder. A caption comes from metadata.jsonl, else from a .txt beside the image, else `prompt`.

    A metadata.csv with the same columns serves as well; either may name images in folders inside this one.

    Args:
        folder: Where the images are.
        captions: File name to caption, instead of the folder's metadata.jsonl.
        prompt: Caption of images without one of their own.

    Raises:
        SerialLoraError: If the folder is missing or holds no usable image, an image has no caption, or metadata.jsonl
            is damaged or names files that are not there.
    """
    folder = _folder(folder)
    captions = _metadata(folder) if captions is None else captions
    found = uncaptioned(folder, captions)
    captioned = []
    for item in found.items:
        text = (folder / item.name).with_suffix(".txt")
        caption = captions[item.name] if captions is not None else prompt
        if captions is None and text.exists():
            caption = _read_text(text).strip()
        if caption is None:
            raise SerialLoraError(
                f"{folder / item.name} has no caption. Give --instance_prompt, a file {text.name} beside it, or a "
                "metadata.jsonl."
            )
        captioned.append(replace(item, caption=caption))
    return Found(captioned, found.skipped)


def find_classes(folder: str | Path, ids: Callable[[str], int | None]) -> Found:
    """The images of a folder that holds one folder per class.

    Args:
        folder: Where the class folders are.
        ids: Class id of a folder's name, or None where it has none.

    Raises:
        SerialLoraError: If there is no class folder, one has no class id, or none holds a usable image.
    """
    folder = _folder(folder)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [path.name for path in classes if ids(path.name) is None]
    if not classes or unknown:
        given = f"no class is called {_list(unknown)}" if unknown else "it holds no folder"
        raise SerialLoraError(
            f"{folder} must hold one folder per class, named by the class id (0, 1, ...) or by a label that the "
            f"checkpoint knows: {given}."
        )
    items: list[Item] = []
    skipped = [(path.name, "not in a class folder") for path in _files(folder)]
    for path in classes:
        found, left_out = _read_all(path, _files(path), None)
        label = ids(path.name)
        assert label is not None
        items += [Item(f"{path.name}/{item.name}", item.read, item.size, "", label) for item in found]
        skipped += [(f"{path.name}/{name}", reason) for name, reason in left_out]
    if not items:
        raise SerialLoraError(f"the class folders of {folder} hold no usable image: {_list(skipped) or 'all empty'}.")
    return Found(items, skipped)


def from_dataset(
    dataset: Any, image_column: str = "image", caption_column: str | None = "text", prompt: str | None = None
) -> Found:
    """The rows of a data set of the `datasets` library (one split).

    Args:
        dataset: A `datasets.Dataset` with a column of images.
        image_column: Name of that column.
        caption_column: Name of the column of captions, or None to give every image `prompt`.
        prompt: Caption of rows without one.

    Raises:
        SerialLoraError: If a column is missing, the data set is empty, or a row has no caption.
    """
    for column in [image_column] + ([caption_column] if caption_column is not None and prompt is None else []):
        if column not in dataset.column_names:
            raise SerialLoraError(f"the data set has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    has_captions = caption_column in dataset.column_names
    items, skipped = [], []
    for row in range(len(dataset)):
        read = partial(_read_row, dataset, row, image_column)
        try:
            size = read().size
        except (OSError, ValueError) as error:
            skipped.append((f"row {row}", f"not a readable image ({error})"))
            continue
        caption = dataset[row][caption_column] if has_captions else prompt
        if caption is None:
            raise SerialLoraError(f"row {row} of the data set has no caption in {caption_column!r}; give a prompt.")
        items.append(Item(f"row {row}", read, (size[1], size[0]), caption))
    if not items:
        raise SerialLoraError(f"the data set holds no usable image: {_list(skipped) or 'it is empty'}.")
    return Found(items, skipped)


def from_tensors(images: Tensor, labels: Sequence[int], name: str = "image") -> list[Item]:
    """Items from images that are in memory: uint8 (N, H, W) or (N, H, W, 3)."""
    pictures = [Image.fromarray(image.numpy()).convert("RGB") for image in images]
    return [
        Item(f"{name} {i}", picture.copy, (picture.height, picture.width), "", int(label))
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]


def to_pixels(
    image: Image.Image,
    size: tuple[int, int],
    draw: torch.Generator | None = None,
    crop: bool = False,
    flip: bool = False,
) -> Tensor:
    """Scale an image until it covers `size` (height, width), cut it there, and give pixels in [-1, 1], (3, H, W).

    Args:
        image: An RGB image.
        size: Height and width in pixels.
        draw: Where the place of a random cut and the toss of a flip come from; None means centred and not flipped.
        crop: Cut at a random place instead of the centre.
        flip: Mirror half of the draws.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covering, Image.Resampling.LANCZOS) if covering != image.size else image
    room_y, room_x = image.height - height, image.width - width
    top, left = room_y // 2, room_x // 2
    if draw is not None and crop:
        top = int(torch.randint(room_y + 1, (1,), generator=draw))
        left = int(torch.randint(room_x + 1, (1,), generator=draw))
    image = image.crop((left, top, left + width, top + height))
    if draw is not None and flip and torch.rand(1, generator=draw) < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _read_row(dataset: Any, row: int, column: str) -> Image.Image:
    return upright_rgb(dataset[row][column])


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise SerialLoraError(f"{folder} is not a folder: give the folder that holds the training images.")
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _read_all(
    folder: Path, files: list[Path], captions: Mapping[str, str] | None
) -> tuple[list[Item], list[tuple[str, str]]]:
    items, skipped = [], []
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in SUFFIXES:
            if not _belongs(path):
                skipped.append((name, "not an image file"))
            continue
        if captions is not None and name not in captions:
            skipped.append((name, "not named in the metadata"))
            continue
        try:
            size = read_image(path).size if len(files) <= _DECODE_AT_MOST else _header_size(path)
        except SerialLoraError as error:
            skipped.append((name, str(error.__cause__ or error)))
            continue
        items.append(Item(name, partial(read_image, path), (size[1], size[0])))
    return items, skipped


def _belongs(path: Path) -> bool:
    """Whether a file that is no image is still part of the data: a caption of an image, or the table of captions."""
    if path.name in ("metadata.jsonl", "metadata.csv"):
        return True
    return path.suffix == ".txt" and any(path.with_suffix(s).exists() for s in SUFFIXES | {s.upper() for s in SUFFIXES})


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).size if image.getexif().get(0x0112, 1) > 4 else image.size
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise SerialLoraError(f"{path} cannot be read as an image: {error}.") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise SerialLoraError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _metadata(folder: Path) -> dict[str, str] | None:
    path = next((p for p in (folder / "metadata.jsonl", folder / "metadata.csv") if p.exists()), None)
    if path is None:
        return None
    text, captions = _read_text(path), {}
    is_csv = path.suffix == ".csv"
    lines = list(csv.DictReader(io.StringIO(text))) if is_csv else text.splitlines()
    for number, line in enumerate(lines, start=2 if is_csv else 1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            row = json.loads(line) if isinstance(line, str) else line
            caption = next(row[key] for key in CAPTION_KEYS if key in row)
            if not isinstance(caption, str):
                raise TypeError("a caption is text")
            captions[PurePosixPath(row["file_name"]).as_posix()] = caption
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise SerialLoraError(
                f"line {number} of {path} must have a file_name and one of {', '.join(CAPTION_KEYS)}; got "
                f"{str(line)[:80]!r}."
            ) from error
    missing = sorted(name for name in captions if not (folder / name).is_file())
    if missing:
        raise SerialLoraError(f"{path} names files that are not there: {_list(missing)}.")
    return captions


def _list(entries: Sequence[Any]) -> str:
    shown = [entry if isinstance(entry, str) else f"{entry[0]} ({entry[1]})" for entry in entries[:5]]
    return ", ".join(shown) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
