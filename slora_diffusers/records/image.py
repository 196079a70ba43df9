"""Records of the image transformers in diffusers, and of the general-purpose ones."""

from __future__ import annotations

from .base import (
    BOTH,
    BOTH_IN,
    CROSS,
    ENCODER_FEED_FORWARD,
    FEED_FORWARD,
    JOINT,
    QKV,
    SELF,
    SELF_CROSS,
    SELF_IN,
    SINGLE,
    TEXT_AND_IMAGE,
    Architecture,
    blocks,
    output,
    reads,
    swiglu,
)

_SPLIT_MLP = swiglu("linear_1 linear_2")
_SPLIT_ENCODER_MLP = swiglu("linear_1 linear_2", name="encoder_feed_forward")
_LUMINA_MLP = swiglu("linear_1 linear_3")
_W_MLP = swiglu("w1 w3")
_FLUX_3 = {"attn": SELF, "ff": output("linear_in", "feed_forward")}
_KREA = {
    "attn": (reads(f"{QKV} to_gate", "hidden_states"), *output("to_out.0")),
    "ff": swiglu("gate up", "hidden_states"),
}
_HIDREAM = (reads(QKV, "norm_hidden_states", name="hidden_states"), *output("to_out"))
_HIDREAM_TEXT = (
    reads("to_q_t to_k_t to_v_t", "norm_encoder_hidden_states", name="encoder_hidden_states"),
    *output("to_out_t", "encoder_attention_output"),
)
_BASIC = {"only_cross_attention": False, "double_self_attention": False}

