"""Tiny configurations and inputs of Flux, Qwen-Image, Z-Image and their relatives in diffusers; see tiny_base.py."""

from __future__ import annotations

import torch

from tests.tiny.base import TinyModel, grid_ids

_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
}
_QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 4, 4),
}
_Z_IMAGE = {
    "in_channels": 16,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}


def _packed(r, ids=3, text=24, batch_ids=False, channels=4, **more):
    """Sixteen packed image tokens and six text tokens, with their position ids."""
    image, words = grid_ids(4, 4, ids), torch.zeros(6, ids)
    if batch_ids:
        image, words = image[None], words[None]
    return dict(
        hidden_states=r(1, 16, channels),
        encoder_hidden_states=r(1, 6, text),
        timestep=torch.tensor([0.5]),
        img_ids=image,
        txt_ids=words,
        **more,
    )


def _qwen(r):
    return {
        "hidden_states": r(1, 16, 16),
        "encoder_hidden_states": r(1, 6, 24),
        "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    }


def _qwen21(r):
    mask = torch.zeros(1, 5, dtype=torch.bool)
    mask[:, 4:] = True  # one vision slot for each 2 x 2 group of target latents
    return {
        "hidden_states": r(1, 4, 4),
        "encoder_hidden_states": r(1, 4, 8),
        "encoder_hidden_states_mask": torch.ones(1, 4, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 2)]],
        "img_mask": mask,
    }


FLUX = {
    "FluxTransformer2DModel": TinyModel(
        dict(_FLUX, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 8)),
        lambda r: _packed(r, pooled_projections=r(1, 8), guidance=torch.tensor([3.0])),
    ),
    "Flux2Transformer2DModel": TinyModel(
        dict(_FLUX, axes_dims_rope=(4, 4, 4, 4)),
        lambda r: _packed(r, ids=4, batch_ids=True, guidance=torch.tensor([1.0])),
    ),
    "Flux3Transformer2DModel": TinyModel(
        {key: value for key, value in _FLUX.items() if key != "patch_size"}
        | {"cond_in_channels": 4, "axes_dims_rope": (4, 4, 4, 4)},
        lambda r: _packed(r, ids=4, image_cond_hidden_states=r(1, 3, 4), image_cond_ids=torch.ones(3, 4)),
    ),
    "ChromaTransformer2DModel": TinyModel(
        dict(
            _FLUX,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        _packed,
    ),
    "BriaTransformer2DModel": TinyModel(dict(_FLUX, axes_dims_rope=[4, 4, 8]), _packed),
    "BriaFiboTransformer2DModel": TinyModel(
        dict(_FLUX, axes_dims_rope=[4, 4, 8], text_encoder_dim=8),
        lambda r: _packed(r, text_encoder_layers=[r(1, 6, 8) for _ in range(3)]),
    ),
    "BriaFibo2Transformer2DModel": TinyModel(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 24,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (16, 16, 16),
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 8),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": r(1, 2, 6, 24),
        },
    ),
    "OvisImageTransformer2DModel": TinyModel(dict(_FLUX, out_channels=4, axes_dims_rope=(4, 4, 8)), _packed),
    "LongCatImageTransformer2DModel": TinyModel(
        dict(_FLUX, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8]), lambda r: _packed(r)
    ),
    "QwenImageTransformer2DModel": TinyModel(_QWEN, _qwen),
    "QwenImage21Transformer2DModel": TinyModel(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 8,
            "mlp_ratio": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen21,
    ),
    "NucleusMoEImageTransformer2DModel": TinyModel(
        {**_QWEN, "moe_enabled": False, "capacity_factors": [8.0, 8.0]}, _qwen
    ),
    "ZImageTransformer2DModel": TinyModel(
        _Z_IMAGE, lambda r: {"x": [r(16, 1, 8, 8)], "cap_feats": [r(6, 24)], "t": torch.tensor([0.5])}
    ),
    "ZImageTransformer2DModel/omni": TinyModel(
        {**_Z_IMAGE, "siglip_feat_dim": 10},
        lambda r: {
            "x": [[r(16, 1, 8, 8), r(16, 1, 8, 8)]],
            "cap_feats": [[r(6, 24), r(4, 24)]],
            "t": torch.tensor([0.5]),
            "siglip_feats": [[r(2, 2, 10), r(2, 2, 10)]],
            "image_noise_mask": [[0, 1]],
        },
    ),
}
