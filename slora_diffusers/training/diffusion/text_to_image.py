"""What the text-to-image recipes share: their options, their images and captions, prior images and text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from PIL import Image

from ...errors import SerialLoraError
from ..data.batches import Batch
from ..data.cache import TensorCache, Tensors, cache_texts, vae_factor
from ..data.folders import find_images, from_dataset
from ..data.identity import key_of, pipeline_key
from ..data.images import Item
from ..data.labelled import open_dataset
from ..data.order import bucket_shapes
from ..options import ANY, COUNT, NOT_NEGATIVE, SHARE, CommonOptions
from ..parsing import FREE, option
from ..place import Place
from .class_images import ClassImages
from .samples import Samples, evenly_spread
from .validation import sample_generators


@dataclass(frozen=True)
class TextToImageOptions(CommonOptions):
    """Images and captions."""

    instance_data_dir: str | None = option(None, "Folder of the images (and captions) to train on.")
    instance_prompt: str | None = option(None, "Caption of images that have none of their own.")
    dataset_name: str | None = option(None, "Data set to train on instead: Hub id, or folder of save_to_disk.")
    dataset_config_name: str | None = option(None, "Config of that data set.")
    image_column: str = option("image", "Its column of images.")
    caption_column: str = option("text", "Its column of captions.")
    with_prior_preservation: bool = option(False, "Train on images of the class too, so that it is not forgotten.")
    class_data_dir: str | None = option(None, "Folder of the class images; missing ones are drawn with the base.")
    class_prompt: str | None = option(None, "Caption of the class images.")
    num_class_images: int = option(100, "How many class images there are to be.", within=COUNT)
    prior_loss_weight: float = option(1.0, "Weight of the class images' loss.", within=NOT_NEGATIVE)
    sample_batch_size: int = option(4, "Class images that are drawn at a time.", within=COUNT, resume=FREE)
    class_inference_steps: int | None = option(
        None, "Sampling steps of the class images; the pipeline's own by default.", within=COUNT
    )
    class_guidance_scale: float | None = option(
        None, "Guidance scale of the class images; the pipeline's own by default.", within=ANY
    )
    proportion_empty_prompts: float = option(0.0, "Share of samples that get the empty prompt.", within=SHARE)
    max_sequence_length: int | None = option(
        None, "Tokens of the T5 encoder; the model's own by default.", within=COUNT
    )
    validation_prompt: str | None = option(
        None, "Prompt of the validation images; the first caption by default.", resume=FREE
    )
    validation_data_dir: str | None = option(
        None, "Images for the validation loss; the training images by default.", resume=FREE
    )


def find_instances(options: TextToImageOptions) -> tuple[list[Item], list[Item]]:
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
        place: The processes; they share the work.
        options: They name the cache's folder.
        pipe: The pipeline; all but its transformer, VAE and scheduler is part of the cache's keys.
        encode: One text to named tensors, each with a batch dimension of 1, named as the pipeline's arguments.
        length: Tokens of the T5 encoder.
    """

    def __init__(
        self, place: Place, options: TextToImageOptions, pipe: Any, encode: Callable[[str], Tensors], length: int
    ) -> None:
        self._place, self._encode = place, encode
        self._cache = TensorCache(options.encodings_dir or place.output_dir / "cache")
        # All that may shape an embedding: encoders and their adapters, tokenizers, processors, the pipeline's settings.
        self._maker = key_of(pipeline_key(pipe, "transformer", "vae", "scheduler"), length, str(place.weight_dtype))
        self._keys: dict[str, str] = {}

    def fill(self, texts: Iterable[str]) -> None:
        """Encode what the cache lacks; processes share the work."""

        @torch.no_grad()
        def encode(text: str) -> Tensors:
            return {name: tensor[0] for name, tensor in self._encode(text).items()}

        wanted = sorted(set(texts))
        (mine,) = self._place.share(wanted)
        cache_texts(self._cache, mine, encode, self._maker)
        self._place.wait()
        self._keys |= cache_texts(self._cache, wanted, encode, self._maker)

    def __call__(self, texts: Sequence[str]) -> Tensors:
        """The embeddings of texts, stacked, on the run's device."""
        entries = [self._cache[self._keys[text]] for text in texts]
        return {name: torch.stack([entry[name] for entry in entries]).to(self._place.device) for name in entries[0]}


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
        place: The processes.
        options: The options.
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
        self, place: Place, options: TextToImageOptions, pipe: Any, items: list[Item], unseen: list[Item],
        encode: Callable[[str], Tensors], length: int, patch: int | None = None, side: int | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        config, factor = pipe.transformer.config, vae_factor(pipe.vae)
        self._place, self._options, self._pipe, self._items = place, options, pipe, items
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
        self.texts = Texts(place, options, pipe, encode, length)
        self.texts.fill([item.caption for item in (*items, *unseen, *self._prior)] + [self.prompt, ""])

    def samples(self) -> Samples:
        """The run's batches; latents are cached here, if they are to be."""
        vae, options = self._pipe.vae, self._options
        return Samples(self._place, options, vae, self._items, self._unseen, self.shapes, self._prior)

    def draw(self, condition: Callable[[Sequence[str]], Tensors]) -> list[Image.Image]:
        """Validation images, from the embeddings that `condition` gives for prompts."""
        options, count = self._options, self._options.num_validation_images
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
        options = self._options
        assert options.class_data_dir is not None and options.class_prompt is not None
        chosen = {"num_inference_steps": options.class_inference_steps, "guidance_scale": options.class_guidance_scale}
        settings = {**self._settings, **{name: value for name, value in chosen.items() if value is not None}}

        def draw(count: int, draws: list[torch.Generator]) -> list[Image.Image]:
            with self._place.autocast():  # the VAE is fp32
                return self._pipe([options.class_prompt] * count, generator=draws, **settings).images

        made_by = key_of("class image", options.class_prompt, pipeline_key(self._pipe), settings)
        wanted = (Path(options.class_data_dir), options.class_prompt, options.num_class_images)
        return ClassImages(*wanted, made_by).complete(self._place, options.seed, options.sample_batch_size, draw)


def free(pipe: Any, names: Iterable[str]) -> None:
    """Drop components of a pipeline and the memory that they hold."""
    pipe.register_modules(**dict.fromkeys(names))
    free_memory()
