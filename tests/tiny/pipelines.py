"""Stock diffusers pipelines small enough for tests: random weights, tokenizers made from a small corpus, no download.

Every function is deterministic in its seed and leaves the global random state as it found it. Images are 32 x 32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CORPUS = [
    "a photo of a cat", "a photo of sks cat", "a photo of a dog on the beach", "an astronaut riding a rocket",
    "a cup of coffee on a wooden table", "a portrait of grace hopper in uniform", "the quick brown fox jumps",
    "pack my box with five dozen liquor jugs", "0123456789", "a painting in the style of sks",
]  # fmt: skip
SCHEDULERS = {
    "epsilon": lambda: DDIMScheduler(clip_sample=False),
    "v_prediction": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "flow_prediction": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    ),
}


def tiny_vae(latent_channels: int = 4, seed: int = 0, levels: int = 2, **config) -> AutoencoderKL:
    """An AutoencoderKL: with two levels 32 x 32 pixels to 16 x 16 latents."""
    with _seeded(seed):
        vae = AutoencoderKL(
            block_out_channels=(8, *(16,) * (levels - 1)),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=32,
            mid_block_add_attention=False,
            **config,
        ).eval()
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    with torch.no_grad():  # a small variance of the latents, as trained VAEs have: else most of them is noise
        last.bias[latent_channels:] -= 10
    return vae


def tiny_dit_pipeline(
    prediction_type: str = "epsilon", learned_sigma: bool = False, seed: int = 0, num_layers: int = 2
) -> DiTPipeline:
    """Class-conditional DiT over 16 x 16 latents; `prediction_type` is epsilon, v_prediction or flow_prediction."""
    with _seeded(seed):
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8 if learned_sigma else 4,
            num_layers=num_layers,
            sample_size=16,
            patch_size=4,
            num_embeds_ada_norm=1000,  # DiTPipeline hard-codes the null class 1000
        )
    return DiTPipeline(
        transformer=transformer.eval(),
        vae=tiny_vae(scaling_factor=0.18215, seed=seed + 1),
        scheduler=SCHEDULERS[prediction_type](),
        id2label={str(index): name for index, name in enumerate(("cat", "dog", "fox"))},
    )


def tiny_sd3_pipeline(seed: int = 0, with_t5: bool = True, dual: bool = True) -> StableDiffusion3Pipeline:
    """SD3 with two CLIP encoders and a T5; `dual` gives the first block SD3.5's second attention and qk norms."""
    clip_tokenizer, t5_tokenizer = clip_tokenizer_on(CORPUS), t5_tokenizer_on(CORPUS)
    with _seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=24,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
        encoders = [_clip_encoder(len(clip_tokenizer)) for _ in range(2)]
        t5 = _t5_encoder(len(t5_tokenizer)) if with_t5 else None
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4, seed=seed + 1, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=encoders[0],
        tokenizer=clip_tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=clip_tokenizer_on(CORPUS),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer if with_t5 else None,
    )


def tiny_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """Flux with one double and two single blocks, a CLIP encoder and a T5."""
    clip_tokenizer, t5_tokenizer = clip_tokenizer_on(CORPUS), t5_tokenizer_on(CORPUS)
    with _seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,  # two by two latents of four channels
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        text_encoder = CLIPTextModel(_clip_config(len(clip_tokenizer))).eval()
        t5 = _t5_encoder(len(t5_tokenizer))
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(4, seed=seed + 1, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )


def tiny_pixart_pipeline(variant: str = "alpha", seed: int = 0) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """PixArt `alpha` (with size and aspect conditions, as its 1024 model has) or `sigma` (without).

    Call it with `height=32, width=32, use_resolution_binning=False`: the stock pipelines bin to their own sizes.
    """
    tokenizer = t5_tokenizer_on(CORPUS)
    with _seeded(seed):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=18,  # three condition embeddings of a third of the width each
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=36,
            sample_size=128 if variant == "alpha" else 16,  # the alpha pipeline sends the conditions only at 128
            patch_size=2,
            interpolation_scale=1,
            caption_channels=32,
            use_additional_conditions=variant == "alpha",
        )
        text_encoder = _t5_encoder(len(tokenizer))
    pipeline = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}[variant]
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(4, seed=seed + 1, scaling_factor=0.13025),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def clip_tokenizer_on(corpus: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell the words of `corpus` (the BPE trainer itself is not deterministic)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
    merges = {}
    for word in _words(corpus):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for count in range(1, len(parts)):
            merges[("".join(parts[:count]), parts[count])] = None
            tokens["".join(parts[: count + 1])] = None
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def t5_tokenizer_on(corpus: list[str]) -> T5Tokenizer:
    """A T5 tokenizer: a unigram model over the words and the characters of `corpus`, by their frequencies."""
    counts = Counter(f"▁{word}" for text in corpus for word in text.split())
    letters = Counter(letter for word in counts for letter in word)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(token, math.log(n / counts.total())) for token, n in sorted(counts.items()) if len(token) > 2]
    vocab += [(letter, math.log(n / letters.total()) - 10) for letter, n in sorted(letters.items())]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _words(corpus: list[str]) -> list[str]:
    return sorted({word for text in corpus for word in text.split()})


def _clip_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config(vocab_size)).eval()


def _clip_config(vocab_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


def _t5_encoder(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ).eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; put the global random state back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
