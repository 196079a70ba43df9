"""What the generation scripts share: the options of adapters, loading them, and the picture that is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from ..errors import SerialLoraError
from ..training.diffusion.validation import image_grid
from ..training.precision import DTYPES


def add_adapter_options(parser: argparse.ArgumentParser, guidance_scale: float, output: str) -> None:
    """Add the options that every generation script has."""
    add = parser.add_argument
    add("--base", required=True, help="Folder or Hub id of the pipeline.")
    add("--adapter", nargs="*", default=[], help="Folders, files or Hub ids of adapters.")
    add("--weights", nargs="*", type=float, help="Weight of each adapter; 1 by default.")
    add("--scale", type=float, default=1.0, help="Scale of all adapters together; 0 gives the base.")
    add("--fuse", action="store_true", help="Put the adapters into the weights first.")
    add("--steps", type=int, default=25, help="Sampling steps.")
    add("--guidance_scale", type=float, default=guidance_scale, help="Guidance scale.")
    add("--images", type=int, default=1, help="Images of each class or prompt.")
    add("--seed", type=int, default=0, help="Seed of the noise.")
    add("--dtype", choices=DTYPES, default="no", help="Precision of the weights; no means fp32.")
    add("--output", default=output, help="The picture to write.")


def default_device(dtype: str) -> tuple[torch.device, torch.dtype]:
    """This process's accelerator if there is one, and the dtype called `dtype`."""
    device = f"cuda:{PartialState().local_process_index}" if torch.cuda.is_available() else "cpu"
    return torch.device(device), DTYPES[dtype]


def drawn_together(count: int, draw: Callable[[list[int]], Sequence[Image.Image]]) -> list[Image.Image]:
    """All images, of which each process of `accelerate launch` draws its share.

    Args:
        count: Number of images.
        draw: From the numbers of some images to these images; an image must not depend on the others beside it.
    """
    state = PartialState()
    mine = list(range(count))[state.process_index :: state.num_processes]
    images = dict(zip(mine, draw(mine) if mine else [], strict=True))
    everywhere = {number: image for part in gather_object([images]) for number, image in part.items()}
    return [everywhere[number] for number in range(count)]


@contextmanager
def adapted(pipe: Any, options: argparse.Namespace) -> Iterator[None]:
    """Load every adapter with its weight; inside, they act at --scale, live or fused into the weights.

    Raises:
        SerialLoraError: If there are not as many weights as adapters, or an adapter does not fit.
    """
    weights = options.weights or [1.0] * len(options.adapter)
    if len(weights) != len(options.adapter):
        raise SerialLoraError(f"--weights gives {len(weights)} numbers for {len(options.adapter)} adapters.")
    for index, (source, weight) in enumerate(zip(options.adapter, weights, strict=True)):
        reports = pipe.load_serial_lora(source, adapter_name=f"adapter_{index}", weight=weight)
        print("\n".join(f"{component}: {report}" for component, report in reports.items()))
    if not options.adapter:
        yield
    elif options.fuse:
        pipe.fuse_serial_lora(scale=options.scale)
        yield
    else:
        with pipe.serial_lora_scale(options.scale):
            yield


def save_grid(images: Sequence[Image.Image], options: argparse.Namespace) -> Path:
    """Write the images as one picture, `--images` to a column; the main process does."""
    path = Path(options.output)
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images, options.images if options.images > 1 else len(images)).save(path)
        print(f"wrote {path}")
    return path
