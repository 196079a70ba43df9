"""Tiny configurations and inputs of the other video transformers in diffusers; see tiny_base.py."""

from __future__ import annotations

import torch

from tests.tiny.base import TinyModel, video

_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
}


def _framepack(r):
    return video(
        r,
        frames=3,
        encoder_attention_mask=torch.ones(1, 6),
        pooled_projections=r(1, 8),
        image_embeds=r(1, 5, 10),
        indices_latents=torch.arange(3.0),
        guidance=r.ints(1000, 1),
        latents_clean=r(1, 4, 2, 8, 8),
        indices_latents_clean=torch.ones(2),
        latents_history_2x=r(1, 4, 2, 8, 8),
        indices_latents_history_2x=torch.ones(2),
        latents_history_4x=r(1, 4, 8, 8, 8),
        indices_latents_history_4x=torch.ones(8),
    )


def _minimax_h3(r):
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)  # text, audio, video
    return {
        "hidden_states": r(2, 8, 16),
        "audio_hidden_states": r(2, 6, 6),
        "encoder_hidden_states": r(2, 4, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(18.0)[:, None].expand(18, 3),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def _kandinsky6(r):
    return {
        "hidden_states": r(1, 2, 4, 4, 9),
        "encoder_hidden_states": r(1, 6, 8),
        "pooled_projections": r(1, 10),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": r(1, 5, 4),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
    }


def _kandinsky5(r):
    return {
        "hidden_states": r(1, 2, 4, 4, 4),
        "encoder_hidden_states": r(1, 6, 8),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": r(1, 10),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(6),
    }


VIDEO = {
    "MochiTransformer3DModel": TinyModel(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 12,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 6,
        },
        lambda r: video(r, encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool)),
    ),
    "AllegroTransformer3DModel": TinyModel(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 16,
        },
        lambda r: video(
            r,
            attention_mask=torch.ones(1, 2, 8, 8),
            encoder_attention_mask=torch.ones(1, 6),
            image_rotary_emb=([(r(4, 4).cos(), r(4, 4).sin())] * 3, r.ints(4, 3, 1, 32)),
        ),
    ),
    "LatteTransformer3DModel": TinyModel(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single",
            "caption_channels": 12,
            "video_length": 2,
        },
        lambda r: video(r, text=12),
    ),
    "EasyAnimateTransformer3DModel": TinyModel(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "mmdit_layers": 1,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        video,
    ),
    "HunyuanVideoTransformer3DModel": TinyModel(
        dict(_HUNYUAN, num_single_layers=1, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
        lambda r: video(
            r, encoder_attention_mask=torch.ones(1, 6), pooled_projections=r(1, 8), guidance=r.ints(1000, 1)
        ),
    ),
    "HunyuanVideo15Transformer3DModel": TinyModel(
        dict(
            _HUNYUAN,
            num_layers=2,
            text_embed_2_dim=8,
            image_embed_dim=12,
            rope_axes_dim=(2, 4, 4),
            target_size=16,
            task_type="t2v",
        ),
        lambda r: video(
            r,
            size=4,
            timestep=torch.tensor([500.0]),
            encoder_attention_mask=torch.ones(1, 6),
            encoder_hidden_states_2=r(1, 4, 8),
            encoder_attention_mask_2=torch.ones(1, 4),
            image_embeds=torch.zeros(1, 3, 12),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": TinyModel(
        dict(
            _HUNYUAN,
            num_single_layers=1,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
            has_image_proj=True,
            image_proj_dim=10,
            has_clean_x_embedder=True,
        ),
        _framepack,
    ),
    "JoyImageEditTransformer3DModel": TinyModel(
        {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 12, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda r: video(r, channels=16, text=12, frames=1, size=4),
    ),
    "JoyImageEditPlusTransformer3DModel": TinyModel(
        {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 12, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda r: {
            "hidden_states": r(1, 2, 16, 1, 2, 2),
            "encoder_hidden_states": r(1, 6, 12),
            "timestep": torch.tensor([1.0]),
            "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
    ),
    "Kandinsky5Transformer3DModel": TinyModel(
        {
            "in_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 10,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 24,
            "ff_dim": 20,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        _kandinsky5,
    ),
    "Kandinsky6Transformer3DModel": TinyModel(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 10,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 20,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        _kandinsky6,
    ),
    "Kandinsky6SRTransformer3DModel": TinyModel(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 24,
            "ff_dim": 20,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        lambda r: {"hidden_states": r(1, 2, 16, 16, 9), "timestep": torch.tensor([500.0])},
    ),
    "MiniMaxH3Transformer3DModel": TinyModel(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 20,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    "MotifVideoTransformer3DModel": TinyModel(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "text_embed_dim": 16,
            "image_embed_dim": 10,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda r: video(r, image_embeds=r(1, 5, 10)),
    ),
    "TransformerSpatioTemporalModel": TinyModel(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 2,
            "cross_attention_dim": 12,
        },
        lambda r: {
            "hidden_states": r(4, 32, 4, 4),
            "encoder_hidden_states": r(4, 1, 12),
            "image_only_indicator": torch.zeros(2, 2),
        },
    ),
    "TransformerTemporalModel": TinyModel(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4, "num_layers": 2},
        lambda r: {"hidden_states": r(4, 16, 4, 4), "num_frames": 2},
    ),
}
