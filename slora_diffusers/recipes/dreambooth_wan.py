"""Teaches Wan 2.1 to draw images a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_wan.py \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

A picture is a video of one frame: what is learnt from pictures shows in videos, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from ..errors import SerialLoraError
from .flow import Family, Options, Tensors, train


def encode_text(pipe: Any, text: str, length: int) -> Tensors:
    """The pipeline's own embeddings, padded with zeros."""
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": embeds}


def velocity(pipe: Any, transformer: Any, noisy: Tensor, timesteps: Tensor, text: Tensors) -> Tensor:
    """eps - z_0."""
    return transformer(noisy[:, :, None], timestep=timesteps, encoder_hidden_states=text["prompt_embeds"]).sample[
        :, :, 0
    ]


def check(pipe: Any) -> None:
    """Raise SerialLoraError for the pipelines of Wan 2.2, which split their work or their timesteps."""
    if pipe.components.get("transformer_2") is not None or pipe.config.expand_timesteps:
        raise SerialLoraError(
            "this recipe trains Wan 2.1; Wan 2.2 has two transformers, or a timestep for each token. Use one of "
            "Wan 2.1, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )


WAN = Family(
    WanPipeline, WanTransformer3DModel, encode_text, velocity, length=512, patch=2, side=640,
    call={"num_frames": 1, "output_type": "pil"}, check=check,
)  # fmt: skip


__all__ = ["Options", "main"]


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    return train(WAN, __doc__, argv)
