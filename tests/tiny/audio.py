"""Tiny configurations and inputs of the audio and molecule transformers in diffusers; see tiny_models.py."""

from __future__ import annotations

import torch

from tests.tiny.base import TinyModel

_STABLE_AUDIO_3 = {
    "io_channels": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "cond_token_dim": 16,
    "global_cond_dim": 12,
    "local_add_cond_dim": 5,
    "timestep_features_dim": 16,
    "ff_mult": 2,
    "num_memory_tokens": 3,
}


def _ace_step(r):
    return {
        "hidden_states": r(2, 8, 8),
        "timestep": r(2).abs(),
        "timestep_r": r(2).abs(),
        "encoder_hidden_states": r(2, 10, 24),
        "context_latents": r(2, 8, 16),
    }


def _stable_audio(r):
    return {
        "hidden_states": r(2, 4, 6),
        "timestep": r(2).abs(),
        "encoder_hidden_states": r(2, 5, 12),
        "global_hidden_states": r(2, 1, 10),
        "rotary_embedding": (torch.ones(7, 8), torch.zeros(7, 8)),
    }


def _stable_audio_3(r):
    return {
        "hidden_states": r(2, 8, 6),
        "timestep": r(2).abs(),
        "encoder_hidden_states": r(2, 5, 16),
        "global_hidden_states": r(2, 12),
    }


def _longcat(r):
    return {
        "hidden_states": r(1, 6, 8),
        "encoder_hidden_states": r(1, 5, 12),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "timestep": torch.ones(1),
    }


def _molecule(r):
    tokens = torch.ones(1, 6, dtype=torch.bool)
    return {
        "bb_ca": r(1, 6, 3),
        "local_latents": r(1, 6, 4),
        "bb_ca_time": torch.tensor([0.3]),
        "local_latents_time": torch.tensor([0.6]),
        "padding_mask": tokens,
        "conditioning": {"is_in_context_conditioning": ~tokens, "supports_local_latent": tokens},
    }


AUDIO = {
    "AceStepTransformer1DModel": TinyModel(
        {
            "hidden_size": 32,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 16,
            "encoder_hidden_size": 24,
        },
        _ace_step,
    ),
    "StableAudioDiTModel": TinyModel(
        {
            "sample_size": 6,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 20,
            "time_proj_dim": 8,
            "global_states_input_dim": 10,
            "cross_attention_input_dim": 12,
        },
        _stable_audio,
    ),
    "StableAudio3DiTModel": TinyModel(dict(_STABLE_AUDIO_3, use_differential_attention=True), _stable_audio_3),
    "StableAudio3DiTModel/plain": TinyModel(dict(_STABLE_AUDIO_3, use_differential_attention=False), _stable_audio_3),
    "LongCatAudioDiTTransformer": TinyModel(
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 4,
            "dit_text_dim": 12,
            "latent_dim": 8,
            "text_conv": False,
            "use_latent_condition": False,
        },
        _longcat,
    ),
    "MiniMaxMusic3Transformer1DModel": TinyModel(
        {
            "in_channels": 8,
            "condition_dim": 12,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 20,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda r: {"hidden_states": r(1, 8, 6), "encoder_hidden_states": r(1, 6, 12), "timestep": torch.tensor([0.5])},
    ),
    "MiniMaxMusic3RVQDepthDecoder": TinyModel(
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "audio_vocab_size": 12,
            "num_codebooks": 3,
            "max_position_embeddings": 8,
        },
        lambda r: {"inputs_embeds": r(2, 3, 16)},
    ),
    "T5FilmDecoder": TinyModel(
        {"input_dims": 8, "targets_length": 6, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 20},
        lambda r: {
            "encodings_and_masks": [(r(2, 5, 16), torch.ones(2, 5))],
            "decoder_input_tokens": r(2, 6, 8),
            "decoder_noise_time": torch.tensor([0.3, 0.6]),
        },
    ),
    "RFD4ProteinaTransformer": TinyModel(
        {
            "nlayers": 2,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 12,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "t_emb_dim": 8,
            "xt_pair_dist_dim": 5,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
            "num_sequence_classes": 5,
        },
        _molecule,
    ),
}
