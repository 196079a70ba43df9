"""The original module names of image transformers, as ComfyUI, sd-scripts and their trainers keep them."""

from __future__ import annotations

from .originals import Original, block, rows

_SD3 = Original(
    block(
        "joint_blocks.{}",
        "transformer_blocks.{}",
        {
            "x_block.attn.qkv": rows("attn", "to_q to_k to_v"),
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": rows("attn2", "to_q to_k to_v"),
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": rows("attn", "add_q_proj add_k_proj add_v_proj"),
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear~2",
        },
    )
    | block(
        "",
        "",
        {
            "context_embedder": "context_embedder",
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear~",
            "final_layer.linear": "proj_out",
        },
    ),
    encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
)

_FLUX_ATTENTION = {
    "img_attn.qkv": rows("attn", "to_q to_k to_v"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": rows("attn", "add_q_proj add_k_proj add_v_proj"),
    "txt_attn.proj": "attn.to_add_out",
}
FLUX_BLOCKS = block(
    "double_blocks.{}",
    "transformer_blocks.{}",
    {
        **_FLUX_ATTENTION,
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
    },
) | block(
    "single_blocks.{}",
    "single_transformer_blocks.{}",
    {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
    },
)
_FLUX_ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
EMBEDDERS = {
    f"{there}_in.{layer}_layer": f"time_text_embed.{here}_embedder.linear_{n}"
    for there, here in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
    for layer, n in (("in", 1), ("out", 2))
}
_ADA = {"final_layer.adaLN_modulation.1": "norm_out.linear~"}
_FLUX = Original(
    FLUX_BLOCKS | block("", "", {**_FLUX_ENDS, **EMBEDDERS, **_ADA}),
    aliases=block(  # XLabs' trainer names its processors, not the Linears
        "double_blocks.{}.processor",
        "transformer_blocks.{}.attn",
        {
            "qkv_lora1": "to_q to_k to_v",
            "qkv_lora2": "add_q_proj add_k_proj add_v_proj",
            "proj_lora1": "to_out.0",
            "proj_lora2": "to_add_out",
        },
    )
    | block(
        "single_blocks.{}.processor",
        "single_transformer_blocks.{}",
        {"qkv_lora": "attn.to_q attn.to_k attn.to_v", "proj_lora": "proj_out"},
    )
    | block("single_blocks.{}", "single_transformer_blocks.{}", {"linear1_qkv": "attn.to_q attn.to_k attn.to_v"}),
    encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},  # sd-scripts keeps T5 at 3
)
_CHROMA = Original(
    FLUX_BLOCKS
    | block("", "", _FLUX_ENDS)
    | block(
        "distilled_guidance_layer",
        "distilled_guidance_layer",
        {
            "in_proj": "in_proj",
            "out_proj": "out_proj",
            "layers.{}.in_layer": "layers.{}.linear_1",
            "layers.{}.out_layer": "layers.{}.linear_2",
        },
    ),
    encoders={"text_encoder": "lora_te1"},
)
_FLUX_2 = Original(
    block(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            **_FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    )
    | block(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    )
    | block(
        "",
        "",
        {
            **_FLUX_ENDS,
            **_ADA,
            **{there: here.replace("time_text", "time_guidance") for there, here in EMBEDDERS.items()},
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
        },
    ),
)

