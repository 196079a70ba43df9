"""One recipe for flow models whose pipelines differ in little: how texts are encoded, what the transformer reads.

z = (1 - sigma) z_0 + sigma eps, and a family's `velocity` gives eps - z_0 (Esser et al., arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

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

Tensors = dict[str, Tensor]

Options = TextToImageOptions
"""What every one of these recipes takes."""


@dataclass(frozen=True)
class Family:
    """What is particular to a pipeline.

    Args:
        pipeline: Its class.
        transformer: The class of its transformer.
        encode: The pipeline, a text and a length in tokens to the pipeline's own embeddings, named as its arguments.
        velocity: The pipeline, the transformer to call, latents (B, C, h, w), timesteps (B,) in fp32 of 0 to 1000 and
            embeddings to eps - z_0, of the latents' shape.
        length: Tokens of a text.
        patch: Latents per token along a side.
        side: Side of images in pixels where the transformer's config does not tell.
        call: Further arguments of the pipeline's call.
        arguments: Embeddings as the pipeline's call takes them.
        check: Raises SerialLoraError for a pipeline that the recipe does not train.
    """

    pipeline: Any
    transformer: Any
    encode: Callable[[Any, str, int], Tensors]
    velocity: Callable[[Any, Any, Tensor, Tensor, Tensors], Tensor]
    length: int
    patch: int
    side: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[Tensors], dict[str, Any]] = lambda text: text
    check: Callable[[Any], None] = lambda pipe: None


def train(family: Family, description: str | None, argv: Sequence[str] | None = None) -> Path:
    """Train, and return the path of what was trained.

    Args:
        family: What to train.
        description: What --help says.
        argv: The command line; that of the process by default.
    """
    options = parse(Options, description, argv)
    items, unseen = find_instances(options)
    check_sites(family.transformer, options)
    place = Place(options)

    pipe = load_pipeline(family.pipeline, family.transformer, options, place.weight_dtype)
    family.check(pipe)
    length = options.max_sequence_length or family.length
    size = {"patch": family.patch, "side": family.side}
    encode = lambda text: family.encode(pipe, text, length)  # noqa: E731
    subject = Subject(place, options, pipe, items, unseen, encode, length, **size, **family.call)
    texts = subject.texts
    free(pipe, [name for name in pipe.components if name.startswith("text_encoder")])
    samples = subject.samples()

    attach(pipe.transformer, options)
    settle(pipe.transformer, options, place)
    objective = objective_for(pipe.scheduler, options, tokens=subject.tokens)
    run = Run(place, options, {"transformer": pipe.transformer}, samples.per_epoch)
    transformer = run.called["transformer"]

    def condition(captions: Sequence[str]) -> Tensors:
        found = texts(captions)
        return {n: t.to(place.weight_dtype) if t.is_floating_point() else t for n, t in found.items()}

    def predict(noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text = condition(captions_of(batch, options.proportion_empty_prompts))
        with place.autocast():
            return family.velocity(pipe, transformer, noisy.to(place.weight_dtype), timesteps, text)

    draw = lambda: subject.draw(lambda prompts: family.arguments(condition(prompts)))  # noqa: E731
    task = Denoising(run, samples, objective, predict, draw, options.num_validation_images)
    return fit(run, task, [Validation(task.validate)])
