"""What the text-to-image recipes share: their options, their images and captions, prior images and text embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from PIL import Image

from ...errors import SerialLoraError
from ..data.batches import Batch, bucket_shapes
from ..data.cache import TensorCache, Tensors, cache_texts, vae_factor
from ..data.identity import key_of, pipeline_key
from ..data.images import Item, find_images, from_dataset
from ..data.labelled import open_dataset
from ..options import Group, switch, value
from ..run import Run
from .class_images import ClassImages
from .samples import Samples, evenly_spread
from .validation import sample_generators

TEXT_TO_IMAGE: Group = (
    ("instance_data_dir", value(str, None, "Folder of the images (and captions) to train on.")),
    ("instance_prompt", value(str, None, "Caption of images that have none of their own.")),
    ("dataset_name", value(str, None, "Data set to train on instead: Hub id, or folder of save_to_disk.")),
    ("dataset_config_name", value(str, None, "Config of that data set.")),
    ("image_column", value(str, "image", "Its column of images.")),
    ("caption_column", value(str, "text", "Its column of captions.")),
    ("with_prior_preservation", switch("Train on images of the class too, so that the class is not forgotten.")),
    ("class_data_dir", value(str, None, "Folder of the class images; missing ones are drawn with the base.")),
    ("class_prompt", value(str, None, "Caption of the class images.")),
    ("num_class_images", value(int, 100, "How many class images there are to be.")),
    ("prior_loss_weight", value(float, 1.0, "Weight of the class images' loss.")),
    ("sample_batch_size", value(int, 4, "Class images that are drawn at a time.")),
    ("class_inference_steps", value(int, None, "Sampling steps of the class images; the pipeline's own by default.")),
    ("class_guidance_scale", value(float, None, "Guidance scale of the class images; the pipeline's own by default.")),
    ("proportion_empty_prompts", value(float, 0.0, "Share of samples that get the empty prompt.")),
    ("max_sequence_length", value(int, None, "Tokens of the T5 encoder; the model's own by default.")),
    ("validation_prompt", value(str, None, "Prompt of the validation images; the first caption by default.")),
    ("validation_data_dir", value(str, None, "Images for the validation loss; the training images by default.")),
)


def find_instances(options: argparse.Namespace) -> tuple[list[Item], list[Item]]:
    """The images to train on, and those to validate on.

    Raises:
        SerialLoraError: If there are none, or it is not clear which ones are meant.
    """
    if (options.instance_data_dir is None) == (options.dataset_name is None):
        raise SerialLoraError("give one of --instance_data_dir and --dataset_name.")
    if options.with_prior_preservation and not (options.class_data_dir and options.class_prompt):
        raise SerialLoraError("--with_prior_preservation needs --class_data_dir and --class_prompt.")
    if options.instance_data_dir is not None:
        items = find_images(options.instance_data_dir, prompt=options.instance_prompt).report().items
    else:
        dataset = open_dataset(options.dataset_name, "train", config=options.dataset_config_name)
        columns = (options.image_column, options.caption_column, options.instance_prompt)
        items = from_dataset(dataset, *columns).report().items
    unseen = items
    if options.validation_data_dir is not None:
        unseen = find_images(options.validation_data_dir, prompt=options.instance_prompt).items
    return items, unseen


class Texts:
    """Text embeddings, encoded once and read from the cache; the encoders can go after `fill`.

    Args:
        run: Knows the options and the processes.
        pipe: The pipeline; all but its transformer, VAE and scheduler is part of the cache's keys.
        encode: One text to named tensors, each with a batch dimension of 1, named as the pipeline's arguments.
        length: Tokens of the T5 encoder.
    """

    def __init__(self, run: Run, pipe: Any, encode: Callable[[str], Tensors], length: int) -> None:
        options = run.options
        self._run, self._encode = run, encode
        self._cache = TensorCache(options.encodings_dir or run.output_dir / "cache")
        # All that may shape an embedding: encoders and their adapters, tokenizers, processors, the pipeline's settings.
        self._maker = key_of(pipeline_key(pipe, "transformer", "vae", "scheduler"), length, str(run.weight_dtype))
        self._keys: dict[str, str] = {}

    def fill(self, texts: Iterable[str]) -> None:
        """Encode what the cache lacks; processes share the work."""

        @torch.no_grad()
        def encode(text: str) -> Tensors:
            return {name: tensor[0] for name, tensor in self._encode(text).items()}

        wanted = sorted(set(texts))
        (mine,) = self._run.share(wanted)
        cache_texts(self._cache, mine, encode, self._maker)
        self._run.accelerator.wait_for_everyone()
        self._keys |= cache_texts(self._cache, wanted, encode, self._maker)

    def __call__(self, texts: Sequence[str]) -> Tensors:
        """The embeddings of texts, stacked, on the run's device."""
        entries = [self._cache[self._keys[text]] for text in texts]
        return {name: torch.stack([entry[name] for entry in entries]).to(self._run.device) for name in entries[0]}


