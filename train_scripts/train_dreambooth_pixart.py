"""Teaches PixArt-alpha or PixArt-Sigma a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_pixart.py \
        --pretrained_model_name_or_path PixArt-alpha/PixArt-Sigma-XL-2-1024-MS \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --validation_prompt "a photo of sks dog in a bucket"

The transformer predicts the noise and its variance; the loss is on the noise alone, as in PixArt's own fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor

import slora_diffusers  # noqa: F401  gives every pipeline its load_serial_lora
from slora_diffusers import SerialLoraError
from slora_diffusers.training.batches import Batch, bucket_shapes
from slora_diffusers.training.cache import vae_factor
from slora_diffusers.training.hub import push_to_hub
from slora_diffusers.training.objectives import objective_for, prior_preservation
from slora_diffusers.training.options import (
    ADAPTER, DATA, MODEL, OBJECTIVE, OPTIMIZER, RUN, make_parser, objective_settings, parse,
)  # fmt: skip
from slora_diffusers.training.precision import load_pipeline
from slora_diffusers.training.preflight import check_sites
from slora_diffusers.training.run import Run
from slora_diffusers.training.samples import Samples, evenly_spread
from slora_diffusers.training.text_to_image import (
    TEXT_TO_IMAGE, Texts, captions_of, find_class_images, find_instances, free, pipeline_arguments, square,
)  # fmt: skip
from slora_diffusers.training.validation import denoising_losses, fixed_noise_loss, sample_generators

PIPELINES = {cls.__name__: cls for cls in (PixArtAlphaPipeline, PixArtSigmaPipeline)}
T5_LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens


def encode_text(pipe: Any, text: str, length: int) -> dict[str, Tensor]:
    """The pipeline's own embeddings, and which of their tokens are text: the transformer must not read the padding."""
    embeds, mask, _, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def size_conditions(transformer: Any, batch: Batch, like: Tensor) -> dict[str, Tensor | None]:
    """Height, width and their ratio, for the transformers that were trained with them (alpha at 1024)."""
    if not transformer.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    height, width = batch.shape
    count = len(like)
    return {
        "resolution": torch.tensor([[height, width]], dtype=like.dtype, device=like.device).repeat(count, 1),
        "aspect_ratio": torch.tensor([[height / width]], dtype=like.dtype, device=like.device).repeat(count, 1),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the path of what was trained."""
    groups = (MODEL, ADAPTER, DATA, TEXT_TO_IMAGE, OPTIMIZER, OBJECTIVE, RUN)
    options = parse(make_parser(__doc__ or "", *groups), argv)
    items, unseen = find_instances(options)
    check_sites(PixArtTransformer2DModel, options)
    name = DiffusionPipeline.load_config(options.pretrained_model_name_or_path)["_class_name"]
    if name not in PIPELINES:
        raise SerialLoraError(f"{options.pretrained_model_name_or_path} is a {name}; use one of {', '.join(PIPELINES)}.")
    run = Run(options)
    set_seed(options.seed)  # of the adapter's initial weights: the same on every process

    pipe = load_pipeline(PIPELINES[name], PixArtTransformer2DModel, options, run.weight_dtype).to(run.device)
    factor = vae_factor(pipe.vae)
    config = pipe.transformer.config
    resolution = options.resolution or config.sample_size * factor
    shapes = bucket_shapes(resolution, options.aspect_ratio_buckets, config.patch_size * factor)
    height, width = square(shapes, resolution)
    settings = {"num_inference_steps": options.validation_inference_steps, "height": height, "width": width}
    settings["use_resolution_binning"] = False  # the sizes are chosen here

    def draw_class(count: int, draws: list[torch.Generator]) -> list[Image.Image]:
        return pipe([options.class_prompt] * count, generator=draws, **settings).images

    prior = find_class_images(run, draw_class)
    length = options.max_sequence_length or T5_LENGTHS[name]
    texts = Texts(run, pipe, lambda text: encode_text(pipe, text, length), length)
    prompt = options.validation_prompt or items[0].caption
    texts.fill([item.caption for item in (*items, *unseen, *prior)] + [prompt, ""])
    free(pipe, ["text_encoder"])
    samples = Samples(run, pipe.vae, items, evenly_spread(unseen, options.validation_loss_images), shapes, prior)

    run.attach(pipe.transformer)
    objective = objective_for(pipe.scheduler, sigma="ignore", **objective_settings(options))
    (transformer,) = run.prepare({"transformer": pipe.transformer})

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text = texts(captions_of(batch, options.proportion_empty_prompts))
        noisy = noisy.to(run.weight_dtype)
        with run.accelerator.autocast():
            return transformer(
                noisy,
                timestep=timesteps,
                encoder_hidden_states=text["prompt_embeds"].to(run.weight_dtype),
                encoder_attention_mask=text["prompt_attention_mask"],
                added_cond_kwargs=size_conditions(pipe.transformer, batch, noisy),
            ).sample

    def loss_of(batch: Batch) -> Tensor:
        losses = denoising_losses(objective, predict, samples.latents(batch), batch)
        return prior_preservation(losses, batch.prior.to(losses.device), options.prior_loss_weight)

    def draw() -> list[Image.Image]:
        return pipe(
            negative_prompt=None,
            **pipeline_arguments(texts, prompt, options.num_validation_images),
            guidance_scale=options.validation_guidance_scale,
            generator=sample_generators(options.seed, options.num_validation_images),
            **settings,
        ).images

    def validate(number: int) -> None:
        run.validate(number, lambda: fixed_noise_loss(objective, predict, samples), draw, options.num_validation_images)

    if run.start == 0 and run.validates_at(0):
        validate(0)
    for step in run.steps(samples.read, loss_of):
        if run.validates_at(step.number) and not step.interrupted:
            validate(step.number)
    path = run.finish()
    if options.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(options)
    return path


if __name__ == "__main__":
    main()
