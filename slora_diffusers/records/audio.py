"""Records of the audio and molecule transformers in diffusers."""

from __future__ import annotations

from .base import CROSS, QKV, SELF, SELF_CROSS, Architecture, blocks, cross, output, reads, swiglu

RECORDS = (
    Architecture(
        "ACE-Step",
        ("AceStepTransformer1DModel",),
        blocks("layers", self_attn=SELF, cross_attn=CROSS, mlp=swiglu("gate_proj up_proj")),
    ),
    Architecture("Stable Audio", ("StableAudioDiTModel",), SELF_CROSS),
    Architecture(
        "Stable Audio 3",
        ("StableAudio3DiTModel",),
        blocks(
            "transformer_blocks",
            self_attn=(reads("to_qkv", "hidden_states"), *output("to_out")),
            cross_attn=cross("to_q", "to_kv", "to_out", encoder="context"),
            ff=output("proj_in", "feed_forward"),
        ),
    ),
    Architecture(
        "LongCat-AudioDiT",
        ("LongCatAudioDiTTransformer",),
        blocks("blocks", self_attn=SELF, cross_attn=CROSS, ffn=output("ff.0", "feed_forward")),
    ),
    Architecture(
        "MiniMax-Music 3",
        ("MiniMaxMusic3Transformer1DModel",),
        {"transformer_blocks.*.attn": SELF, "transformer_blocks.*": output("ff_in", "feed_forward")},
    ),
    Architecture(
        "MiniMax-Music 3 depth decoder",
        ("MiniMaxMusic3RVQDepthDecoder",),
        {
            "layers.*.attn": (reads(QKV, "hidden_states"), *output("to_out")),
            "layers.*": (reads("gate_proj up_proj", name="feed_forward"),),
        },
    ),
    Architecture(
        "Spectrogram Diffusion",
        ("T5FilmDecoder",),
        {
            "decoders.*.layer.0.attention": SELF,
            "decoders.*.layer.1.attention": CROSS,
            "decoders.*.layer.2.DenseReluDense": swiglu("wi_0 wi_1", "hidden_states"),
        },
    ),
    Architecture(
        "RFdiffusion 4 (Proteina)",
        ("RFD4ProteinaTransformer",),
        {
            "transformer_layers.*.mhba.mha": (
                reads("to_q to_k to_v to_g", name="hidden_states"),
                *output("to_out"),
            ),
        },
        "the pair sits behind the norm inside the attention, and feeds the gate too; the insertion head stays as it is",
    ),
)
