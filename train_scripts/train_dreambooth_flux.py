"""Teaches Flux.1 a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_flux.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --quantize nf4 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

Rectified flow, as Stable Diffusion 3's, on latents packed two by two into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

import slora_diffusers  # noqa: F401  gives every pipeline its load_serial_lora
from slora_diffusers.errors import run_script
from slora_diffusers.training.data.batches import Batch
from slora_diffusers.training.data.cache import vae_factor
from slora_diffusers.training.diffusion.fit import fit
from slora_diffusers.training.diffusion.objectives import objective_for
from slora_diffusers.training.diffusion.text_to_image import TEXT_TO_IMAGE, Subject, captions_of, find_instances, free
from slora_diffusers.training.options import COMMON, make_parser, objective_settings, parse, value
from slora_diffusers.training.precision import load_pipeline
from slora_diffusers.training.preflight import check_sites
from slora_diffusers.training.run import Run

FLUX = (("guidance_scale", value(float, 1.0, "Guidance that a guidance-distilled transformer is told in training.")),)
T5_LENGTH = 512  # tokens
PATCH = 2  # latents per token, along a side


def encode_text(pipe: Any, text: str, length: int) -> dict[str, Tensor]:
    """The pipeline's own embeddings: T5's tokens, and CLIP's pooled one."""
    embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the path of what was trained."""
    options = parse(make_parser(__doc__ or "", COMMON, TEXT_TO_IMAGE, FLUX), argv)
    items, unseen = find_instances(options)
    check_sites(FluxTransformer2DModel, options)
    run = Run(options)

    pipe = load_pipeline(FluxPipeline, FluxTransformer2DModel, options, run.weight_dtype).to(run.device)
    length = options.max_sequence_length or T5_LENGTH
    size = {"patch": PATCH, "side": pipe.default_sample_size * vae_factor(pipe.vae)}
    call = {"max_sequence_length": length}
    subject = Subject(run, pipe, items, unseen, lambda text: encode_text(pipe, text, length), length, **size, **call)
    texts = subject.texts
    free(pipe, ["text_encoder", "text_encoder_2"])
    samples = subject.samples()

    run.attach(pipe.transformer)
    objective = objective_for(pipe.scheduler, tokens=subject.tokens, **objective_settings(options))
    (transformer,) = run.prepare({"transformer": pipe.transformer})
    factor = vae_factor(pipe.vae)

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text = texts(captions_of(batch, options.proportion_empty_prompts))
        count, channels, height, width = noisy.shape
        tokens = pipe._pack_latents(noisy.to(run.weight_dtype), count, channels, height, width)
        places = (height // PATCH, width // PATCH, run.device, run.weight_dtype)
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full((count,), options.guidance_scale, device=run.device)
        with run.accelerator.autocast():
            output = transformer(
                tokens,
                timestep=timesteps / 1000,  # fp32; the transformer multiplies it again
                guidance=guidance,
                pooled_projections=text["pooled_prompt_embeds"].to(run.weight_dtype),
                encoder_hidden_states=text["prompt_embeds"].to(run.weight_dtype),
                txt_ids=torch.zeros(text["prompt_embeds"].shape[1], 3, device=run.device, dtype=run.weight_dtype),
                img_ids=pipe._prepare_latent_image_ids(count, *places),
            ).sample
        return pipe._unpack_latents(output, height * factor, width * factor, pipe.vae_scale_factor)

    return fit(run, samples, objective, predict, lambda: subject.draw(texts), options.num_validation_images)


if __name__ == "__main__":
    run_script(main)
