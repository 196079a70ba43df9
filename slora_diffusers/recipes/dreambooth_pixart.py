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
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor

from ..errors import SerialLoraError
from ..training.data.batches import Batch
from ..training.diffusion.denoising import Denoising
from ..training.diffusion.objectives import objective_for
from ..training.diffusion.text_to_image import Subject, TextToImageOptions, captions_of, find_instances, free
from ..training.fit import Validation, fit
from ..training.methods import attach
from ..training.options import parse
from ..training.place import Place
from ..training.precision import load_pipeline
from ..training.preflight import check_sites
from ..training.residence import settle
from ..training.run import Run

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


Options = TextToImageOptions


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    options = parse(Options, __doc__, argv)
    items, unseen = find_instances(options)
    check_sites(PixArtTransformer2DModel, options)
    index: Any = DiffusionPipeline.load_config(options.pretrained_model_name_or_path, revision=options.revision)
    name = index["_class_name"]
    if name not in PIPELINES:
        raise SerialLoraError(
            f"{options.pretrained_model_name_or_path} is a {name}; use one of {', '.join(PIPELINES)}."
        )
    place = Place(options)

    pipe = load_pipeline(PIPELINES[name], PixArtTransformer2DModel, options, place.weight_dtype)
    length = options.max_sequence_length or T5_LENGTHS[name]
    call: dict[str, Any] = {"use_resolution_binning": False}  # the sizes are chosen here
    subject = Subject(place, options, pipe, items, unseen, lambda text: encode_text(pipe, text, length), length, **call)
    texts = subject.texts
    free(pipe, ["text_encoder"])
    samples = subject.samples()

    attach(pipe.transformer, options)
    settle(pipe.transformer, options, place)
    objective = objective_for(pipe.scheduler, options, sigma="ignore")
    run = Run(place, options, {"transformer": pipe.transformer}, samples.per_epoch)
    transformer = run.called["transformer"]

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text = texts(captions_of(batch, options.proportion_empty_prompts))
        noisy = noisy.to(place.weight_dtype)
        with place.autocast():
            return transformer(
                noisy,
                timestep=timesteps,
                encoder_hidden_states=text["prompt_embeds"].to(place.weight_dtype),
                encoder_attention_mask=text["prompt_attention_mask"],
                added_cond_kwargs=size_conditions(pipe.transformer, batch, noisy),
            ).sample

    task = Denoising(run, samples, objective, predict, lambda: subject.draw(texts), options.num_validation_images)
    return fit(run, task, [Validation(task.validate)])
