"""Records of the language and speech models in transformers, text encoders of diffusion pipelines among them.

They are matched by the class of one block, as the vision models are. A pair transforms every token by itself, so that
generation with a cache of keys and values reads what it would read without one.
"""

from __future__ import annotations

from .base import SEPARATE, Architecture, Sites, cross, output, reads, swiglu

_GATED = swiglu("gate_proj up_proj")
_LLAMA: Sites = {"self_attn": SEPARATE, "mlp": _GATED}
_FUSED_GATE: Sites = {
    "self_attn": (reads("qkv_proj q_proj k_proj v_proj", "hidden_states"), *output("o_proj")),
    "mlp": output("gate_up_proj", "feed_forward"),
}
_FEED_FORWARD = ("fc1", "fc_in", "c_fc", "linear_fc1", "up_proj", "dense_h_to_4h", "Wi")
_MLP = tuple(pair for name in _FEED_FORWARD for pair in output(name, "feed_forward"))
_QWEN_VISION: Sites = {
    "attn": (reads("qkv", "hidden_states"), *output("proj")),
    "mlp": (reads("gate_proj up_proj", name="feed_forward"), *_MLP),
}
_BERT_CROSS = (reads("query", "hidden_states"), reads("key value", "encoder_hidden_states"))
_T5_MLP = (reads("wi wi_0 wi_1", "hidden_states", name="feed_forward"),)
_BART_OUT = output("out_proj")


def _t5(encoder: str) -> Sites:
    return {
        "layer.*.SelfAttention": (reads("q k v", "hidden_states"), *output("o")),
        "layer.*.EncDecAttention": cross("q", "k v", "o", encoder=encoder),
        "layer.*.DenseReluDense": _T5_MLP,
    }


