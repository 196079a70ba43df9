"""The original module names of video and audio transformers, as ComfyUI, musubi-tuner and their trainers keep them."""

from __future__ import annotations

from .names_image import EMBEDDERS, FLUX_BLOCKS, SAME
from .originals import Original, block, rows, spelled

_WAN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_WAN = Original(
    block("blocks.{}", "blocks.{}", _WAN_BLOCK)
    | block("vace_blocks.{}", "vace_blocks.{}", {**_WAN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"})
    | block(
        "face_adapter.fuser_blocks.{}",
        "face_adapter.{}",
        {"linear1_q": "to_q", "linear1_kv": "to_k to_v", "linear2": "to_out"},
    )
    | block(
        "",
        "",
        {
            "patch_embedding": "patch_embedding",
            "pose_patch_embedding": "pose_patch_embedding",
            "vace_patch_embedding": "vace_patch_embedding",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "head.head": "proj_out",
            "face_encoder.out_proj": "face_encoder.out_proj",
        },
    )
)

_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
_HUNYUAN = (
    FLUX_BLOCKS
    | block(
        "txt_in.individual_token_refiner.blocks.{}",
        _REFINER,
        {
            "self_attn.qkv": rows("attn", "to_q to_k to_v"),
            "self_attn.proj": "attn.to_out.0",
            "mlp.0": "ff.net.0.proj",
            "mlp.2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
    )
    | block(
        "",
        "",
        {
            **EMBEDDERS,
            "img_in.proj": "x_embedder.proj",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "txt_in.t_embedder.in_layer": "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.out_layer": "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.c_embedder.in_layer": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.out_layer": "context_embedder.time_text_embed.text_embedder.linear_2",
            "byt5_in.fc1": "context_embedder_2.linear_1",
            "byt5_in.fc2": "context_embedder_2.linear_2",
            "byt5_in.fc3": "context_embedder_2.linear_3",
            "vision_in.proj.1": "image_embedder.linear_1",
            "vision_in.proj.3": "image_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear~",
            "final_layer.linear": "proj_out",
        },
    )
)
# What Tencent's own code calls them; ComfyUI renames a checkpoint when it loads it.
_HUNYUAN_SPELLINGS = {
    "_attn.qkv": "_attn_qkv",
    "_attn.proj": "_attn_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "_mod.lin": "_mod.linear",
    "modulation.lin": "modulation.linear",
    "time_in.in_layer": "time_in.mlp.0",
    "time_in.out_layer": "time_in.mlp.2",
    "guidance_in.in_layer": "guidance_in.mlp.0",
    "guidance_in.out_layer": "guidance_in.mlp.2",
    "t_embedder.in_layer": "t_embedder.mlp.0",
    "t_embedder.out_layer": "t_embedder.mlp.2",
    "c_embedder.in_layer": "c_embedder.linear_1",
    "c_embedder.out_layer": "c_embedder.linear_2",
}
_TIME_IN = {"time_in.in_layer": 1, "time_in.out_layer": 2}


def _hunyuan(timestep: str, **encoders: str) -> Original:
    names = _HUNYUAN | {name: (f"{timestep}.timestep_embedder.linear_{n}",) for name, n in _TIME_IN.items()}
    return Original(names, aliases=spelled(names, _HUNYUAN_SPELLINGS), encoders=encoders)


_MOCHI_FF = {"w1": "net.0.proj~", "w2": "net.2"}
_MOCHI = Original(
    block(
        "blocks.{}",
        "transformer_blocks.{}",
        {
            "attn.qkv_x": rows("attn1", "to_q to_k to_v"),
            "attn.qkv_y": rows("attn1", "add_q_proj add_k_proj add_v_proj"),
            "attn.proj_x": "attn1.to_out.0",
            "attn.proj_y": "attn1.to_add_out",
            **{f"mlp_x.{there}": f"ff.{here}" for there, here in _MOCHI_FF.items()},
            **{f"mlp_y.{there}": f"ff_context.{here}" for there, here in _MOCHI_FF.items()},
            "mod_x": "norm1.linear",
            "mod_y": "norm1_context.linear",
        },
    )
    | block(
        "",
        "",
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
            "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
            "t5_y_embedder.to_q": "time_embed.pooler.to_q",
            "t5_y_embedder.to_out": "time_embed.pooler.to_out",
            "t5_yproj": "time_embed.caption_proj",
            "final_layer.mod": "norm_out.linear~",
            "final_layer.linear": "proj_out",
        },
    ),
    aliases=block("blocks.{}", "transformer_blocks.{}", {"mod_y": "norm1_context.linear_1"}),  # of the last block
)

_LTX = Original(
    {},
    same=True,
    renamed={
        "proj_in": "patchify_proj",
        "audio_proj_in": "audio_patchify_proj",
        "time_embed.": "adaln_single.",
        "audio_time_embed.": "audio_adaln_single.",
        "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
        "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
        "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
        "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
        "prompt_adaln.": "prompt_adaln_single.",
        "audio_prompt_adaln.": "audio_prompt_adaln_single.",
    },
)

_COGVIDEOX = Original(
    block(
        "blocks.{}",
        "transformer_blocks.{}",
        {
            "q": "attn1.to_q",
            "k": "attn1.to_k",
            "v": "attn1.to_v",
            "attn_out": "attn1.to_out.0",
            "ff_proj": "ff.net.0.proj",
            "ff_out": "ff.net.2",
        },
    ),
    same=True,
    renamed={"transformer_blocks.": "blocks."},
)

_COSMOS_BLOCK = {
    **{f"self_attn.{x}_proj": f"attn1.to_{x}" for x in "qkv"},
    "self_attn.output_proj": "attn1.to_out.0",
    **{f"cross_attn.{x}_proj": f"attn2.to_{x}" for x in "qkv"},
    "cross_attn.output_proj": "attn2.to_out.0",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{there}.{n}": f"{here}.linear_{n}"
        for there, here in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
        for n in (1, 2)
    },
}
_COSMOS_ENDS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
}
_COSMOS = Original(  # Predict 2 and Anima; the first Cosmos has other names
    block("blocks.{}", "transformer_blocks.{}", _COSMOS_BLOCK) | block("", "", _COSMOS_ENDS),
    requires={"extra_pos_embed_type": None},
)