def captions_of(batch: Batch, empty: float) -> list[str]:
    """The captions of a batch, a share of them dropped; validation's batches keep theirs."""
    captions = [item.caption for item in batch.items]
    if batch.number < 0 or not empty:
        return captions
    return [
        "" if dropped else caption for caption, dropped in zip(captions, batch.dropped(empty).tolist(), strict=True)
    ]


class Subject:
    """What a text-to-image run learns, and how its pipeline draws it.

    Args:
        run: Knows the options and the processes.
        pipe: The pipeline, not adapted yet; it draws missing class images.
        items: The images to train on.
        unseen: The images to validate on.
        encode: One text to the pipeline's embeddings, named as its arguments, with a batch dimension of 1.
        length: Tokens of the T5 encoder.
        patch: Latents per token along a side; the transformer's own by default.
        side: Side of images in pixels, if --resolution is not given; the transformer's own by default.
        settings: Further arguments of the pipeline's call.
    """

    def __init__(
        self, run: Run, pipe: Any, items: list[Item], unseen: list[Item], encode: Callable[[str], Tensors], length: int,
        patch: int | None = None, side: int | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        options, config, factor = run.options, pipe.transformer.config, vae_factor(pipe.vae)
        self._run, self._pipe, self._items = run, pipe, items
        self._unseen = evenly_spread(unseen, options.validation_loss_images)
        side = int(options.resolution or side or config.sample_size * factor)
        token = (patch or config.patch_size) * factor  # pixels
        self.shapes = bucket_shapes(side, options.aspect_ratio_buckets, token)
        # Validation and class images take the square if it is one of the shapes.
        height, width = (side, side) if (side, side) in self.shapes else self.shapes[0]
        self.tokens = height * width // token**2
        largest = getattr(config, "pos_embed_max_size", None)
        if largest and max(max(shape) for shape in self.shapes) > largest * token:
            raise SerialLoraError(f"the transformer takes at most {largest * token} pixels a side: lower --resolution.")
        self._settings = {"height": height, "width": width, **settings}
        self._prior = self._class_images() if options.with_prior_preservation else []
        self.prompt = options.validation_prompt or items[0].caption
        self.texts = Texts(run, pipe, encode, length)
        self.texts.fill([item.caption for item in (*items, *unseen, *self._prior)] + [self.prompt, ""])

    def samples(self) -> Samples:
        """The run's batches; latents are cached here, if they are to be."""
        return Samples(self._run, self._pipe.vae, self._items, self._unseen, self.shapes, self._prior)

    def draw(self, condition: Callable[[Sequence[str]], Tensors]) -> list[Image.Image]:
        """Validation images, from the embeddings that `condition` gives for prompts."""
        options, count = self._run.options, self._run.options.num_validation_images
        positive, negative = condition([self.prompt] * count), condition([""] * count)
        return self._pipe(
            **positive,
            **{f"negative_{name}": tensor for name, tensor in negative.items()},
            negative_prompt=None,  # PixArt's is "" by default, and goes with prompts only
            num_inference_steps=options.validation_inference_steps,
            guidance_scale=options.validation_guidance_scale,
            generator=sample_generators(options.seed, count),
            **self._settings,
        ).images

    def _class_images(self) -> list[Item]:
        options = self._run.options
        chosen = {"num_inference_steps": options.class_inference_steps, "guidance_scale": options.class_guidance_scale}
        settings = {**self._settings, **{name: value for name, value in chosen.items() if value is not None}}

        def draw(count: int, draws: list[torch.Generator]) -> list[Image.Image]:
            with self._run.accelerator.autocast():  # the VAE is fp32
                return self._pipe([options.class_prompt] * count, generator=draws, **settings).images

        made_by = key_of("class image", options.class_prompt, pipeline_key(self._pipe), settings)
        place = (Path(options.class_data_dir), options.class_prompt, options.num_class_images)
        return ClassImages(*place, made_by).complete(self._run, draw)


def free(pipe: Any, names: Iterable[str]) -> None:
    """Drop components of a pipeline and the memory that they hold."""
    pipe.register_modules(**dict.fromkeys(names))
    free_memory()
