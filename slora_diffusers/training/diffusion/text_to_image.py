"""What the text-to-image recipes share: their options, their images and captions, prior images and text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from PIL import Image
from torch import Tensor, nn

from ...adapters.contexts import serial_lora_scale
from ...errors import SerialLoraError
from ..data.batches import Batch
from ..data.cache import TensorCache, Tensors, cache_texts, vae_factor
from ..data.folders import find_images
from ..data.identity import key_of, pipeline_key
from ..data.images import Item, Shape
from ..data.order import bucket_shapes
from ..options import ANY, COUNT, NOT_NEGATIVE, SHARE, CommonOptions
from ..parsing import FREE, option
from ..place import Place
from ..residence import bring, in_turns
from .class_images import ClassImages
from .concepts import ConceptOptions, concepts_of, find_concept
from .preferences import preferences
from .samples import Samples, evenly_spread
from .validation import sample_generators


@dataclass(frozen=True)
class TextToImageOptions(CommonOptions, ConceptOptions):
    """Text to image."""

    with_prior_preservation: bool = option(False, "Train on images of the class too, so that it is not forgotten.")
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
    rejected_data_dir: str | None = option(
        None, "For --objective dpo: a rejected image for each one to train on, of the same name."
    )
    validation_prompt: list[str] | None = option(
        None, "Prompts of the validation images; the first caption by default.", resume=FREE
    )
    validation_negative_prompt: list[str] | None = option(
        None, "Negative prompt of the validation images: one, or one for each prompt.", resume=FREE
    )
    validation_seeds: list[int] | None = option(
        None,
        "Seed of the validation images: one, or one for each prompt; --seed by default.",
        within="[0, 4294967295]",
        resume=FREE,
    )
    validation_adapter_weights: list[float] | None = option(
        None, "Weight of the adapter in the validation images: one, or one for each prompt.", within=ANY, resume=FREE
    )
    validation_data_dir: str | None = option(
        None, "Images for the validation loss; the training images by default.", resume=FREE
    )


def find_instances(options: TextToImageOptions) -> tuple[list[Item], list[Item]]:
    """The images to train on, and those to validate on.

    Raises:
        SerialLoraError: If there are none, or it is not clear which ones are meant.
    """
    check_preferences(options)
    views_of(options, "")
    items: list[Item] = []
    others = (options.output_dir, options.encodings_dir, options.validation_data_dir)
    without = [Path(folder) for folder in others if folder is not None]
    concepts = concepts_of(options)
    for number, concept in enumerate(concepts):
        if (concept.class_data_dir is None) != (concept.class_prompt is None) or (
            options.with_prior_preservation and len(concepts) == 1 and concept.class_prompt is None
        ):
            raise SerialLoraError("--with_prior_preservation needs --class_data_dir and --class_prompt.")
        items += find_concept(concept, number, options.seed, without)
    unseen = items
    if options.validation_data_dir is not None:
        unseen = find_images(options.validation_data_dir, prompt=options.instance_prompt or items[0].caption).items
    return items, unseen


def check_preferences(options: TextToImageOptions) -> None:
    """Raise SerialLoraError unless rejected images and an objective that knows them come together, and alone."""
    if options.objective == "dpo" and options.rejected_data_dir is None:
        raise SerialLoraError("--objective dpo needs --rejected_data_dir.")
    if options.rejected_data_dir is not None:
        if options.objective == "auto":
            raise SerialLoraError("--rejected_data_dir is for --objective dpo, or one of your own: say which.")
        if options.with_prior_preservation or options.dataset_config:
            raise SerialLoraError("--rejected_data_dir goes with one data set, and without class images.")


@dataclass(frozen=True)
class View:
    """One row of validation images; `weight` scales the adapter, None leaves it as it is."""

    prompt: str
    negative: str
    seed: int
    weight: float | None


def views_of(options: TextToImageOptions, caption: str) -> list[View]:
    """The prompts of validation, each with what is its own.

    Raises:
        SerialLoraError: If there are neither one nor as many seeds, negative prompts or weights as prompts.
    """
    prompts = options.validation_prompt or [caption]
    columns: list[Sequence[Any]] = [prompts]
    usual = {"validation_negative_prompt": "", "validation_seeds": options.seed, "validation_adapter_weights": None}
    for name, value in usual.items():
        given = getattr(options, name) or [value]
        if len(given) not in (1, len(prompts)):
            raise SerialLoraError(f"--{name} must be one, or one for each of {len(prompts)} prompts; got {len(given)}.")
        columns.append(given * len(prompts) if len(given) == 1 else given)
    if options.validation_adapter_weights and options.adapter != "serial":
        raise SerialLoraError(f"--validation_adapter_weights scales Serial LoRA; --adapter is {options.adapter}.")
    return [View(*row) for row in zip(*columns, strict=True)]


_NOT_ENCODERS = ("transformer", "vae", "scheduler")


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
        self._place, self._encode, self._pipe = place, encode, pipe
        self._cache = TensorCache(options.encodings_dir or place.output_dir / "cache")
        # All that may shape an embedding: encoders and their adapters, tokenizers, processors, the pipeline's settings.
        self._maker = key_of(pipeline_key(pipe, *_NOT_ENCODERS), length, str(place.weight_dtype))
        self._keys: dict[str, str] = {}

    def fill(self, texts: Iterable[str]) -> None:
        """Encode what the cache lacks, with the encoders on the device; processes share the work."""

        @torch.no_grad()
        def encode(text: str) -> Tensors:
            come()
            return {name: tensor[0] for name, tensor in self._encode(text).items()}

        wanted = sorted(set(texts))
        (mine,) = self._place.share(wanted)
        parts = self._pipe.components.items()
        encoders = [part for name, part in parts if name not in _NOT_ENCODERS and isinstance(part, nn.Module)]
        with ExitStack() as stack:
            come = cache(lambda: stack.enter_context(bring(self._place.device, *encoders)))
            cache_texts(self._cache, mine, encode, self._maker)
            self._place.wait()
            self._keys |= cache_texts(self._cache, wanted, encode, self._maker)

    def __call__(self, texts: Sequence[str]) -> Tensors:
        """The embeddings of texts, stacked, on the run's device."""
        entries = [self._cache[self._keys[text]] for text in texts]
        return {name: _stacked([entry[name] for entry in entries]).to(self._place.device) for name in entries[0]}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one, with zeros behind those of fewer tokens: a recipe whose texts differ in length has a mask."""
    longest = max(len(tensor) for tensor in tensors) if tensors[0].ndim else 0
    padded = [torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])]) if len(t) < longest else t for t in tensors]
    return torch.stack(padded)


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
        guidance: What the pipeline's call names its guidance scale.
        settings: Further arguments of the pipeline's call.
    """

    def __init__(
        self, place: Place, options: TextToImageOptions, pipe: Any, items: list[Item], unseen: list[Item],
        encode: Callable[[str], Tensors], length: int, patch: int | None = None, side: int | None = None,
        guidance: str = "guidance_scale", **settings: Any,
    ) -> None:  # fmt: skip
        config, factor = pipe.transformer.config, vae_factor(pipe.vae)
        self._place, self._options, self._pipe, self._guidance = place, options, pipe, guidance
        self._unseen = evenly_spread(unseen, options.validation_loss_images)
        token = (patch or config.patch_size) * factor  # pixels
        concepts = concepts_of(options)
        sides = [int(concept.resolution or side or config.sample_size * factor) for concept in concepts]
        shapes = [bucket_shapes(own, options.aspect_ratio_buckets, token) for own in sides]
        self.shapes, self._call = shapes[0], settings
        self._items = [replace(item, shapes=tuple(shapes[item.concept])) for item in items]
        height, width = self._square(sides[0], self.shapes)
        self.tokens = height * width // token**2
        largest = getattr(config, "pos_embed_max_size", None)
        if largest and max(max(shape) for own in shapes for shape in own) > largest * token:
            raise SerialLoraError(f"the transformer takes at most {largest * token} pixels a side: lower --resolution.")
        self._settings = {"height": height, "width": width, **settings}
        self._prior = [
            replace(item, concept=number)
            for number, concept in enumerate(concepts)
            if concept.class_prompt is not None and (options.with_prior_preservation or options.dataset_config)
            for item in self._class_images(concept, *self._square(sides[number], shapes[number]))
        ]
        if options.rejected_data_dir is not None:
            self._items, self._prior = preferences(self._items, options.rejected_data_dir)
        self._views = views_of(options, items[0].caption)
        self.texts = Texts(place, options, pipe, encode, length)
        told = [text for item in (*items, *unseen, *self._prior) for text in (item.caption, *item.variants)]
        self.texts.fill([*told, "", *(text for view in self._views for text in (view.prompt, view.negative))])

    def samples(self) -> Samples:
        """The run's batches; latents are cached here, if they are to be."""
        vae, options = self._pipe.vae, self._options
        return Samples(self._place, options, vae, self._items, self._unseen, self.shapes, self._prior)

    def draw(self, condition: Callable[[Sequence[str]], Tensors]) -> list[Image.Image]:
        """Validation images, a prompt's after the other's, from the embeddings that `condition` gives for prompts."""
        return [image for view in self._views for image in self._draw(view, condition)]

    def _draw(self, view: View, condition: Callable[[Sequence[str]], Tensors]) -> list[Image.Image]:
        options, count = self._options, self._options.num_validation_images
        positive, negative = condition([view.prompt] * count), condition([view.negative] * count)
        with nullcontext() if view.weight is None else serial_lora_scale(self._pipe, view.weight):
            drawn = self._pipe(
                **positive,
                **{f"negative_{name}": tensor for name, tensor in negative.items()},
                negative_prompt=None,  # PixArt's is "" by default, and goes with prompts only
                num_inference_steps=options.validation_inference_steps,
                generator=sample_generators(view.seed, count),
                **{self._guidance: options.validation_guidance_scale},
                **self._settings,
            )
        return _pictures(drawn)

    @staticmethod
    def _square(side: int, shapes: Sequence[Shape]) -> Shape:
        """The shape of validation and class images: the square, if it is one of the shapes."""
        return (side, side) if (side, side) in shapes else shapes[0]

    def _class_images(self, concept: TextToImageOptions, height: int, width: int) -> list[Item]:
        options, prompt = self._options, concept.class_prompt
        assert concept.class_data_dir is not None and prompt is not None
        chosen = {
            "num_inference_steps": options.class_inference_steps,
            self._guidance: options.class_guidance_scale,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        settings = {"height": height, "width": width, **self._call, **chosen}

        def draw(count: int, draws: list[torch.Generator]) -> list[Image.Image]:
            with in_turns(self._pipe, self._place.device), self._place.autocast():  # the VAE is fp32
                return _pictures(self._pipe([prompt] * count, generator=draws, **settings))

        made_by = key_of("class image", prompt, self._drawn_by, settings)
        wanted = ClassImages(Path(concept.class_data_dir), prompt, concept.num_class_images, made_by)
        return wanted.complete(self._place, options.seed, options.sample_batch_size, draw)

    @cached_property
    def _drawn_by(self) -> str:
        return pipeline_key(self._pipe)


def _pictures(output: Any) -> list[Image.Image]:
    """The images of a pipeline's output; of videos the first frames."""
    return output.images if hasattr(output, "images") else [frames[0] for frames in output.frames]


def free(pipe: Any, names: Iterable[str]) -> None:
    """Drop components of a pipeline and the memory that they hold."""
    pipe.register_modules(**dict.fromkeys(names))
    free_memory()