_H3_BLOCK = {
    "attn.qkv_proj": rows("attn", "to_q to_k to_v"),
    "attn.out_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj~",
    "mlp.fc2": "ff.net.2",
    "adaln_proj.linear": "adaln_proj.linear",
}
_MINIMAX_H3 = Original(
    block("blocks.{}", "transformer_blocks.{}", _H3_BLOCK)
    | block("token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}", _H3_BLOCK)
    | block(
        "",
        "",
        {
            "video_patch_proj": "proj_in",
            "audio_patch_proj": "audio_proj_in",
            "condition_proj": "context_embedder",
            "time_embedder.proj_in": "time_embedder.linear_1",
            "time_embedder.proj_out": "time_embedder.linear_2",
            "final_layer.adaln_proj.linear": "norm_out.linear",
            "final_layer.video_out": "proj_out",
            "final_layer.audio_out": "audio_proj_out",
        },
    )
)

_ACE_ATTENTION = {**{f"{x}_proj": f"to_{x}" for x in "qkv"}, "o_proj": "to_out.0"}
_ACE_BLOCK = {
    f"{attention}.{there}": f"{attention}.{here}"
    for attention in ("self_attn", "cross_attn")
    for there, here in _ACE_ATTENTION.items()
} | {f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_ACE_STEP = Original(
    block("decoder.layers.{}", "layers.{}", _ACE_BLOCK), aliases=block("layers.{}", "layers.{}", _ACE_BLOCK)
)

_STABLE_AUDIO = Original(
    block(
        "transformer.layers.{}",
        "transformer_blocks.{}",
        {
            "self_attn.to_qkv": rows("attn1", "to_q to_k to_v"),
            "self_attn.to_out": "attn1.to_out.0",
            "cross_attn.to_q": "attn2.to_q",
            "cross_attn.to_kv": rows("attn2", "to_k to_v"),
            "cross_attn.to_out": "attn2.to_out.0",
            "ff.ff.0.proj": "ff.net.0.proj",
            "ff.ff.2": "ff.net.2",
        },
    )
)

VIDEO = {
    **dict.fromkeys(
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        _WAN,
    ),
    "HunyuanVideoTransformer3DModel": _hunyuan("time_text_embed", text_encoder_2="lora_te1"),
    "HunyuanVideo15Transformer3DModel": _hunyuan("time_embed"),
    "HunyuanImageTransformer2DModel": _hunyuan("time_guidance_embed"),
    "MochiTransformer3DModel": _MOCHI,
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _LTX,
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "CosmosTransformer3DModel": _COSMOS,
    "Kandinsky5Transformer3DModel": SAME,
    "MiniMaxH3Transformer3DModel": _MINIMAX_H3,
    "AceStepTransformer1DModel": _ACE_STEP,
    "StableAudioDiTModel": _STABLE_AUDIO,
}
