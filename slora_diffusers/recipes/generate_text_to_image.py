"""Draws images of prompts with SD3, PixArt, Flux or another text-to-image pipeline and any number of adapters.

    slora generate --base stabilityai/stable-diffusion-3-medium-diffusers \
        --adapter outputs/dog --prompts "a photo of sks dog in a bucket" --dtype bf16
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..training.diffusion.validation import sample_generators
from .generation import adapted, add_adapter_options, default_device, save_grid


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw, and give the picture's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", required=True, help="Prompts.")
    parser.add_argument("--negative_prompt", default="", help="What not to draw.")
    parser.add_argument("--height", type=int, help="Height in pixels; the model's own by default.")
    parser.add_argument("--width", type=int, help="Width in pixels; the model's own by default.")
    parser.add_argument("--max_sequence_length", type=int, help="Tokens of the T5 encoder.")
    parser.add_argument("--offload", action="store_true", help="Keep only the component at work on the GPU.")
    add_adapter_options(parser, guidance_scale=4.0, output="outputs/images.png")
    options = parser.parse_args(argv)

    device, dtype = default_device(options.dtype)
    pipe: Any = DiffusionPipeline.from_pretrained(options.base, dtype=dtype)
    wanted = {"height": options.height, "width": options.width, "max_sequence_length": options.max_sequence_length}
    wanted["negative_prompt"] = [options.negative_prompt] * len(options.prompts) * options.images
    if options.height or options.width:
        wanted["use_resolution_binning"] = False  # PixArt would round the size to one of its own
    known = inspect.signature(pipe.__call__).parameters
    arguments = {name: value for name, value in wanted.items() if name in known and value is not None}
    prompts = [prompt for prompt in options.prompts for _ in range(options.images)]
    with adapted(pipe, options), torch.inference_mode():
        if options.offload:
            pipe.enable_model_cpu_offload()
        else:
            pipe.to(device)
        images = pipe(
            prompts,
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.steps,
            generator=sample_generators(options.seed, len(prompts)),
            **arguments,
        ).images
    return save_grid(images, options)