_PIXART = Original(
    block(
        "blocks.{}",
        "transformer_blocks.{}",
        {
            "attn.qkv": rows("attn1", "to_q to_k to_v"),
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.kv_linear": rows("attn2", "to_k to_v"),
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    )
    | block(
        "",
        "",
        {
            "x_embedder.proj": "pos_embed.proj",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "t_block.1": "adaln_single.linear",
            "final_layer.linear": "proj_out",
            **{
                f"{there}_embedder.mlp.{2 * n - 2}": f"adaln_single.emb.{here}_embedder.linear_{n}"
                for there, here in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio"))
                for n in (1, 2)
            },
        },
    ),
    encoders={"text_encoder": "lora_te1"},
)

_AURA_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_AURAFLOW = Original(
    block(
        "double_layers.{}",
        "joint_transformer_blocks.{}",
        {
            **{f"attn.w2{x}": f"attn.to_{x}" for x in "qkv"},
            **{f"attn.w1{x}": f"attn.add_{x}_proj" for x in "qkv"},
            "attn.w2o": "attn.to_out.0",
            "attn.w1o": "attn.to_add_out",
            **{f"mlpX.{there}": f"ff.{here}" for there, here in _AURA_MLP.items()},
            **{f"mlpC.{there}": f"ff_context.{here}" for there, here in _AURA_MLP.items()},
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
        },
    )
    | block(
        "single_layers.{}",
        "single_transformer_blocks.{}",
        {
            **{f"attn.w1{x}": f"attn.to_{x}" for x in "qkv"},
            "attn.w1o": "attn.to_out.0",
            **{f"mlp.{there}": f"ff.{here}" for there, here in _AURA_MLP.items()},
            "modCX.1": "norm1.linear",
        },
    )
    | block(
        "",
        "",
        {
            "init_x_linear": "pos_embed.proj",
            "cond_seq_linear": "context_embedder",
            "t_embedder.mlp.0": "time_step_proj.linear_1",
            "t_embedder.mlp.2": "time_step_proj.linear_2",
            "modF.1": "norm_out.linear~",
            "final_linear": "proj_out",
        },
    ),
)

_HUNYUAN_DIT = Original(
    block(
        "blocks.{}",
        "blocks.{}",
        {
            "attn1.Wqkv": rows("attn1", "to_q to_k to_v"),
            "attn1.out_proj": "attn1.to_out.0",
            "attn2.q_proj": "attn2.to_q",
            "attn2.kv_proj": rows("attn2", "to_k to_v"),
            "attn2.out_proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "default_modulation.1": "norm1.linear",
            "skip_linear": "skip_linear",
        },
    )
    | block("pooler", "time_extra_emb.pooler", {f"{x}_proj": f"{x}_proj" for x in "qkvc"})
    | block(
        "",
        "",
        {
            "mlp_t5.0": "text_embedder.linear_1",
            "mlp_t5.2": "text_embedder.linear_2",
            "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
            "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
            "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
            "x_embedder.proj": "pos_embed.proj",
            **_ADA,
            "final_layer.linear": "proj_out",
        },
    ),
    encoders={"text_encoder": "lora_te1"},
)

_REFINED = ("noise_refiner.{}", "context_refiner.{}", "layers.{}")
_LUMINA_2 = Original(
    {
        name: paths
        for layers in _REFINED
        for name, paths in block(
            layers,
            layers,
            {
                "attention.qkv": rows("attn", "to_q to_k to_v"),
                "attention.out": "attn.to_out.0",
                **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
                "adaLN_modulation.1": "norm1.linear",
            },
        ).items()
    }
    | block(
        "",
        "",
        {
            "x_embedder": "x_embedder",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        },
    ),
)
_Z_IMAGE = Original(
    {
        name: paths
        for layers in (*_REFINED, "siglip_refiner.{}")
        for name, paths in block(
            layers,
            layers,
            {"attention.qkv": rows("attention", "to_q to_k to_v"), "attention.out": "attention.to_out.0"},
        ).items()
    }
    | block(
        "",
        "",
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        },
    ),
    same=True,
)
_IDEOGRAM_4 = Original(
    block(
        "layers.{}.attention",
        "layers.{}.attention",
        {"qkv": "to_q to_k to_v", "o": "to_out.0"},
    ),
    same=True,
)

_KREA_BLOCK = {
    **{f"attn.w{x}": f"attn.to_{x}" for x in "qkv"},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{x}": f"ff.{x}" for x in ("gate", "up", "down")},
}
_KREA_2 = Original(
    block("blocks.{}", "transformer_blocks.{}", _KREA_BLOCK)
    | block("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", _KREA_BLOCK)
    | block("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", _KREA_BLOCK)
    | block(
        "",
        "",
        {
            "first": "img_in",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
            "last.linear": "final_layer.linear",
        },
    ),
)

SAME = Original({}, same=True)
_UNET = Original({}, same=True, encoders={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"})

IMAGE = {
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX_2,
    "PixArtTransformer2DModel": _PIXART,
    "AuraFlowTransformer2DModel": _AURAFLOW,
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "Lumina2Transformer2DModel": _LUMINA_2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "Ideogram4Transformer2DModel": _IDEOGRAM_4,
    "Krea2Transformer2DModel": _KREA_2,
    "QwenImageTransformer2DModel": SAME,
    "QwenImage21Transformer2DModel": SAME,
    "HiDreamImageTransformer2DModel": SAME,
    "ErnieImageTransformer2DModel": SAME,
    "UNet2DConditionModel": _UNET,
}