RECORDS = (
    Architecture("DiT", ("DiTTransformer2DModel",), blocks("transformer_blocks", attn1=SELF, ff=FEED_FORWARD)),
    Architecture("PixArt-alpha / Sigma", ("PixArtTransformer2DModel",), SELF_CROSS),
    Architecture(
        "Stable Diffusion 3 / 3.5",
        ("SD3Transformer2DModel",),
        {**TEXT_AND_IMAGE, **blocks("transformer_blocks", attn2=SELF)},
    ),
    Architecture(
        "Flux.1, Chroma, Bria 3.2, Fibo, Ovis-Image, LongCat-Image",
        (
            "FluxTransformer2DModel",
            "ChromaTransformer2DModel",
            "BriaTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "OvisImageTransformer2DModel",
            "LongCatImageTransformer2DModel",
        ),
        {**TEXT_AND_IMAGE, **blocks("single_transformer_blocks", attn=SELF_IN), **SINGLE},
    ),
    Architecture(
        "Bria Fibo 2",
        ("BriaFibo2Transformer2DModel",),
        {
            **blocks("noise_refiner", attention=SELF, feed_forward=_W_MLP),
            **blocks("layers", attention=SELF, cross_attention=CROSS, feed_forward=_W_MLP),
            **blocks("perceiver.layers", cross_attention=CROSS, self_attention=SELF, ffn=_W_MLP),
        },
    ),
    Architecture(
        "Flux.2",
        ("Flux2Transformer2DModel",),
        {
            **blocks(
                "transformer_blocks",
                attn=JOINT,
                ff=output("linear_in", "feed_forward"),
                ff_context=output("linear_in", "encoder_feed_forward"),
            ),
            **blocks("single_transformer_blocks", attn=(reads("to_qkv_mlp_proj", "hidden_states"), *output("to_out"))),
        },
        "single blocks: one Linear for q, k, v and the MLP",
    ),
    Architecture(
        "Flux.3",
        ("Flux3Transformer2DModel",),
        {
            **blocks("txt_mode_blocks", **_FLUX_3),
            **blocks("mode_blocks.*", **_FLUX_3),
            **blocks("single_transformer_blocks", **_FLUX_3),
        },
    ),
    Architecture(
        "Sana",
        ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
        blocks("transformer_blocks", attn1=SELF, attn2=CROSS),
        "the MLP is convolutional: no `feed_forward`",
    ),
    Architecture(
        "AuraFlow",
        ("AuraFlowTransformer2DModel",),
        {
            **blocks("joint_transformer_blocks", attn=JOINT, ff=_SPLIT_MLP, ff_context=_SPLIT_ENCODER_MLP),
            **blocks("single_transformer_blocks", attn=SELF, ff=_SPLIT_MLP),
        },
    ),
    Architecture(
        "Hunyuan-DiT",
        ("HunyuanDiT2DModel",),
        blocks("blocks", attn1=SELF, attn2=CROSS, ff=FEED_FORWARD),
        "the text pooler adds positions before it projects: it stays as it is",
    ),
    Architecture(
        "Lumina 2",
        ("Lumina2Transformer2DModel",),
        {
            **blocks("noise_refiner", attn=BOTH, feed_forward=_LUMINA_MLP),
            **blocks("context_refiner", attn=BOTH, feed_forward=_LUMINA_MLP),
            **blocks("layers", attn=BOTH, feed_forward=_LUMINA_MLP),
        },
    ),
    Architecture(
        "Lumina-Next",
        ("LuminaNextDiT2DModel",),
        blocks("layers", attn1=BOTH_IN, attn2=CROSS, feed_forward=_LUMINA_MLP),
        "both attentions share the output projection of `attn2`",
    ),
    Architecture(
        "Z-Image",
        ("ZImageTransformer2DModel",),
        {
            **blocks("noise_refiner", attention=SELF, feed_forward=_W_MLP),
            **blocks("context_refiner", attention=SELF, feed_forward=_W_MLP),
            **blocks("siglip_refiner", attention=SELF, feed_forward=_W_MLP),
            **blocks("layers", attention=SELF, feed_forward=_W_MLP),
        },
    ),
    Architecture(
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        blocks("transformer_blocks", attn=JOINT, img_mlp=FEED_FORWARD, txt_mlp=ENCODER_FEED_FORWARD),
    ),
    Architecture(
        "Qwen-Image 2.1",
        ("QwenImage21Transformer2DModel",),
        blocks("transformer_blocks", attn=SELF, img_mlp=swiglu("proj gate_layer", "hidden_states")),
    ),
    Architecture(
        "Nucleus-Image",
        ("NucleusMoEImageTransformer2DModel",),
        blocks(
            "transformer_blocks",
            attn=(*SELF, reads("add_k_proj add_v_proj", "encoder_hidden_states")),
            img_mlp=FEED_FORWARD,
        ),
        "`feed_forward` in the dense blocks only, not in the experts",
    ),
    Architecture(
        "CogView 3+, CogView 4, GLM-Image",
        ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel", "GlmImageTransformer2DModel"),
        blocks("transformer_blocks", attn1=BOTH, ff=FEED_FORWARD),
    ),
    Architecture(
        "ERNIE-Image",
        ("ErnieImageTransformer2DModel",),
        blocks("layers", self_attention=SELF, mlp=swiglu("gate_proj up_proj")),
    ),
    Architecture(
        "HiDream-I1",
        ("HiDreamImageTransformer2DModel",),
        {
            "double_stream_blocks.*.block.attn1": _HIDREAM + _HIDREAM_TEXT,
            "double_stream_blocks.*.block.ff_i.shared_experts": _W_MLP,
            "double_stream_blocks.*.block.ff_t": swiglu("w1 w3", name="encoder_feed_forward"),
            "single_stream_blocks.*.block.attn1": _HIDREAM,
            "single_stream_blocks.*.block.ff_i.shared_experts": _W_MLP,
        },
        "`feed_forward` in the shared expert only",
    ),
    Architecture("Ideogram 4", ("Ideogram4Transformer2DModel",), blocks("layers", attention=SELF, feed_forward=_W_MLP)),
    Architecture(
        "Krea 2",
        ("Krea2Transformer2DModel",),
        {
            **blocks("transformer_blocks", **_KREA),
            **blocks("text_fusion.layerwise_blocks", **_KREA),
            **blocks("text_fusion.refiner_blocks", **_KREA),
        },
        "the gate reads the same input, so the pair feeds it too",
    ),
    Architecture(
        "OmniGen",
        ("OmniGenTransformer2DModel",),
        blocks("layers", self_attn=BOTH, mlp=output("gate_up_proj", "feed_forward")),
    ),
    Architecture(
        "PRX",
        ("PRXTransformer2DModel",),
        {
            "blocks.*.attention": (
                reads("img_qkv_proj", "hidden_states"),
                reads("txt_kv_proj", "encoder_hidden_states"),
                *output("to_out.0"),
            ),
            "blocks.*": (reads("gate_proj up_proj", name="feed_forward"),),
        },
    ),
    Architecture(
        "Transformer2DModel",
        ("Transformer2DModel", "DreamLiteTransformer2DModel"),
        SELF_CROSS,
        "also inside UNets (Stable Diffusion 1, 2, XL; DreamLite)",
        requires=_BASIC,
    ),
    Architecture(
        "DualTransformer2DModel",
        ("DualTransformer2DModel",),
        {f"transformers.*.{path}": pairs for path, pairs in SELF_CROSS.items()},
    ),
    Architecture(
        "unCLIP and Kandinsky 2 priors",
        ("PriorTransformer",),
        blocks("transformer_blocks", attn1=SELF, ff=FEED_FORWARD),
    ),
)
