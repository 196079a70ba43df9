"""Teaches Qwen-Image a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_qwen_image.py \
        --pretrained_model_name_or_path Qwen/Qwen-Image --quantize nf4 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

Rectified flow on latents packed two by two into tokens; texts are as long as they are, and padding is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from ..errors import SerialLoraError
from .flow import Family, Options, Tensors, train

PATCH = 2  # latents per token, along a side


def encode_text(pipe: Any, text: str, length: int) -> Tensors:
    """The pipeline's own embeddings, and which of their tokens are text: shorter ones of a batch are padded."""
    embeds, mask = pipe.encode_prompt(text, max_sequence_length=length)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


def velocity(pipe: Any, transformer: Any, noisy: Tensor, timesteps: Tensor, text: Tensors) -> Tensor:
    """eps - z_0."""
    count, channels, height, width = noisy.shape
    mask = text["prompt_embeds_mask"]
    output = transformer(
        hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        encoder_hidden_states=text["prompt_embeds"],
        encoder_hidden_states_mask=None if mask.all() else mask,
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * count,
    ).sample
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(output, height * factor, width * factor, factor)[:, :, 0]


def check(pipe: Any) -> None:
    """Raise SerialLoraError for a transformer that is told its guidance."""
    if pipe.transformer.config.guidance_embeds:
        raise SerialLoraError("this recipe does not train a Qwen-Image that is distilled by guidance.")


QWEN_IMAGE = Family(
    QwenImagePipeline, QwenImageTransformer2DModel, encode_text, velocity, length=512, patch=PATCH, side=1024,
    call={"guidance": "true_cfg_scale"}, check=check,
)  # fmt: skip


__all__ = ["Options", "main"]


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    return train(QWEN_IMAGE, __doc__, argv)
