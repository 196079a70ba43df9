"""Teaches Sana a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_sana.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

Rectified flow on the latents of a deep compression autoencoder: a token is 32 x 32 pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from .flow import Family, Options, Tensors, train

# What the pipeline puts before every prompt, but not before a negative one.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def encode_text(pipe: Any, text: str, length: int) -> Tensors:
    """The pipeline's own embeddings, of the empty text those that it takes for no prompt."""
    instruction = INSTRUCTION if text else None
    embeds, mask, _, _ = pipe.encode_prompt(
        text, False, max_sequence_length=length, complex_human_instruction=instruction
    )
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def velocity(pipe: Any, transformer: Any, noisy: Tensor, timesteps: Tensor, text: Tensors) -> Tensor:
    """eps - z_0; a learned variance behind it is left out."""
    output = transformer(
        noisy,
        timestep=timesteps * pipe.transformer.config.timestep_scale,
        encoder_hidden_states=text["prompt_embeds"],
        encoder_attention_mask=text["prompt_attention_mask"],
    ).sample
    return output[:, : noisy.shape[1]]


SANA = Family(
    SanaPipeline, SanaTransformer2DModel, encode_text, velocity, length=300, patch=1,
    call={"use_resolution_binning": False},  # the sizes are chosen here
)  # fmt: skip


__all__ = ["Options", "main"]


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    return train(SANA, __doc__, argv)
