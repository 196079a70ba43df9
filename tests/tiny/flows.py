"""Stock pipelines of the newer flow models, small enough for tests: random weights, tokenizers of single letters."""

from __future__ import annotations

from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny.pipelines import _seeded, tiny_vae

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"


def letters() -> PreTrainedTokenizerFast:
    """One token for each printable character."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{chr(code): code - 29 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def tiny_sana_pipeline(seed: int = 0) -> SanaPipeline:
    """Sana, on 16 x 16 latents of 32 x 32 pixels."""
    blocks = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
    }
    parts = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    parts |= {f"{side}_qkv_multiscales": ((), (5,)) for side in ("encoder", "decoder")}
    with _seeded(seed):
        vae = AutoencoderDC(
            latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407, **parts,
        )  # fmt: skip
        transformer = SanaTransformer2DModel(
            sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=16,
        )  # fmt: skip
        encoder = Gemma2Model(Gemma2Config(**SMALL, vocab_size=128))
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(letters(), encoder.eval(), vae.eval(), transformer.eval(), scheduler)


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image, whose VAE is one of videos."""
    with _seeded(seed):
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
        )  # fmt: skip
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
        )  # fmt: skip
        text = {**SMALL, "vocab_size": 128, "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}
        text.pop("head_dim")
        vision = {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        }  # fmt: skip
        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return QwenImagePipeline(_euler(), vae.eval(), encoder.eval(), letters(), transformer.eval())


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """Z-Image."""
    with _seeded(seed):
        transformer = ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
        )  # fmt: skip
        encoder = Qwen3Model(Qwen3Config(**SMALL, vocab_size=128))
    vae = tiny_vae(4, seed=seed + 1, scaling_factor=0.36, shift_factor=0.1)
    return ZImagePipeline(_euler(), vae, encoder.eval(), letters(), transformer.eval())


def tiny_lumina2_pipeline(seed: int = 0) -> Lumina2Pipeline:
    """Lumina-Image 2.0; its pipeline takes the VAE to scale by 8."""
    with _seeded(seed):
        transformer = Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(256, 64, 64),
            cap_feat_dim=16,
        )  # fmt: skip
        encoder = Gemma2Model(Gemma2Config(**SMALL, vocab_size=128))
    vae = tiny_vae(4, seed=seed + 1, levels=4, scaling_factor=0.36, shift_factor=0.1)
    return Lumina2Pipeline(transformer.eval(), _euler(), vae, encoder.eval(), letters())


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Wan 2.1."""
    with _seeded(seed):
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
        )  # fmt: skip
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        )  # fmt: skip
        config = UMT5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        encoder = UMT5EncoderModel(config)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(letters(), encoder.eval(), vae.eval(), scheduler, transformer.eval())


def _euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


FLOWS = {
    "sana": tiny_sana_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
    "z_image": tiny_z_image_pipeline,
    "lumina2": tiny_lumina2_pipeline,
    "wan": tiny_wan_pipeline,
}
