"""Records of the video transformers in diffusers."""

from __future__ import annotations

from .base import (
    BOTH,
    BOTH_IN,
    CROSS,
    ENCODER_FEED_FORWARD,
    FEED_FORWARD,
    JOINT,
    JOINT_OR_BOTH,
    QKV,
    SELF,
    SELF_CROSS,
    SINGLE,
    TEXT_AND_IMAGE,
    Architecture,
    blocks,
    cross,
    output,
    reads,
    swiglu,
)

# Image-to-video models put the image tokens into encoder_hidden_states, in front of the text, and give them
# projections of their own.
_WAN_CROSS = cross("to_q", "to_k to_v add_k_proj add_v_proj", "to_out.0")
_WAN = blocks("blocks", attn1=SELF, attn2=_WAN_CROSS, ffn=FEED_FORWARD)
_GATED_SELF = (reads(f"{QKV} to_gate_logits", "hidden_states"), *output("to_out.0"))
_GATED_CROSS = cross("to_q to_gate_logits", "to_k to_v", "to_out.0")
_LTX_2 = blocks("transformer_blocks", attn1=_GATED_SELF, attn2=_GATED_CROSS, ff=FEED_FORWARD)
_REFINER = blocks("context_embedder.token_refiner.refiner_blocks", attn=SELF, ff=FEED_FORWARD)
_HUNYUAN = {**TEXT_AND_IMAGE, **blocks("single_transformer_blocks", attn=BOTH_IN), **SINGLE, **_REFINER}
_JOY = {
    "attn": (
        reads("img_attn_qkv", "hidden_states"),
        reads("txt_attn_qkv", "encoder_hidden_states"),
        *output("img_attn_proj"),
        *output("txt_attn_proj", "encoder_attention_output"),
    ),
    "img_mlp": FEED_FORWARD,
    "txt_mlp": ENCODER_FEED_FORWARD,
}
_KANDINSKY_SELF = (reads("to_query to_key to_value", "hidden_states"), *output("out_layer"))
_KANDINSKY_CROSS = cross("to_query", "to_key to_value", "out_layer")
_KANDINSKY_5 = {"self_attention": _KANDINSKY_SELF, "feed_forward": output("in_layer", "feed_forward")}
_KANDINSKY_6 = {"self_attention": _KANDINSKY_SELF, "cross_attention": _KANDINSKY_CROSS, "feed_forward": FEED_FORWARD}
# It normalises its inputs inside, so the pairs sit behind the norms, in front of the projections themselves.
_FACE = (reads("to_q", name="hidden_states"), reads("to_k to_v", name="encoder_hidden_states"), *output("to_out"))
_PERCEIVER = (reads("to_q", name="hidden_states"), reads("to_kv", name="encoder_hidden_states"), *output("to_out"))
_CAMERA = "qkv beta_proj gate_proj output_gate q_proj_cam k_proj_cam v_proj_cam"

