"""Teaches Stable Diffusion 3 or 3.5 a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_sd3.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --validation_prompt "a photo of sks dog in a bucket"

Rectified flow (Esser et al., arXiv 2403.03206): z = (1 - sigma) z_0 + sigma eps, and the transformer learns eps - z_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from ..training.data.batches import Batch
from ..training.diffusion.denoising import Denoising
from ..training.diffusion.objectives import objective_for
from ..training.diffusion.text_to_image import Subject, TextToImageOptions, captions_of, find_instances, free
from ..training.fit import Validation, fit
from ..training.methods import attach
from ..training.options import NOT_NEGATIVE, parse
from ..training.parsing import REFUSED, option
from ..training.place import Place
from ..training.precision import load_pipeline
from ..training.preflight import check_sites
from ..training.residence import settle
from ..training.run import Run

T5_LENGTH = 77  # tokens; the pipeline's own default is 256
CLIP_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Options(TextToImageOptions):
    """Stable Diffusion 3."""

    train_text_encoder: bool = option(False, "Give the two CLIP text encoders pairs, too.", resume=REFUSED)
    text_encoder_lr: float = option(5e-6, "Learning rate of the text encoders' pairs.", within=NOT_NEGATIVE)


def encode_text(pipe: Any, text: str, length: int) -> dict[str, Tensor]:
    """The pipeline's own embeddings: both CLIPs side by side, then T5's; and the CLIPs' pooled ones."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        text, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def encode_clip(
    pipe: Any, encoders: Sequence[nn.Module], texts: Sequence[str], known: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`known`, with the part of the CLIP encoders computed again, so that gradients reach them."""
    hidden, pooled = [], []
    for tokenizer, encoder in zip((pipe.tokenizer, pipe.tokenizer_2), encoders, strict=True):
        length = pipe.tokenizer_max_length
        ids = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        output = encoder(ids.to(known["prompt_embeds"].device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])  # (B, 77, d)
        pooled.append(output[0])
    embeds = known["prompt_embeds"]  # (B, 77 + T5 length, D)
    clip = torch.cat(hidden, dim=-1).to(embeds.dtype)
    clip = nn.functional.pad(clip, (0, embeds.shape[-1] - clip.shape[-1]))
    embeds = torch.cat([clip, embeds[:, clip.shape[1] :]], dim=1)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": torch.cat(pooled, dim=-1)}


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    options = parse(Options, __doc__, argv)
    items, unseen = find_instances(options)
    check_sites(SD3Transformer2DModel, options)
    place = Place(options)

    pipe = load_pipeline(StableDiffusion3Pipeline, SD3Transformer2DModel, options, place.weight_dtype)
    length = options.max_sequence_length or T5_LENGTH
    subject = Subject(place, options, pipe, items, unseen, lambda text: encode_text(pipe, text, length), length)
    texts = subject.texts
    free(pipe, ["text_encoder_3"] if options.train_text_encoder else [*CLIP_ENCODERS, "text_encoder_3"])
    samples = subject.samples()

    trained = ("transformer", *CLIP_ENCODERS) if options.train_text_encoder else ("transformer",)
    for name in trained:
        attach(getattr(pipe, name), options, component=name)
    settle(pipe.transformer, options, place)
    for name in trained[1:]:
        getattr(pipe, name).to(place.device)
    objective = objective_for(pipe.scheduler, options, tokens=subject.tokens)
    rates: dict[str, float] = dict.fromkeys(CLIP_ENCODERS, options.text_encoder_lr)
    run = Run(place, options, {name: getattr(pipe, name) for name in trained}, samples.per_epoch, rates)
    transformer, *clips = run.called.values()

    def condition(captions: Sequence[str]) -> dict[str, Tensor]:
        return encode_clip(pipe, clips, captions, texts(captions)) if clips else texts(captions)

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        with place.autocast():
            text = condition(captions_of(batch, options.proportion_empty_prompts))
            return transformer(
                noisy.to(place.weight_dtype),
                timestep=timesteps,  # fp32: bf16 has no room for a thousand of them
                encoder_hidden_states=text["prompt_embeds"].to(place.weight_dtype),
                pooled_projections=text["pooled_prompt_embeds"].to(place.weight_dtype),
            ).sample

    task = Denoising(run, samples, objective, predict, lambda: subject.draw(condition), options.num_validation_images)
    return fit(run, task, [Validation(task.validate)])