RECORDS = (
    Architecture(
        "Llama, Mistral, Qwen, Gemma and those built alike",
        (
            *("LlamaDecoderLayer", "MistralDecoderLayer", "MinistralDecoderLayer", "Ministral3DecoderLayer"),
            *("MixtralDecoderLayer", "Qwen2DecoderLayer", "Qwen2MoeDecoderLayer", "Qwen2VLDecoderLayer"),
            *("Qwen2_5_VLDecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "Qwen3VLTextDecoderLayer"),
            *("Qwen3VLMoeTextDecoderLayer", "GemmaDecoderLayer", "Gemma2DecoderLayer", "Gemma3DecoderLayer"),
            *("Gemma4TextDecoderLayer", "Gemma4UnifiedTextDecoderLayer", "VaultGemmaDecoderLayer"),
            *("SmolLM3DecoderLayer", "OlmoDecoderLayer", "Olmo2DecoderLayer", "Olmo3DecoderLayer"),
            *("GraniteDecoderLayer", "CohereDecoderLayer", "Cohere2DecoderLayer", "StableLmDecoderLayer"),
            *("HeliumDecoderLayer", "Exaone4DecoderLayer", "SeedOssDecoderLayer", "Ernie4_5DecoderLayer"),
            *("HunYuanDenseV1DecoderLayer", "GptOssDecoderLayer", "PhimoeDecoderLayer"),
        ),
        _LLAMA,
        "`feed_forward` in dense MLPs only, not in experts",
    ),
    Architecture(
        "GLM, Phi 3 and 4",
        (
            *("GlmDecoderLayer", "Glm4DecoderLayer", "Glm4vTextDecoderLayer", "GlmImageTextDecoderLayer"),
            *("Phi3DecoderLayer", "Phi4MultimodalDecoderLayer"),
        ),
        _FUSED_GATE,
        "one Linear for both halves of the gated MLP; in Phi also one for q, k and v",
    ),
    Architecture(
        "Qwen-VL, GLM-V: image encoder",
        (
            *("Qwen2VLVisionBlock", "Qwen2_5_VLVisionBlock", "Qwen3VLVisionBlock", "Qwen3VLMoeVisionBlock"),
            *("Glm4vVisionBlock", "GlmImageVisionBlock"),
        ),
        _QWEN_VISION,
    ),
    Architecture("Pixtral: image encoder", ("PixtralAttentionLayer",), {"attention": SEPARATE, "feed_forward": _GATED}),
    Architecture(
        "Phi 1 and 2, StarCoder 2, Nemotron",
        ("PhiDecoderLayer", "Starcoder2DecoderLayer", "NemotronDecoderLayer"),
        {"self_attn": (*SEPARATE, *output("dense")), "mlp": _MLP},
    ),
    Architecture(
        "GPT-2, GPTBigCode (StarCoder)",
        ("GPT2Block", "GPTBigCodeBlock"),
        {
            "attn": (reads("c_attn", "hidden_states"), *output("c_proj")),
            "crossattention": cross("q_attn", "c_attn", "c_proj"),
            "mlp": _MLP,
        },
        "GPT-2's weights are stored transposed (`Conv1D`)",
    ),
    Architecture(
        "GPT-J",
        ("GPTJBlock",),
        {"attn": (reads("q_proj k_proj v_proj", "hidden_states"), *_BART_OUT), "mlp": _MLP},
    ),
    Architecture(
        "GPT-NeoX (Pythia), BLOOM",
        ("GPTNeoXLayer", "BloomBlock"),
        {
            name: (reads("query_key_value", "hidden_states"), *output("dense"))
            for name in ("attention", "self_attention")
        }
        | {"mlp": _MLP},
        "one Linear for q, k and v",
    ),
    Architecture(
        "BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, Chinese-CLIP's and CLAP's text towers",
        (
            *("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"),
            *("ChineseCLIPTextLayer", "ClapTextLayer"),
        ),
        {
            "attention.self": (reads("query key value", "hidden_states"),),
            "attention": output("output.dense"),
            "crossattention.self": _BERT_CROSS,
            "crossattention": output("output.dense"),
            "intermediate": output("dense", "feed_forward"),
        },
    ),
    Architecture(
        "DistilBERT",
        ("TransformerBlock",),
        {
            "attention": (reads("q_lin k_lin v_lin", "hidden_states"), *output("out_lin")),
            "ffn": output("lin1", "feed_forward"),
        },
    ),
    Architecture(
        "ModernBERT",
        ("ModernBertEncoderLayer",),
        {"attn": (reads("Wqkv", "hidden_states"), *output("Wo")), "mlp": _MLP},
    ),
    Architecture(
        "Whisper, BART, mBART, Marian, M2M-100 (NLLB), OPT",
        (
            *("WhisperEncoderLayer", "WhisperDecoderLayer", "BartEncoderLayer", "BartDecoderLayer"),
            *("MBartEncoderLayer", "MBartDecoderLayer", "MarianEncoderLayer", "MarianDecoderLayer"),
            *("M2M100EncoderLayer", "M2M100DecoderLayer", "OPTDecoderLayer"),
        ),
        {
            "self_attn": (reads("q_proj k_proj v_proj", "hidden_states"), *_BART_OUT),
            "encoder_attn": cross("q_proj", "k_proj v_proj", "out_proj", encoder="key_value_states"),
            "": output("fc1", "feed_forward"),
        },
    ),
    Architecture("T5, mT5", ("T5Block", "MT5Block"), _t5("key_value_states")),
    Architecture("umT5", ("UMT5Block",), _t5("encoder_hidden_states")),
    Architecture(
        "T5Gemma",
        ("T5GemmaEncoderLayer", "T5GemmaDecoderLayer", "T5Gemma2EncoderLayer"),
        {**_LLAMA, "cross_attn": cross("q_proj", "k_proj v_proj", "o_proj")},
    ),
    Architecture(
        "T5Gemma 2: decoder",
        ("T5Gemma2DecoderLayer",),
        {
            "self_attn": (
                reads("q_proj k_proj v_proj", "hidden_states", "encoder_hidden_states"),
                *output("o_proj"),
            ),
            "mlp": _GATED,
        },
        "the same projections read both sequences, so one pair transforms both",
    ),
)
