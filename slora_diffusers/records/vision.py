"""Records of vision transformers, of CLIP's and SigLIP's text towers, and of PyTorch's own attention.

They are matched by the class of one block, which every model of the family (headless, with a head, as a backbone or
inside another model) is built from. Where transformers 4 and 5 name the modules of a block differently, the record
names both; what a block does not have is skipped.
"""

from __future__ import annotations

from .base import SEPARATE, Architecture, Sites, blocks, output, reads, swiglu

_FUSED = (reads("qkv", "hidden_states"), *output("proj"))
_FC1 = output("fc1", "feed_forward")
_GATED = (*swiglu("gate_proj up_proj"), *output("weights_in", "feed_forward"))

# transformers 4: attention.attention.query and so on, with the output projection in a module beside it.
_VIT: Sites = {
    "attention": (*SEPARATE, *output("output.dense")),
    "attention.attention": (reads("query key value", "hidden_states"),),
    "mlp": (*_FC1, *_GATED),
    "intermediate": output("dense", "feed_forward"),
}
_SWIN: Sites = {**_VIT, "attention.self": (reads("query key value", "hidden_states"),)}
_CLIP: Sites = {
    "self_attn": (reads("q_proj k_proj v_proj", "hidden_states"), *output("out_proj")),
    "mlp": _FC1,
}
_SAM: Sites = {"attn": _FUSED, "mlp": (*output("lin1", "feed_forward"), *output("proj_in", "feed_forward"))}
# Keys and values read a shorter sequence, which a convolution and a norm make of the input inside the attention: the
# pairs sit in front of the projections themselves.
_SEGFORMER: Sites = {
    "attention": (
        reads("q_proj", name="hidden_states"),
        reads("k_proj v_proj", name="reduced_states"),
        *output("o_proj"),
        *output("output.dense"),
    ),
    "attention.self": (reads("query", name="hidden_states"), reads("key value", name="reduced_states")),
    "mlp": (*_FC1, *output("dense1", "feed_forward")),
}
# timm calls the input x. A gate, where there is one, reads it too.
_TIMM = {
    "attn": (reads("qkv q_proj k_proj v_proj gate", "x", name="hidden_states"), *output("proj")),
    "mlp": (reads("fc1 fc1_g fc1_x", "x", name="feed_forward"),),
}

RECORDS = (
    Architecture(
        "ViT, DeiT, BEiT, DINOv2 (with registers), DINOv3, MAE, MSN, I-JEPA",
        (
            "ViTLayer",
            "DeiTLayer",
            "BeitLayer",
            "Dinov2Layer",
            "Dinov2WithRegistersLayer",
            "DINOv3ViTLayer",
            "ViTMAELayer",
            "ViTMSNLayer",
            "IJepaLayer",
        ),
        _VIT,
    ),
    Architecture("Swin, Swin V2", ("SwinLayer", "Swinv2Layer"), _SWIN, "`layers` counts stages"),
    Architecture(
        "VideoMAE, V-JEPA 2",
        ("VideoMAELayer", "VJEPA2Layer"),
        {
            **_VIT,
            "attention": (reads("query key value", "hidden_states"), *output("proj"), *output("output.dense")),
        },
        "V-JEPA 2's predictor too",
    ),
    Architecture(
        "V-JEPA 2: attentive pooler",
        ("VJEPA2PoolerSelfAttentionLayer", "VJEPA2PoolerCrossAttentionLayer"),
        {
            **_CLIP,
            "cross_attn": (
                reads("q_proj", "queries", name="hidden_states"),
                reads("k_proj v_proj", "keys", "values", name="encoder_hidden_states"),
            ),
        },
    ),
    Architecture(
        "AIMv2",
        ("Aimv2EncoderLayer",),
        {
            "attention": (reads("q_proj k_proj v_proj", "hidden_states"), *output("out_proj")),
            "ffn": _GATED,
        },
    ),
    Architecture(
        "Perception Encoder (audio, video)",
        ("PeVideoEncoderLayer", "PeAudioEncoderLayer", "PeAudioVideoEncoderLayer"),
        {"self_attn": SEPARATE, "mlp": _GATED},
        "the image encoder is timm's",
    ),
    Architecture(
        "SegFormer",
        ("SegformerLayer",),
        _SEGFORMER,
        "keys and values read a reduced sequence, so they have a pair of their own, `reduced_states`",
    ),
    Architecture(
        "CLIP, SigLIP, OWL-ViT (text and image)",
        ("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer", "OwlViTEncoderLayer", "Owlv2EncoderLayer"),
        _CLIP,
    ),
    Architecture(
        "SAM, SAM-HQ, SAM 2",
        ("SamVisionLayer", "SamHQVisionLayer", "Sam2MultiScaleBlock"),
        _SAM,
        "the image encoder; the mask decoder stays as it is",
    ),
    Architecture(
        "timm: ViT, DeiT, DINOv2, EVA, BEiT, SAM, NaFlex",
        ("VisionTransformer", "VisionTransformerRelPos", "VisionTransformerSAM", "Eva", "Beit", "NaFlexVit"),
        {**blocks("blocks", **_TIMM), **blocks("blocks.*.attns", attn=_TIMM["attn"])},
    ),
    Architecture(
        "timm: Swin",
        ("SwinTransformer", "SwinTransformerV2"),
        blocks("layers.*.blocks", **_TIMM),
        "`layers` counts stages",
    ),
    Architecture(
        "nn.MultiheadAttention",
        ("MultiheadAttention",),
        {
            "": (
                reads("in_proj_weight", "query", "key", "value", name="hidden_states"),
                reads("q_proj_weight", "query", name="query"),
                reads("k_proj_weight", "key", name="key"),
                reads("v_proj_weight", "value", name="value"),
            )
        },
        "query, key and value of other widths have a pair each; PyTorch reads the output projection past any hook",
    ),
)
