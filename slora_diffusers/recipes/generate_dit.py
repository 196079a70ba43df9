"""Draws images of classes with a DiT and any number of Serial LoRA adapters.

slora generate --base facebook/DiT-XL-2-256 --adapter outputs/dit --labels 207 360 --fuse
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from PIL import Image

from ..training.diffusion.validation import sample_generators
from .generation import adapted, add_adapter_options, default_device, drawn_together, save_grid


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw, and return the picture's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", nargs="+", required=True, help="Class ids, or labels that the checkpoint knows.")
    add_adapter_options(parser, guidance_scale=4.0, output="outputs/dit.png")
    options = parser.parse_args(argv)

    device, dtype = default_device(options.dtype)
    pipe: Any = DiTPipeline.from_pretrained(options.base, dtype=dtype).to(device)
    labels = [int(label) if label.isdigit() else pipe.get_label_ids([label])[0] for label in options.labels]
    labels = [label for label in labels for _ in range(options.images)]
    noise = sample_generators(options.seed, len(labels))

    def draw(share: list[int]) -> list[Image.Image]:
        return pipe(
            [labels[i] for i in share],
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.steps,
            generator=[noise[i] for i in share],
        ).images

    with adapted(pipe, options), torch.inference_mode():
        images = drawn_together(len(labels), draw)
    return save_grid(images, options)
