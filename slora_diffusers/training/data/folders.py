"""Find the training images, whatever form they come in: folders with captions, folders per class, data sets.

All become a list of `Item`, in the order of their names (or rows), and a list of what was left out, and why.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import SerialLoraError
from .captions import EXTENSIONS, CaptionStyle, read_text
from .images import DECODE_AT_MOST, SUFFIXES, Item, Shape, read_image, read_row, upright_size

logger = logging.getLogger(__name__)
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption", "prompt")


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


@dataclass(frozen=True)
class Row:
    """What metadata say of an image."""

    caption: str | None
    weight: float


_PLAIN = Row(None, 1.0)


def find_images(
    folder: str | Path, prompt: str | None = None, style: CaptionStyle | None = None, without: Sequence[Path] = ()
) -> Found:
    """The images of a folder and of the folders in it, with their captions.

    A caption comes from metadata.jsonl or metadata.csv (of the image's folder, or one above it), else from a .txt or
    .caption file beside the image, else from `prompt`. The metadata may give a weight, too.

    Args:
        folder: Where the images are.
        prompt: Caption of images without one of their own.
        style: What becomes of captions.
        without: Folders inside that hold something else, such as the run's own output.

    Raises:
        SerialLoraError: If the folder is missing or holds no usable image, an image has no caption, or the metadata
            are damaged or name files that are not there.
    """
    folder, style = _folder(folder), style or CaptionStyle()
    files = _files(folder, without)
    metadata = _all_metadata(files)
    found, captioned = _usable(folder, files, metadata, without), []
    for item in found.items:
        path = folder / item.name
        row = metadata.get(path, Row(None, 1.0))
        caption = row.caption if row.caption is not None else style.read(path)
        caption = prompt if caption is None else caption
        if caption is None and style.trigger is None:
            raise SerialLoraError(
                f"{path} has no caption. Give --instance_prompt, a file {path.with_suffix('.txt').name} beside it, or "
                "a metadata.jsonl."
            )
        told, variants = style.forms([caption or ""])
        captioned.append(replace(item, caption=told, variants=variants, weight=row.weight))
    return Found(captioned, found.skipped)


def uncaptioned(folder: str | Path, without: Sequence[Path] = ()) -> Found:
    """The images of a folder and of the folders in it, with empty captions; those alone that metadata name, if any do.

    The weights of metadata hold.

    Raises:
        SerialLoraError: If the folder is missing or holds no usable image, or metadata are damaged.
    """
    folder = _folder(folder)
    files = _files(folder, without)
    metadata = _all_metadata(files)
    found = _usable(folder, files, metadata, without)
    return Found([replace(i, weight=metadata.get(folder / i.name, _PLAIN).weight) for i in found.items], found.skipped)


def find_classes(folder: str | Path, ids: Callable[[str], int | None], without: Sequence[Path] = ()) -> Found:
    """The images of a folder that holds one folder per class, each with folders of its own or not.

    Args:
        folder: Where the class folders are.
        ids: Class id of a folder's name, or None where it has none.
        without: Folders inside that hold something else.

    Raises:
        SerialLoraError: If there is no class folder, one has no class id, or none holds a usable image.
    """
    folder = _folder(folder)
    elsewhere = _inside(folder, without)
    classes = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".") and p not in elsewhere]
    unknown = [path.name for path in classes if ids(path.name) is None]
    if not classes or unknown:
        given = f"no class is called {_list(unknown)}" if unknown else "it holds no folder"
        raise SerialLoraError(
            f"{folder} must hold one folder per class, named by the class id (0, 1, ...) or by a label that the "
            f"checkpoint knows: {given}."
        )
    files = _files(folder, without)
    metadata = _all_metadata(files)
    skipped = [(p.name, "not in a class folder") for p in files if p.parent == folder and p.name not in METADATA]
    found = _usable(folder, [p for p in files if p.parent != folder], None, without)
    items = []
    for item in found.items:
        label = ids(item.name.partition("/")[0])
        assert label is not None  # as seen above
        items.append(replace(item, label=label, weight=metadata.get(folder / item.name, _PLAIN).weight))
    return Found(items, skipped + found.skipped)


def from_dataset(
    dataset: Any, image_column: str = "image", caption_column: str | None = "text", prompt: str | None = None,
    style: CaptionStyle | None = None, weight_column: str | None = None,
) -> Found:  # fmt: skip
    """The rows of a data set of the `datasets` library (one split).

    Args:
        dataset: A `datasets.Dataset` with a column of images.
        image_column: Name of that column.
        caption_column: Name of the column of captions, each a text or a list of texts of which each sample draws one;
            None to give every image `prompt`.
        prompt: Caption of rows without one.
        style: What becomes of captions.
        weight_column: Name of the column of weights, if there is one.

    Raises:
        SerialLoraError: If a column is missing, the data set is empty, or a row has no caption.
    """
    needed = [image_column] + ([caption_column] if caption_column is not None and prompt is None else [])
    for column in needed + ([weight_column] if weight_column else []):
        if column not in dataset.column_names:
            raise SerialLoraError(f"the data set has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    captions = dataset[caption_column] if caption_column in dataset.column_names else None
    weights = weights_of(dataset, weight_column)
    items, skipped = [], []
    for row in range(len(dataset)):
        read = partial(read_row, dataset, row, image_column)
        try:
            image = read()
        except SerialLoraError as error:
            skipped.append((f"row {row}", f"not a readable image ({error})"))
            continue
        own: Any = prompt if captions is None or captions[row] is None else captions[row]
        texts: list[Any] = own if isinstance(own, list) else [own]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise SerialLoraError(f"row {row} of the data set has no caption in {caption_column!r}; give a prompt.")
        caption, variants = (style or CaptionStyle()).forms(texts)
        items.append(
            Item(f"row {row}", read, (image.height, image.width), caption, variants=variants, weight=weights[row])
        )
    if not items:
        raise SerialLoraError(f"the data set holds no usable image: {_list(skipped) or 'it is empty'}.")
    return Found(items, skipped)


def weights_of(dataset: Any, column: str | None) -> list[float]:
    """The weights of a data set's rows.

    Raises:
        SerialLoraError: If one is not a weight.
    """
    if column is None:
        return [1.0] * len(dataset)
    return [_weight(value, f"row {row} of the data set") for row, value in enumerate(dataset[column])]


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise SerialLoraError(f"{folder} is not a folder: give the folder that holds the training images.")
    return folder


def _inside(folder: Path, others: Sequence[Path]) -> list[Path]:
    """Those of other folders that lie in a folder, as paths in it."""
    root = folder.resolve()
    resolved = [other.resolve() for other in others if other.exists()]
    return [folder / other.relative_to(root) for other in resolved if root in other.parents]


def _files(folder: Path, without: Sequence[Path] = ()) -> list[Path]:
    """The files in a folder and in those inside it, but for hidden ones and `without`, by their names."""
    elsewhere, found, seen = set(_inside(folder, without)), [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root)
        real = here.resolve()
        if real in seen:  # a link to a folder above would lead around in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and here / name not in elsewhere]
        found += [here / name for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _usable(folder: Path, files: list[Path], metadata: Mapping[Path, Row] | None, without: Sequence[Path]) -> Found:
    """The images among files; below a table of metadata those alone that it names, unless `metadata` is None."""
    governed = {path.parent for path in files if path.name in METADATA} if metadata is not None else set()
    skipped = [(f"{p.relative_to(folder).as_posix()}/", "it holds something else") for p in _inside(folder, without)]
    stems, chosen = {path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES}, []
    unnamed: list[Path] = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in SUFFIXES:
            if governed.intersection(path.parents) and path not in (metadata or ()):
                unnamed.append(path)
            else:
                chosen.append(path)
        elif path.name not in METADATA and not (path.suffix in EXTENSIONS and path.with_suffix("") in stems):
            skipped.append((name, "not an image file"))
    items, damaged = _read_all(folder, chosen)
    skipped += damaged
    named = {parent for path in chosen for parent in path.parents}
    outermost = [
        next(p for p in (*reversed(path.parents), path) if folder in p.parents and p not in named) for path in unnamed
    ]
    skipped += [(path.relative_to(folder).as_posix(), "not named in the metadata") for path in dict.fromkeys(outermost)]
    skipped += [(inner.name, "an empty folder") for inner in sorted(folder.iterdir()) if _is_empty_folder(inner)]
    if not items:
        raise SerialLoraError(
            f"{folder} holds no usable image: {_list(skipped) or 'it is empty'}. "
            f"Files with these endings are read: {', '.join(sorted(SUFFIXES))}."
        )
    return Found(items, skipped)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and not _files(path)


def _read_all(folder: Path, paths: list[Path]) -> tuple[list[Item], list[tuple[str, str]]]:
    decode = len(paths) <= DECODE_AT_MOST

    def look(path: Path) -> Shape | SerialLoraError:
        try:
            if not decode:
                return upright_size(path)
            image = read_image(path)
            return image.height, image.width
        except SerialLoraError as error:
            return error

    items, skipped = [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, seen in zip(paths, pool.map(look, paths), strict=True):
            name = path.relative_to(folder).as_posix()
            if isinstance(seen, SerialLoraError):
                skipped.append((name, str(seen.__cause__ or seen)))
            else:
                items.append(Item(name, partial(read_image, path), seen))
    return items, skipped


def _all_metadata(files: Sequence[Path]) -> dict[Path, Row]:
    """What all metadata among files say, by the image's path."""
    rows: dict[Path, Row] = {}
    tables = [path for path in files if path.name in METADATA]
    for path in tables:
        read = _metadata(path)
        other = path.with_name(METADATA[0])
        if path != other and other in tables and read != _metadata(other):
            raise SerialLoraError(f"{path.parent} holds both {' and '.join(METADATA)}, which differ: remove one.")
        rows |= read
    return rows


def _metadata(path: Path) -> dict[Path, Row]:
    text, rows = read_text(path), {}
    is_csv = path.suffix == ".csv"
    lines = list(csv.DictReader(io.StringIO(text))) if is_csv else text.splitlines()
    for number, line in enumerate(lines, start=2 if is_csv else 1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            row = json.loads(line) if isinstance(line, str) else line
            name, parsed = _parsed(row)
        except (ValueError, KeyError, TypeError) as error:
            raise SerialLoraError(
                f"line {number} of {path} must have a file_name and one of {', '.join(CAPTION_KEYS)}, a text, or a "
                f"weight of at least 0; got {str(line)[:80]!r}."
            ) from error
        rows[path.parent / name] = parsed
    missing = sorted(file.relative_to(path.parent).as_posix() for file in rows if not file.is_file())
    if missing:
        raise SerialLoraError(f"{path} names files that are not there: {_list(missing)}.")
    return rows


def _parsed(row: Mapping[str, Any]) -> tuple[PurePosixPath, Row]:
    if not isinstance(row, Mapping):
        raise TypeError("a line is an object")
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    if row.get("weight") in ("", None):  # a cell that is left empty
        row = {key: value for key, value in row.items() if key != "weight"}
    if caption is None and "weight" not in row:
        raise KeyError("text")
    if caption is not None and not isinstance(caption, str):
        raise TypeError("a caption is text")
    return PurePosixPath(row["file_name"]), Row(caption, _weight(row.get("weight", 1.0), "it"))


def _weight(value: Any, name: str) -> float:
    weight = float(value)
    if isinstance(value, bool) or not 0 <= weight < math.inf:
        raise SerialLoraError(f"{name} has the weight {value!r}: give a number of at least 0.")
    return weight


def _list(entries: Sequence[Any]) -> str:
    shown = [entry if isinstance(entry, str) else f"{entry[0]} ({entry[1]})" for entry in entries[:5]]
    return ", ".join(shown) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
