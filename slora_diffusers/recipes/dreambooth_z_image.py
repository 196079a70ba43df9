"""Teaches Z-Image a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_z_image.py \
        --pretrained_model_name_or_path Tongyi-MAI/Z-Image \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

Rectified flow that the transformer tells backwards: it reads 1 - sigma and predicts z_0 - eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from .flow import Family, Options, Tensors, train


def encode_text(pipe: Any, text: str, length: int) -> Tensors:
    """The pipeline's own embeddings, and which of their tokens are text: shorter ones of a batch are padded."""
    (embeds,), _ = pipe.encode_prompt([text], do_classifier_free_guidance=False, max_sequence_length=length)
    mask = torch.ones(1, len(embeds), dtype=torch.bool, device=embeds.device)
    return {"prompt_embeds": embeds[None], "mask": mask}


def unpadded(text: Tensors) -> dict[str, list[Tensor]]:
    """The embeddings of each text alone, as the pipeline and the transformer take them."""
    return {"prompt_embeds": [e[m] for e, m in zip(text["prompt_embeds"], text["mask"], strict=True)]}


def velocity(pipe: Any, transformer: Any, noisy: Tensor, timesteps: Tensor, text: Tensors) -> Tensor:
    """eps - z_0."""
    images = list(noisy[:, :, None].unbind(0))  # (C, 1, h, w) each
    output = transformer(images, 1 - timesteps / 1000, unpadded(text)["prompt_embeds"], return_dict=False)[0]
    return -torch.stack(list(output))[:, :, 0]


Z_IMAGE = Family(
    ZImagePipeline, ZImageTransformer2DModel, encode_text, velocity, length=512, patch=2, side=1024, arguments=unpadded
)


__all__ = ["Options", "main"]


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    return train(Z_IMAGE, __doc__, argv)
