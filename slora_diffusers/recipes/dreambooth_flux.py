"""Teaches Flux.1 a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_flux.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --quantize nf4 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

Rectified flow, as Stable Diffusion 3's, on latents packed two by two into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from ..training.data.batches import Batch
from ..training.data.cache import vae_factor
from ..training.diffusion.denoising import Denoising
from ..training.diffusion.objectives import objective_for
from ..training.diffusion.text_to_image import Subject, TextToImageOptions, captions_of, find_instances, free
from ..training.fit import Validation, fit
from ..training.methods import attach
from ..training.options import NOT_NEGATIVE, parse
from ..training.parsing import option
from ..training.place import Place
from ..training.precision import load_pipeline
from ..training.preflight import check_sites
from ..training.residence import settle
from ..training.run import Run

T5_LENGTH = 512  # tokens
PATCH = 2  # latents per token, along a side


@dataclass(frozen=True)
class Options(TextToImageOptions):
    """Flux."""

    guidance_scale: float = option(
        1.0, "Guidance that a guidance-distilled transformer is told in training.", within=NOT_NEGATIVE
    )


def encode_text(pipe: Any, text: str, length: int) -> dict[str, Tensor]:
    """The pipeline's own embeddings: T5's tokens, and CLIP's pooled one."""
    embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    options = parse(Options, __doc__, argv)
    items, unseen = find_instances(options)
    check_sites(FluxTransformer2DModel, options)
    place = Place(options)

    pipe = load_pipeline(FluxPipeline, FluxTransformer2DModel, options, place.weight_dtype)
    length = options.max_sequence_length or T5_LENGTH
    size: dict[str, Any] = {"patch": PATCH, "side": pipe.default_sample_size * vae_factor(pipe.vae)}
    call: dict[str, Any] = {"max_sequence_length": length}
    subject = Subject(
        place, options, pipe, items, unseen, lambda text: encode_text(pipe, text, length), length, **size, **call
    )
    texts = subject.texts
    free(pipe, ["text_encoder", "text_encoder_2"])
    samples = subject.samples()

    attach(pipe.transformer, options)
    settle(pipe.transformer, options, place)
    objective = objective_for(pipe.scheduler, options, tokens=subject.tokens)
    run = Run(place, options, {"transformer": pipe.transformer}, samples.per_epoch)
    transformer = run.called["transformer"]
    factor = vae_factor(pipe.vae)

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text = texts(captions_of(batch, options.proportion_empty_prompts))
        count, channels, height, width = noisy.shape
        tokens = pipe._pack_latents(noisy.to(place.weight_dtype), count, channels, height, width)
        places = (height // PATCH, width // PATCH, place.device, place.weight_dtype)
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full((count,), options.guidance_scale, device=place.device)
        with place.autocast():
            output = transformer(
                tokens,
                timestep=timesteps / 1000,  # fp32; the transformer multiplies it again
                guidance=guidance,
                pooled_projections=text["pooled_prompt_embeds"].to(place.weight_dtype),
                encoder_hidden_states=text["prompt_embeds"].to(place.weight_dtype),
                txt_ids=torch.zeros(text["prompt_embeds"].shape[1], 3, device=place.device, dtype=place.weight_dtype),
                img_ids=pipe._prepare_latent_image_ids(count, *places),
            ).sample
        return pipe._unpack_latents(output, height * factor, width * factor, pipe.vae_scale_factor)

    task = Denoising(run, samples, objective, predict, lambda: subject.draw(texts), options.num_validation_images)
    return fit(run, task, [Validation(task.validate)])
