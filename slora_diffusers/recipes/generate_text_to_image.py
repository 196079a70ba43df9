"""Draws images of prompts with SD3, PixArt, Flux or another text-to-image pipeline and any number of adapters.

    slora generate --base stabilityai/stable-diffusion-3-medium-diffusers \
        --adapter outputs/dog --prompts "a photo of sks dog in a bucket" --dtype bf16

Many prompts, each with adapters of its own, from JSON lines such as {"prompt": "a dog", "adapters": {"oil": 0.8}}:

    slora generate --base stabilityai/stable-diffusion-3-medium-diffusers \
        --requests requests.jsonl --adapters adapters --output outputs/images --dtype bf16
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..errors import SerialLoraError
from ..training.diffusion.validation import sample_generators
from .generation import adapted, add_adapter_options, default_device, drawn_together, save_grid


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw, and return the picture's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", nargs="+", help="Prompts.")
    what.add_argument("--requests", type=Path, help="File of JSON lines; --output is then a folder of images.")
    parser.add_argument("--adapters", type=Path, help="Folder of the adapters that --requests name.")
    parser.add_argument("--batch_size", type=int, default=8, help="Requests of --requests drawn at a time.")
    parser.add_argument("--negative_prompt", default="", help="What not to draw.")
    parser.add_argument("--height", type=int, help="Height in pixels; the model's own by default.")
    parser.add_argument("--width", type=int, help="Width in pixels; the model's own by default.")
    parser.add_argument("--max_sequence_length", type=int, help="Tokens of the T5 encoder.")
    parser.add_argument("--offload", action="store_true", help="Keep only the component at work on the GPU.")
    add_adapter_options(parser, guidance_scale=4.0, output="outputs/images.png")
    options = parser.parse_args(argv)

    device, dtype = default_device(options.dtype)
    pipe: Any = DiffusionPipeline.from_pretrained(options.base, dtype=dtype)
    if options.requests:
        return _draw_file(pipe.to(device), options)
    wanted = {"height": options.height, "width": options.width, "max_sequence_length": options.max_sequence_length}
    if options.height or options.width:
        wanted["use_resolution_binning"] = False  # PixArt would round the size to one of its own
    known = inspect.signature(pipe.__call__).parameters
    arguments = {name: value for name, value in wanted.items() if name in known and value is not None}
    prompts = [prompt for prompt in options.prompts for _ in range(options.images)]
    noise = sample_generators(options.seed, len(prompts))

    def draw(share: list[int]) -> list[Image.Image]:
        negative = {"negative_prompt": [options.negative_prompt] * len(share)} if "negative_prompt" in known else {}
        return pipe(
            [prompts[i] for i in share],
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.steps,
            generator=[noise[i] for i in share],
            **negative,
            **arguments,
        ).images

    with adapted(pipe, options), torch.inference_mode():
        if options.offload:
            pipe.enable_model_cpu_offload()
        else:
            pipe.to(device)
        images = drawn_together(len(prompts), draw)
    return save_grid(images, options)


def _draw_file(pipe: Any, options: argparse.Namespace) -> Path:
    if options.adapter or options.fuse or options.images != 1 or options.batch_size < 1:
        raise SerialLoraError(
            "--requests names adapters of the folder --adapters, one image a line: leave out --adapter, --weights, "
            "--fuse and --images, and give a --batch_size of at least 1."
        )
    try:
        from .many import draw_requests
    except ImportError as error:
        raise SerialLoraError(f"--requests needs {error.name}: pip install 'slora_diffusers[serve]'.") from error
    size = {"size": [options.height, options.width]} if options.height and options.width else {}
    defaults = {"steps": options.steps, "guidance": options.guidance_scale, **size}
    if options.negative_prompt:
        defaults["negative_prompt"] = options.negative_prompt
    folder = Path(options.output)
    draw_requests(pipe, options.requests, options.adapters, folder, defaults, options.batch_size)
    return folder
