"""Models in the shapes that they are published in, without their weights."""

from __future__ import annotations

from functools import cache

import diffusers
import torch

_SD3 = {"sample_size": 128, "in_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
PUBLISHED: dict[str, tuple[str, dict[str, object]]] = {
    "DiT-XL/2": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 8, "num_layers": 28, "patch_size": 2},
    ),
    "PixArt-XL": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
        },
    ),
    "SD3-medium": (
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "SD3.5-medium": (
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "SD3.5-large": (
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "Flux.1-dev": (
        "FluxTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
}
"""Model -> class and configuration, as published."""


@cache
def published(name: str) -> torch.nn.Module:
    """A published model in its real shapes, on the meta device: no weights, no memory."""
    class_name, config = PUBLISHED[name]
    with torch.device("meta"):
        return getattr(diffusers, class_name)(**config)
