"""Language and speech models of transformers, tiny and random: a forward in milliseconds, no download."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.tiny.base import Draw
from tests.tiny.vision import TinyVision, hugging_face, tokens

_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_LLM = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 49,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


_SIDES = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}


def _decoder(name: str, **more: Any) -> TinyVision:
    return hugging_face(f"{name}ForCausalLM", {**_LLM, **more}, tokens)


def _with_encoder(draw: Draw) -> dict[str, Any]:
    """Tokens of a decoder that attends to an encoder's states."""
    return {**tokens(draw), "encoder_hidden_states": draw(2, 5, 16)}


def _seq2seq(draw: Draw) -> dict[str, Any]:
    return {**tokens(draw), "decoder_input_ids": draw.ints(48, 2, 5)}


def _images_of_qwen(draw: Draw) -> dict[str, Any]:
    """Two images of 4 x 4 patches, flat, and how many there are each way."""
    return {"hidden_states": draw(32, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _text_and_images(draw: Draw) -> dict[str, Any]:
    """One image of 4 x 4 patches, four tokens of the text, in each of two sequences."""
    ids = draw.ints(40, 2, 9)
    ids[:, 2:6] = _VL["image_token_id"]
    return {
        "input_ids": ids,
        "pixel_values": draw(32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == _VL["image_token_id"]).long(),
    }


_DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Ministral": {"sliding_window": 4},
    "Ministral3": {},
    "Mixtral": _EXPERTS,
    "Qwen2": {},
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 2},
    "Qwen3": {},
    "Qwen3Moe": {**_EXPERTS, "decoder_sparse_step": 2},
    "Gemma": {},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "Gemma3": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "VaultGemma": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "SmolLM3": {},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 4},
    "Granite": {},
    "Cohere": {},
    "Cohere2": {"sliding_window": 4},
    "StableLm": {},
    "Helium": {},
    "Exaone4": {"sliding_window": 4},
    "SeedOss": {},
    "Ernie4_5": {},
    "HunYuanDenseV1": {},
    "GptOss": {**_EXPERTS, "sliding_window": 4},
    "Phimoe": _EXPERTS,
    "Glm": {},
    "Glm4": {},
    "Phi3": {},
    "Phi": {"num_key_value_heads": 2},
    "Starcoder2": {},
    "Nemotron": {},
    "GPTNeoX": {},
    "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4},
    "Bloom": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_VL = {"image_token_id": 45, "video_token_id": 46, "vision_start_token_id": 44, "vision_end_token_id": 43}