RECORDS = (
    Architecture(
        "CogVideoX", ("CogVideoXTransformer3DModel",), blocks("transformer_blocks", attn1=BOTH, ff=FEED_FORWARD)
    ),
    Architecture(
        "ConsisID",
        ("ConsisIDTransformer3DModel",),
        {
            **blocks("transformer_blocks", attn1=BOTH, ff=FEED_FORWARD),
            "perceiver_cross_attention.*": _PERCEIVER,
            "local_facial_extractor.layers.*.0": _PERCEIVER,
        },
        "the face attentions norm their inputs inside: there the pairs sit behind the norm",
    ),
    Architecture(
        "Wan 2.1 / 2.2",
        ("WanTransformer3DModel", "ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel"),
        _WAN,
        "image tokens are a part of `encoder_hidden_states`",
    ),
    Architecture(
        "Wan VACE",
        ("WanVACETransformer3DModel",),
        {**_WAN, **blocks("vace_blocks", attn1=SELF, attn2=_WAN_CROSS, ffn=FEED_FORWARD)},
    ),
    Architecture(
        "Wan Animate",
        ("WanAnimateTransformer3DModel",),
        {**_WAN, "face_adapter.*": _FACE},
        "the face adapter norms its inputs inside: there the pairs sit behind the norm",
    ),
    Architecture(
        "Wan Animate 2",
        ("WanAnimate2Transformer3DModel",),
        {
            **blocks(
                "blocks",
                self_attn=SELF,
                cross_attn=(*CROSS, reads("add_k_proj add_v_proj", "encoder_hidden_states_image")),
            ),
            "blocks.*": output("ffn.0", "feed_forward"),
        },
    ),
    Architecture(
        "AnyFlow, Helios",
        ("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel", "HeliosTransformer3DModel"),
        _WAN,
    ),
    Architecture("LTX-Video", ("LTXVideoTransformer3DModel",), SELF_CROSS),
    Architecture(
        "LTX-2",
        ("LTX2VideoTransformer3DModel",),
        {
            **_LTX_2,
            **blocks(
                "transformer_blocks",
                audio_attn1=_GATED_SELF,
                audio_attn2=_GATED_CROSS,
                audio_to_video_attn=_GATED_CROSS,
                video_to_audio_attn=_GATED_CROSS,
                audio_ff=FEED_FORWARD,
            ),
        },
        "the gate reads the same input, so the pair feeds it too",
    ),
    Architecture(
        "Sana-WM refiner", ("SanaWMLTX2RefinerTransformer3DModel",), _LTX_2, "its forward leaves the audio blocks out"
    ),
    Architecture(
        "Sana-WM",
        ("SanaWMTransformer3DModel",),
        {
            "blocks.*.attn": (reads(_CAMERA, "x", name="hidden_states"), *output("proj")),
            "blocks.*.cross_attn": cross("q_linear", "kv_linear", "proj", hidden="x", encoder="cond"),
        },
        "the gates and camera projections read the same input, so the pair feeds them too",
    ),
    Architecture(
        "Mochi",
        ("MochiTransformer3DModel",),
        blocks("transformer_blocks", attn1=JOINT, ff=FEED_FORWARD, ff_context=ENCODER_FEED_FORWARD),
        "the text pooler adds a mean before it projects: it stays as it is",
    ),
    Architecture("Allegro", ("AllegroTransformer3DModel",), SELF_CROSS),
    Architecture(
        "Latte",
        ("LatteTransformer3DModel",),
        {**SELF_CROSS, **blocks("temporal_transformer_blocks", attn1=SELF, ff=FEED_FORWARD)},
    ),
    Architecture(
        "EasyAnimate",
        ("EasyAnimateTransformer3DModel",),
        blocks("transformer_blocks", attn1=JOINT_OR_BOTH, ff=FEED_FORWARD, txt_ff=ENCODER_FEED_FORWARD),
    ),
    Architecture(
        "Cosmos 1 / 2 / 2.5",
        ("CosmosTransformer3DModel",),
        blocks(
            "transformer_blocks",
            attn1=SELF,
            # Text and image come as one tuple in 2.5, so these pairs sit in front of the projections themselves.
            attn2=(
                reads("to_q q_img", "hidden_states"),
                reads("to_k to_v", name="encoder_hidden_states"),
                reads("k_img v_img", name="encoder_hidden_states_image"),
                *output("to_out.0"),
            ),
            ff=FEED_FORWARD,
        ),
    ),
    Architecture(
        "Cosmos 3",
        ("Cosmos3OmniTransformer",),
        blocks(
            "layers",
            self_attn=(
                reads("add_q_proj add_k_proj add_v_proj", "gen_seq", name="hidden_states"),
                reads(QKV, "und_seq", name="encoder_hidden_states"),
                *output("to_add_out"),
                *output("to_out", "encoder_attention_output"),
            ),
            mlp_moe_gen=swiglu("gate_proj up_proj"),
            mlp=swiglu("gate_proj up_proj", name="encoder_feed_forward"),
        ),
        "`hidden_states` is the generated sequence, `encoder_hidden_states` the understood one",
    ),
    Architecture(
        "HunyuanVideo, FramePack, HunyuanImage 2.1",
        (
            "HunyuanVideoTransformer3DModel",
            "HunyuanVideoFramepackTransformer3DModel",
            "HunyuanImageTransformer2DModel",
        ),
        _HUNYUAN,
    ),
    Architecture("HunyuanVideo 1.5", ("HunyuanVideo15Transformer3DModel",), {**TEXT_AND_IMAGE, **_REFINER}),
    Architecture(
        "JoyImage-Edit",
        ("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
        blocks("double_blocks", **_JOY),
    ),
    Architecture(
        "Kandinsky 5",
        ("Kandinsky5Transformer3DModel",),
        {
            **blocks("text_transformer_blocks", **_KANDINSKY_5),
            **blocks("visual_transformer_blocks", **_KANDINSKY_5, cross_attention=_KANDINSKY_CROSS),
        },
    ),
    Architecture(
        "Kandinsky 6",
        ("Kandinsky6Transformer3DModel",),
        {
            **blocks("video_text_transformer_blocks", attn=_KANDINSKY_SELF, feed_forward=FEED_FORWARD),
            **blocks("audio_text_transformer_blocks", attn=_KANDINSKY_SELF, feed_forward=FEED_FORWARD),
            **{
                f"visual_transformer_blocks.*.{modality}_dec_block.{name}": pairs
                for modality in ("video", "audio")
                for name, pairs in _KANDINSKY_6.items()
            },
            **blocks(
                "visual_transformer_blocks",
                va_cross_attention=_KANDINSKY_CROSS,
                av_cross_attention=_KANDINSKY_CROSS,
            ),
        },
    ),
    Architecture(
        "Kandinsky 6 super-resolution",
        ("Kandinsky6SRTransformer3DModel",),
        blocks("visual_transformer_blocks", self_attention=_KANDINSKY_SELF, feed_forward=FEED_FORWARD),
    ),
    Architecture(
        "MiniMax-H3",
        ("MiniMaxH3Transformer3DModel",),
        {
            **blocks("token_refiner.refiner_blocks", attn=SELF, ff=FEED_FORWARD),
            **blocks("transformer_blocks", attn=SELF, ff=FEED_FORWARD),
        },
    ),
    Architecture(
        "Motif-Video",
        ("MotifVideoTransformer3DModel",),
        {
            **TEXT_AND_IMAGE,
            **blocks("transformer_blocks", cross_attn=CROSS),
            **blocks("single_transformer_blocks", attn=BOTH_IN, cross_attn=CROSS),
            **SINGLE,
        },
    ),
    Architecture(
        "Stable Video Diffusion",
        ("TransformerSpatioTemporalModel",),
        {
            **SELF_CROSS,
            **blocks("temporal_transformer_blocks", attn1=SELF, attn2=CROSS, ff=FEED_FORWARD, ff_in=FEED_FORWARD),
        },
        "inside its UNet",
    ),
    Architecture(
        "TransformerTemporalModel",
        ("TransformerTemporalModel",),
        blocks("transformer_blocks", attn1=SELF, attn2=SELF, ff=FEED_FORWARD),
        requires={"double_self_attention": True},
    ),
)
