"""Tiny configurations and inputs of the image transformers in diffusers; see tiny_models.py.

`r` draws the inputs: `r(2, 4, 8, 8)` is normal noise of that shape, `r.ints(10, 2)` two integers below 10. Widths
differ wherever a model lets them, so that a record that mixes up two inputs fails instead of passing by chance.
"""

from __future__ import annotations

import torch

from tests.tiny.base import TinyModel, grid_ids

_LATENT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}
_BASIC = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 16,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "num_layers": 2,
}


def _text_to_image(r, text=8, /, **more):
    inputs = {"hidden_states": r(2, 4, 8, 8), "encoder_hidden_states": r(2, 5, text), "timestep": r.ints(1000, 2)}
    return inputs | more


def _basic(r):
    return {"hidden_states": r(2, 16, 4, 4), "encoder_hidden_states": r(2, 5, 12)}


def _hunyuan_dit(r):
    return _text_to_image(
        r,
        text_embedding_mask=torch.ones(2, 5),
        encoder_hidden_states_t5=r(2, 4, 16),
        text_embedding_mask_t5=torch.ones(2, 4),
        image_meta_size=r(2, 6).abs() * 100,
        timestep=r(2).abs(),
        style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=(torch.ones(16, 8), torch.zeros(16, 8)),
    )


def _sizes(batch=2):
    size = torch.tensor([[8.0, 8.0]] * batch)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}


def _glm(r):
    inputs = _text_to_image(r, 24, prior_token_id=r.ints(64, 2, 16), prior_token_drop=torch.zeros(2, 16).bool())
    return inputs | {key: value for key, value in _sizes().items() if key != "original_size"}


def _ideogram(r):
    positions = torch.arange(8)[None, :, None].expand(1, 8, 3)
    return {
        "hidden_states": r(1, 8, 16),
        "encoder_hidden_states": r(1, 8, 24),
        "timestep": torch.tensor([0.5]),
        "position_ids": positions,
        "segment_ids": torch.ones(1, 8, dtype=torch.long),
        "indicator": torch.tensor([[3] * 4 + [2] * 4]),  # text tokens, then image tokens
    }


def _krea(r):
    return {
        "hidden_states": r(1, 4, 16),
        "encoder_hidden_states": r(1, 4, 3, 16),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([torch.zeros(4, 3), grid_ids(2, 2, 3)]),
        "encoder_attention_mask": torch.tensor([[True, True, True, False]]),
    }


def _omnigen(r):
    tokens = 6 + 1 + 16
    return {
        "hidden_states": r(2, 4, 8, 8),
        "timestep": r(2).abs(),
        "input_ids": r.ints(10, 2, 6),
        "input_img_latents": [r(1, 4, 4, 4)],
        "input_image_sizes": {0: [[0, 4]]},
        "attention_mask": torch.ones(2, tokens, tokens),
        "position_ids": torch.arange(tokens).repeat(2, 1),
    }


def _hidream(r):
    return {
        "hidden_states": r(2, 4, 8, 8),
        "timesteps": r.ints(1000, 2),
        "encoder_hidden_states_t5": r(2, 5, 8),
        "encoder_hidden_states_llama3": r(2, 2, 5, 4),
        "pooled_embeds": r(2, 8),
    }


IMAGE = {
    "DiTTransformer2DModel": TinyModel(
        dict(_LATENT, num_embeds_ada_norm=10, norm_num_groups=4),
        lambda r: {"hidden_states": r(2, 4, 8, 8), "timestep": r.ints(1000, 2), "class_labels": r.ints(10, 2)},
    ),
    "PixArtTransformer2DModel": TinyModel(
        dict(_LATENT, cross_attention_dim=16, caption_channels=8, norm_num_groups=4),
        lambda r: _text_to_image(r, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "SD3Transformer2DModel": TinyModel(
        dict(
            _LATENT,
            num_layers=3,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda r: _text_to_image(r, pooled_projections=r(2, 12)),
    ),
    "SanaTransformer2DModel": TinyModel(
        dict(
            _LATENT,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            qk_norm="rms_norm_across_heads",
        ),
        lambda r: _text_to_image(r, 12),
    ),
    "AuraFlowTransformer2DModel": TinyModel(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 24,
            "pos_embed_max_size": 64,
        },
        lambda r: _text_to_image(r, 24),
    ),
    "HunyuanDiT2DModel": TinyModel(
        dict(
            _LATENT,
            hidden_size=16,
            cross_attention_dim=8,
            cross_attention_dim_t5=16,
            pooled_projection_dim=4,
            text_len=5,
            text_len_t5=4,
        ),
        _hunyuan_dit,
    ),
    "Lumina2Transformer2DModel": TinyModel(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 12,
        },
        lambda r: _text_to_image(r, 12, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool)),
    ),
    "LuminaNextDiT2DModel": TinyModel(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 20,
        },
        lambda r: _text_to_image(
            r,
            20,
            timestep=r(2).abs(),
            encoder_mask=torch.ones(2, 5),
            image_rotary_emb=r(384, 384, 4),
            cross_attention_kwargs={},
        ),
    ),
    "CogView3PlusTransformer2DModel": TinyModel(
        dict(_LATENT, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8),
        lambda r: _text_to_image(r, **_sizes()),
    ),
    "CogView4Transformer2DModel": TinyModel(
        dict(_LATENT, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=4, rope_axes_dim=(4, 4)),
        lambda r: _text_to_image(r, **_sizes()),
    ),
    "GlmImageTransformer2DModel": TinyModel(
        {key: value for key, value in _LATENT.items() if key != "sample_size"}
        | {
            "out_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        _glm,
    ),
    "ErnieImageTransformer2DModel": TinyModel(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 12,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 8, 4, 4),
            "timestep": torch.tensor([1.0]),
            "text_bth": r(1, 6, 12),
            "text_lens": torch.tensor([6]),
        },
    ),
    "HiDreamImageTransformer2DModel": TinyModel(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        _hidream,
    ),
    "HunyuanImageTransformer2DModel": TinyModel(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "rope_axes_dim": (4, 4),
        },
        lambda r: _text_to_image(r, 12, timestep=r(2).abs(), encoder_attention_mask=torch.ones(2, 5)),
    ),
    "Ideogram4Transformer2DModel": TinyModel(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        _ideogram,
    ),
    "Krea2Transformer2DModel": TinyModel(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        _krea,
    ),
    "OmniGenTransformer2DModel": TinyModel(
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 24,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 20,
            "in_channels": 4,
            "time_step_dim": 4,
            "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        _omnigen,
    ),
    "PRXTransformer2DModel": TinyModel(
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda r: _text_to_image(r, 24, timestep=torch.tensor([0.5, 0.7])),
    ),
    "DreamLiteTransformer2DModel": TinyModel(_BASIC, _basic),
    "Transformer2DModel": TinyModel(_BASIC, _basic),
    "DualTransformer2DModel": TinyModel(
        _BASIC, lambda r: {"hidden_states": r(2, 16, 4, 4), "encoder_hidden_states": r(2, 77 + 257, 12)}
    ),
    "PriorTransformer": TinyModel(
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 12, "num_embeddings": 5},
        lambda r: {
            "hidden_states": r(2, 12),
            "timestep": r.ints(1000, 2),
            "proj_embedding": r(2, 12),
            "encoder_hidden_states": r(2, 5, 12),
        },
    ),
}