_TOWER = {
    **{"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
    **{"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "image_size": 16},
}
_SMALL_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_T5GEMMA = {**_LLM, "sliding_window": 4, "query_pre_attn_scalar": 8}
_PE = {**_LLM, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 49}
_BERT = {**_LLM, "type_vocab_size": 2}

_ALL: dict[str, TinyVision] = {
    **{f"{name}ForCausalLM": _decoder(name, **config) for name, config in _DECODERS.items()},
    "GPT2LMHeadModel": hugging_face("GPT2LMHeadModel", _GPT2, tokens),
    "GPT2LMHeadModel/cross": hugging_face("GPT2LMHeadModel", {**_GPT2, "add_cross_attention": True}, _with_encoder),
    "GPTBigCodeForCausalLM": hugging_face("GPTBigCodeForCausalLM", _GPT2, tokens),
    **{
        f"{name}ForMaskedLM": hugging_face(f"{name}ForMaskedLM", _BERT, tokens)
        for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
    },
    "BertLMHeadModel/cross": hugging_face(
        "BertLMHeadModel", {**_BERT, "is_decoder": True, "add_cross_attention": True}, _with_encoder
    ),
    "DistilBertForMaskedLM": hugging_face(
        "DistilBertForMaskedLM", {**_LLM, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}, tokens
    ),
    "ModernBertForMaskedLM": hugging_face(
        "ModernBertForMaskedLM", {**_LLM, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, tokens
    ),
    "ChineseCLIPTextModel": hugging_face("ChineseCLIPTextModel", _BERT, tokens),
    "ClapTextModelWithProjection": hugging_face("ClapTextModelWithProjection", _BERT, tokens),
    "WhisperForConditionalGeneration": hugging_face(
        "WhisperForConditionalGeneration",
        {
            **{"vocab_size": 50, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 6},
            **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIDES.items()},
            **{"max_target_positions": 16, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 49},
            **{"bos_token_id": 1},
        },
        lambda draw: {"input_features": draw(2, 8, 12), "decoder_input_ids": draw.ints(48, 2, 5)},
    ),
    **{
        name: hugging_face(
            name,
            {
                **{"vocab_size": 50, "d_model": 16, "max_position_embeddings": 64, "decoder_start_token_id": 2},
                **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIDES.items()},
                **{"pad_token_id": 0},
            },
            _seq2seq,
        )
        for name in ("BartModel", "MBartModel", "MarianModel", "M2M100Model")
    },
    **{
        name: hugging_face(name, {**_LLM, **_MROPE, **_EXPERTS}, tokens)
        for name in (
            *("Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLTextModel", "Qwen3VLMoeTextModel"),
            *("Glm4vTextModel", "GlmImageTextModel"),
        )
    },
    "Qwen2VLModel": hugging_face(
        "Qwen2VLModel",
        {**_VL, "text_config": {**_LLM, **_MROPE}, "vision_config": {**_TOWER, "embed_dim": 16, "mlp_ratio": 2}},
        _text_and_images,
    ),
    "Qwen2_5_VLModel": hugging_face(
        "Qwen2_5_VLModel",
        {
            **_VL,
            "text_config": {**_LLM, **_MROPE},
            "vision_config": {**_TOWER, "window_size": 8, "fullatt_block_indexes": [1]},
        },
        _text_and_images,
    ),
    **{
        name: hugging_face(
            name, {**_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, _images_of_qwen
        )
        for name in ("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel")
    },
    "Glm4vVisionModel": hugging_face("Glm4vVisionModel", _TOWER, _images_of_qwen),
    "GlmImageVisionModel": hugging_face(
        "GlmImageVisionModel",
        _TOWER,
        lambda draw: {"pixel_values": draw(32, 3 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]] * 2)},
    ),
    "PixtralVisionModel": hugging_face(
        "PixtralVisionModel",
        {**_LLM, "image_size": 16, "patch_size": 4},
        lambda draw: {"pixel_values": draw(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "Gemma4ForCausalLM": _decoder(
        "Gemma4",
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "sliding_window": 4},
        **{"vocab_size_per_layer_input": 50, "global_head_dim": 8, "num_global_key_value_heads": 1},
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "Gemma4UnifiedForCausalLM": _decoder("Gemma4Unified", sliding_window=4, global_head_dim=8),
    "Phi4MultimodalModel": hugging_face(
        "Phi4MultimodalModel", {**_LLM, "vision_config": _SMALL_TOWER, "audio_config": _SMALL_TOWER}, tokens
    ),
    "T5GemmaModel": hugging_face("T5GemmaModel", {"encoder": _T5GEMMA, "decoder": _T5GEMMA}, _seq2seq),
    "T5Gemma2Model": hugging_face(
        "T5Gemma2Model",
        {
            "encoder": {
                "text_config": _T5GEMMA,
                "vision_config": _SMALL_TOWER,
            },
            "decoder": _T5GEMMA,
        },
        _seq2seq,
    ),
    "T5EncoderModel": hugging_face("T5EncoderModel", _T5, tokens),
    "T5EncoderModel/gated": hugging_face("T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}, tokens),
    "T5Model": hugging_face(
        "T5Model", {**_T5, "decoder_start_token_id": 0}, lambda d: {**tokens(d), "decoder_input_ids": d.ints(48, 2, 5)}
    ),
    "MT5EncoderModel": hugging_face("MT5EncoderModel", _T5, tokens),
    "UMT5EncoderModel": hugging_face("UMT5EncoderModel", _T5, tokens),
    "UMT5Model": hugging_face(
        "UMT5Model",
        {**_T5, "decoder_start_token_id": 0},
        lambda d: {**tokens(d), "decoder_input_ids": d.ints(48, 2, 5)},
    ),
}

TEXT = {name: tiny for name, tiny in _ALL.items() if hasattr(transformers, name.partition("/")[0])}
