"""What the two scripts that apply a vision model share: their options, the images they are given, the loop."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..contexts import serial_lora_scale
from ..errors import SerialLoraError
from .data import SUFFIXES, read_image
from .generation import default_device


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
    add("--dtype", choices=("no", "fp16", "bf16"), default="no", help="Precision of the weights; no means fp32.")
    return parser


def open_model(model_class: Any, options: argparse.Namespace) -> Any:
    """The model that the options name, on the accelerator if there is one.

    Raises:
        SerialLoraError: If it cannot be opened, or the options contradict each other.
    """
    if options.batch_size < 1:
        raise SerialLoraError(f"--batch_size must be at least 1; got {options.batch_size}.")
    if options.fuse and options.scale != 1:
        raise SerialLoraError("--fuse puts the adapter into the weights at scale 1: leave out --scale.")
    device, dtype = default_device(options.dtype)
    model = model_class.from_pretrained(options.model, options.base).to(device)
    if options.fuse:
        model.fuse()
    return model.to(dtype)


def image_files(given: Sequence[str]) -> list[Path]:
    """The files that are named, and the images in the folders that are, in order.

    Raises:
        SerialLoraError: If there is no such file or folder, or no image in one.
    """
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
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
    model: Any, paths: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[Path, Image.Image, Tensor]]:
    """Every path with its image and its logits, (classes,) or (classes, H, W) in fp32, with a progress bar."""
    like = next(model.parameters())
    adapted = getattr(model.backbone, "_serial_lora", None) is not None
    with tqdm(total=len(paths), unit="image") as bar:
        for start in range(0, len(paths), options.batch_size):
            chosen = paths[start : start + options.batch_size]
            images = [read_image(path) for path in chosen]
            pixels = torch.stack([model.preprocessing(image) for image in images]).to(like)
            if adapted:
                with serial_lora_scale(model.backbone, options.scale):
                    logits = model(pixels).logits
            else:
                logits = model(pixels).logits
            yield from zip(chosen, images, logits.float().cpu(), strict=True)
            bar.update(len(chosen))
