"""What the two scripts that apply a vision model share: their options, the images they are given, the loop."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters.contexts import serial_lora_scale
from ..errors import SerialLoraError
from ..files.format import AdapterFile, Base
from ..heads.base import open_backbone
from ..heads.framing import TILE
from ..heads.predict import predictions as predict
from ..training.data.images import SUFFIXES, read_image
from ..training.methods import LORA_WEIGHT_NAME, PeftLora
from ..training.vision.recipe import HEAD_NAME
from .generation import default_device

logger = logging.getLogger(__name__)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", help="Image files, or folders of them.")
    add("--model", required=True, help="Folder, file or Hub id of what the recipe saved.")
    add("--base", help="Folder or Hub id of the backbone; by default the one that the file names.")
    add("--fuse", action="store_true", help="Put the adapter into the weights first.")
    add("--scale", type=float, default=1.0, help="Scale of the adapter; 0 gives the base's features.")
    add("--batch_size", type=int, default=16, help="Images at a time.")
    add(
        "--tile",
        type=int,
        help="Side of tiles in which images are seen at their own resolution; by default as trained.",
    )
    add("--overlap", type=int, help="Pixels that tiles share; 64 by default, or as trained.")
    add("--dtype", choices=("no", "fp16", "bf16"), default="no", help="Precision of the weights; no means fp32.")
    return parser


def open_model(classes: Sequence[Any], options: argparse.Namespace) -> Any:
    """The model that the options name, on the accelerator if there is one.

    Args:
        classes: Classes of models; the one whose task the file names opens it.
        options: Those of `make_parser`.

    Raises:
        SerialLoraError: If it cannot be opened, or the options contradict each other.
    """
    if options.batch_size < 1:
        raise SerialLoraError(f"--batch_size must be at least 1; got {options.batch_size}.")
    if options.fuse and options.scale != 1:
        raise SerialLoraError("--fuse puts the adapter into the weights at scale 1: leave out --scale.")
    device, dtype = default_device(options.dtype)
    with_lora = all((Path(options.model) / name).is_file() for name in (HEAD_NAME, LORA_WEIGHT_NAME))
    name = {"weight_name": HEAD_NAME} if with_lora else {}
    file = AdapterFile.read(options.model, **name)
    if (options.fuse or options.scale != 1) and not file.components:
        held = "PEFT's LoRA" if with_lora else "none"
        raise SerialLoraError(f"--fuse and --scale are for Serial LoRA; {options.model} holds {held}.")
    head = file.head
    chosen = next((c for c in classes if head is not None and c.task == head.task), classes[0])
    base = _with_lora(head.base, options) if with_lora and head is not None else options.base
    model = chosen.from_pretrained(options.model, base, **name).to(device)
    if options.fuse:
        model.fuse()
    see_in_tiles(model, options.tile, options.overlap)
    return model.to(dtype)


def see_in_tiles(model: Any, tile: int | None, overlap: int | None) -> None:
    """Let a model see images in tiles of a side, or tiles that share other pixels; None leaves it as it was trained.

    Raises:
        SerialLoraError: If there cannot be such tiles, or it sees none.
    """
    own = model.preprocessing
    if tile is not None:
        model.check_size((tile, tile))
        given = 64 if overlap is None else overlap
        model.preprocessing = replace(own, size=(tile, tile), resize_mode=TILE, overlap=given)
    elif overlap is not None:
        if own.resize_mode != TILE:
            raise SerialLoraError("--overlap is what tiles share: give --tile too.")
        model.preprocessing = replace(own, overlap=overlap)


def _with_lora(base: Base, options: argparse.Namespace) -> nn.Module:
    """The base of what a recipe saved with --adapter lora, with PEFT's LoRA in it."""
    backbone = open_backbone(options.base or base.name or "", base.kind)
    PeftLora().load(backbone, Path(options.model) / LORA_WEIGHT_NAME)
    return backbone


def image_files(given: Sequence[str]) -> list[Path]:
    """The files that are named, and the images in the folders that are and in the folders inside them, in order.

    Raises:
        SerialLoraError: If there is no such file or folder, or no image in one.
    """
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise SerialLoraError(f"{path} holds no image; these endings are read: {', '.join(sorted(SUFFIXES))}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SerialLoraError(f"{path} is neither a file nor a folder.")
    return found


@torch.inference_mode()
def predictions(
    model: Any, paths: Sequence[Path], options: argparse.Namespace, skipped: list[dict[str, str]]
) -> Iterator[tuple[Path, Image.Image, Tensor]]:
    """Every path with its image and its logits, (classes,) or at the image's size (classes, H, W), with a progress bar.

    Args:
        model: The model to apply.
        paths: Image files.
        options: Those of `make_parser`.
        skipped: Files that are not complete images are noted here, with the reason, and left out.

    Raises:
        SerialLoraError: If no file is an image.
    """
    adapted = getattr(model.backbone, "_serial_lora", None) is not None
    with tqdm(total=len(paths), unit="image") as bar:
        for start in range(0, len(paths), options.batch_size):
            images = _read(paths[start : start + options.batch_size], skipped)
            if images:
                with serial_lora_scale(model.backbone, options.scale) if adapted else nullcontext():
                    for (path, image), logits in zip(
                        images.items(), predict(model, list(images.values())), strict=True
                    ):
                        yield path, image, logits
            bar.update(min(options.batch_size, len(paths) - start))
    if len(skipped) == len(paths):
        raise SerialLoraError(f"none of the {len(paths)} files is an image: {skipped[0]['reason']}")


def _read(paths: Sequence[Path], skipped: list[dict[str, str]]) -> dict[Path, Image.Image]:
    images = {}
    for path in paths:
        try:
            images[path] = read_image(path)
        except SerialLoraError as error:
            logger.warning("left out: %s", error)
            skipped.append({"file": str(path), "reason": str(error)})
    return images
