"""Fine-tunes a class-conditional DiT on a folder of images per class, or on the demo's glyphs.

    accelerate launch train_scripts/train_dit.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --train_data_dir photos --output_dir outputs/dit --mixed_precision bf16

The loss follows from the checkpoint: its scheduler's prediction type (epsilon, v_prediction, flow_prediction), and the
hybrid loss of improved DDPM where the transformer also predicts its variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from PIL import Image
from torch import Tensor, nn

from ..demo.glyphs import HELD_OUT_LETTERS, NEW_STYLES, SEEN_LETTERS, glyph_images
from ..errors import SerialLoraError
from ..training.data.batches import Batch
from ..training.data.cache import vae_factor
from ..training.data.folders import find_classes
from ..training.data.images import Item, from_tensors
from ..training.data.loss_masks import masked
from ..training.data.order import bucket_shapes
from ..training.diffusion.denoising import Denoising
from ..training.diffusion.objectives import objective_for
from ..training.diffusion.samples import Samples, evenly_spread
from ..training.diffusion.validation import sample_generators
from ..training.fit import Validation, fit
from ..training.methods import attach
from ..training.options import COUNT, SHARE, CommonOptions, MaskOptions, parse
from ..training.parsing import FREE, option
from ..training.place import Place
from ..training.precision import load_pipeline
from ..training.preflight import check_sites
from ..training.residence import settle
from ..training.run import Run

NULL_CLASS = 1000  # the id that DiTPipeline hard-codes for "no class"


@dataclass(frozen=True)
class Options(CommonOptions, MaskOptions):
    """Classes."""

    train_data_dir: str | None = option(None, "Folder of one folder per class, named by class id or label.")
    glyphs: str | None = option(
        None, "Train on the demo's seen letters of this style instead.", choices=tuple(NEW_STYLES)
    )
    glyph_variations: int = option(32, "Jittered copies of each letter.", within=COUNT)
    validation_data_dir: str | None = option(None, "Folder like --train_data_dir for the validation loss.", resume=FREE)
    validation_labels: list[int] | None = option(
        None, "Class ids of the validation images.", within="[0, 1000]", resume=FREE
    )
    label_dropout: float = option(0.1, "Share of samples that lose their label.", within=SHARE)


def find_items(options: Options) -> tuple[list[Item], list[Item]]:
    """The items to train on, and those to validate on."""
    if (options.glyphs is None) == (options.train_data_dir is None):
        raise SerialLoraError("give one of --train_data_dir and --glyphs.")
    if options.glyphs is not None:
        style = [NEW_STYLES[options.glyphs]]
        images, labels = glyph_images(style, SEEN_LETTERS, options.glyph_variations, options.seed)
        others, their_labels = glyph_images(style, HELD_OUT_LETTERS)
        unseen = from_tensors(others, their_labels.tolist(), name="held-out letter")
        return from_tensors(images, labels.tolist(), name="letter"), unseen
    assert options.train_data_dir is not None
    names: Any = DiTPipeline.load_config(options.pretrained_model_name_or_path, revision=options.revision)
    ids = {label.strip(): int(i) for i, value in names.get("id2label", {}).items() for label in value.split(",")}

    def id_of(name: str) -> int | None:
        return int(name) if name.isdigit() and int(name) < NULL_CLASS else ids.get(name)

    others = (options.output_dir, options.validation_data_dir, options.mask_data_dir, options.encodings_dir)
    without = [Path(folder) for folder in others if folder is not None]
    items = find_classes(options.train_data_dir, id_of, without).report().items
    items = masked(items, options.train_data_dir, options)
    unseen = find_classes(options.validation_data_dir, id_of).items if options.validation_data_dir else items
    return items, evenly_spread(unseen, options.validation_loss_images)


def keep_labels(transformer: nn.Module) -> None:
    """Keep the label embeddings from dropping labels: each block has its own, and each would drop others."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained."""
    options = parse(Options, __doc__, argv)
    check_sites(DiTTransformer2DModel, options)
    items, unseen = find_items(options)
    place = Place(options)

    pipe = load_pipeline(DiTPipeline, DiTTransformer2DModel, options, place.weight_dtype)
    config, factor = pipe.transformer.config, vae_factor(pipe.vae)
    shapes = bucket_shapes(options.resolution or config.sample_size * factor, None, config.patch_size * factor)
    samples = Samples(place, options, pipe.vae, items, unseen, shapes)

    attach(pipe.transformer, options)
    settle(pipe.transformer, options, place)
    keep_labels(pipe.transformer)
    objective = objective_for(pipe.scheduler, options)
    run = Run(place, options, {"transformer": pipe.transformer}, samples.per_epoch)
    transformer = run.called["transformer"]

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        labels = torch.tensor([item.label for item in batch.items])
        if batch.number >= 0:  # validation's batches keep theirs
            labels[batch.dropped(options.label_dropout)] = NULL_CLASS
        with place.autocast():
            noisy, labels = noisy.to(place.weight_dtype), labels.to(place.device)
            return transformer(noisy, timestep=timesteps, class_labels=labels).sample

    def draw() -> list[Image.Image]:
        return pipe(
            labels * options.num_validation_images,
            guidance_scale=options.validation_guidance_scale,
            num_inference_steps=options.validation_inference_steps,
            generator=sample_generators(options.seed, len(labels) * options.num_validation_images),
        ).images

    labels = options.validation_labels or sorted({item.label for item in unseen})[:8]
    task = Denoising(run, samples, objective, predict, draw, len(labels))
    return fit(run, task, [Validation(task.validate)])
