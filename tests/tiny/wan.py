"""Tiny configurations and inputs of Wan, CogVideoX, LTX, Cosmos, Sana video and their relatives; see tiny_base.py."""

from __future__ import annotations

import torch

from tests.tiny.base import TinyModel, video

_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 20,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_WAN_I2V = dict(_WAN, image_dim=10, added_kv_proj_dim=24)
_COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 6,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 5,
}
_COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
    "encoder_hidden_states_channels": 16,
}
_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "caption_channels": 12,
    "rope_double_precision": False,
}


def _image_to_video(r, **more):
    # Wan's attentions take the last 512 tokens for text, whatever there is.
    return video(r, encoder_hidden_states=r(1, 512, 16), encoder_hidden_states_image=r(1, 5, 10), **more)


def _frames_first(r, text=12, frames=2, **more):
    inputs = video(r, text=text, frames=frames, **more)
    return inputs | {"hidden_states": inputs["hidden_states"].transpose(1, 2), "encoder_hidden_states": r(1, 5, text)}


def _far(r):
    return {
        "hidden_states": r(1, 4, 4, 8, 8),
        "timestep": torch.full((1, 4), 500.0),
        "r_timestep": torch.full((1, 4), 250.0),
        "encoder_hidden_states": r(1, 6, 16),
        "chunk_partition": [2, 2],
    }


def _cosmos_image(r):
    return video(r, fps=24, encoder_hidden_states=(r(1, 6, 16), r(1, 5, 10)))


def _cosmos3(r):
    vision = torch.arange(2, 6)
    return {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.tensor([0, 1]),
        "position_ids": torch.arange(6).repeat(3, 1),
        "und_len": 2,
        "sequence_length": 6,
        "vision_tokens": [r(1, 2, 1, 2, 2)],
        "vision_token_shapes": [(1, 2, 2)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.ones(4),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _helios(r):
    return video(
        r,
        indices_hidden_states=torch.arange(2.0)[None],
        indices_latents_history_short=torch.ones(1, 1),
        indices_latents_history_mid=torch.ones(1, 1),
        indices_latents_history_long=torch.ones(1, 4),
        latents_history_short=r(1, 4, 1, 8, 8),
        latents_history_mid=r(1, 4, 1, 8, 8),
        latents_history_long=r(1, 4, 4, 8, 8),
    )


def _ltx2(r):
    return {
        "hidden_states": r(2, 32, 4),
        "audio_hidden_states": r(2, 5, 4),
        "encoder_hidden_states": r(2, 6, 12),
        "audio_encoder_hidden_states": r(2, 6, 12),
        "timestep": r(2).abs() * 1000,
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
        "fps": 25.0,
    }


def _refiner(r):
    return {
        "hidden_states": r(2, 32, 4),
        "encoder_hidden_states": r(2, 6, 12),
        "timestep": r(2, 32).abs() * 1000,
        "video_rotary_emb": (r(2, 32, 16).cos(), r(2, 32, 16).sin()),
        "encoder_attention_mask": torch.ones(2, 6),
    }


def _sana_wm(r):
    pose = torch.eye(4).repeat(1, 4, 1, 1)
    pose[..., 2, 3] = torch.arange(4.0) * 0.1
    camera = torch.cat([pose.flatten(2), torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(1, 4, 4)], dim=-1)
    return {
        "hidden_states": r(1, 4, 4, 4, 4),
        "timestep": r.ints(1000, 1, 1, 4).float(),
        "encoder_hidden_states": r(1, 1, 6, 8),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "camera_conditions": camera,
        "chunk_plucker": r(1, 8, 4, 4, 4),
    }


def _wan_animate(r):
    return _image_to_video(
        r,
        channels=12,
        frames=21,
        size=4,
        pose_hidden_states=r(1, 4, 20, 4, 4),
        face_pixel_values=r(1, 3, 77, 16, 16),
    )


def _wan_animate_2(r):
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [r(4, 2, 4, 4)],
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": [r(6, 16)],
        "condition_latents": [r(4, 2, 4, 4)],
        "encoder_hidden_states_image": r(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }


WAN = {
    "CogVideoXTransformer3DModel": TinyModel(_COGVIDEO, _frames_first),
    "ConsisIDTransformer3DModel": TinyModel(
        dict(
            _COGVIDEO,
            cross_attn_interval=1,
            is_train_face=True,
            cross_attn_dim_head=4,
            cross_attn_num_heads=2,
            LFE_id_dim=6,
            LFE_vit_dim=6,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=1,
            LFE_num_querie=3,
            LFE_output_dim=10,
            LFE_ff_mult=1,
            LFE_num_scale=5,
        ),
        lambda r: _frames_first(r, id_vit_hidden=[r(1, 2, 6) for _ in range(5)], id_cond=r(1, 6)),
    ),
    "WanTransformer3DModel": TinyModel(_WAN, video),
    "WanTransformer3DModel/i2v": TinyModel(_WAN_I2V, _image_to_video),
    "WanVACETransformer3DModel": TinyModel(
        dict(_WAN, vace_layers=[0, 1], vace_in_channels=8), lambda r: video(r, control_hidden_states=r(1, 8, 2, 8, 8))
    ),
    "WanAnimateTransformer3DModel": TinyModel(
        dict(
            _WAN_I2V,
            in_channels=12,
            latent_channels=4,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        _wan_animate,
    ),
    "WanAnimate2Transformer3DModel": TinyModel(
        {
            "text_len": 8,
            "in_dim": 8,
            "dim": 32,
            "ffn_dim": 24,
            "freq_dim": 16,
            "text_dim": 16,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
        },
        _wan_animate_2,
    ),
    "ChronoEditTransformer3DModel": TinyModel(_WAN_I2V, _image_to_video),
    "SkyReelsV2Transformer3DModel": TinyModel(_WAN_I2V, _image_to_video),
    "AnyFlowTransformer3DModel": TinyModel(
        _WAN, lambda r: _frames_first(r, text=16, timestep=r.ints(1000, 1, 2), r_timestep=r.ints(500, 1, 2))
    ),
    "AnyFlowFARTransformer3DModel": TinyModel(dict(_WAN, attention_head_dim=16), _far),
    "HeliosTransformer3DModel": TinyModel(
        {key: value for key, value in _WAN.items() if key != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)}, _helios
    ),
    "LTXVideoTransformer3DModel": TinyModel(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
        lambda r: {
            "hidden_states": r(2, 32, 4),
            "encoder_hidden_states": r(2, 6, 12),
            "timestep": r.ints(1000, 2),
            "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "LTX2VideoTransformer3DModel": TinyModel(_LTX2, _ltx2),
    "LTX2VideoTransformer3DModel/gated": TinyModel(dict(_LTX2, gated_attn=True, audio_gated_attn=True), _ltx2),
    "SanaWMLTX2RefinerTransformer3DModel": TinyModel(dict(_LTX2, gated_attn=True), _refiner),
    "SanaVideoTransformer3DModel": TinyModel(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        video,
    ),
    "SanaWMTransformer3DModel": TinyModel(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 2,
        },
        _sana_wm,
    ),
    "CosmosTransformer3DModel": TinyModel(_COSMOS, lambda r: video(r, fps=24)),
    "CosmosTransformer3DModel/image": TinyModel(
        dict(_COSMOS, img_context_dim_in=10, img_context_num_tokens=5, img_context_dim_out=32), _cosmos_image
    ),
    "Cosmos3OmniTransformer": TinyModel(
        {
            "head_dim": 6,
            "hidden_size": 12,
            "intermediate_size": 20,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        _cosmos3,
    ),
}
