"""Teaches Lumina-Image 2.0 a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_lumina2.py \
        --pretrained_model_name_or_path Alpha-VLLM/Lumina-Image-2.0 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

Rectified flow that the transformer tells backwards: it reads 1 - sigma and predicts z_0 - eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor

from .flow import Family, Options, Tensors, train


def encode_text(pipe: Any, text: str, length: int) -> Tensors:
    """The pipeline's own embeddings, of the empty text those that it takes for no prompt: without its system prompt."""
    if text:
        embeds, mask, _, _ = pipe.encode_prompt(text, False, max_sequence_length=length)
    else:
        embeds, mask = pipe._get_gemma_prompt_embeds(text, max_sequence_length=length)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def velocity(pipe: Any, transformer: Any, noisy: Tensor, timesteps: Tensor, text: Tensors) -> Tensor:
    """eps - z_0."""
    return -transformer(
        noisy,
        timestep=1 - timesteps / 1000,
        encoder_hidden_states=text["prompt_embeds"],
        encoder_attention_mask=text["prompt_attention_mask"],
    ).sample


LUMINA2 = Family(Lumina2Pipeline, Lumina2Transformer2DModel, encode_text, velocity, length=256, patch=2)


__all__ = ["Options", "main"]


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    return train(LUMINA2, __doc__, argv)
