"""Draw a batch of requests with a pipeline of diffusers, each as it would be drawn alone."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SerialLoraError
from .errors import RequestError
from .requests import LIMITS, Body, Limits, Request, chosen_adapters

logger = logging.getLogger("diffusers.slora_diffusers")

MOST_DEFAULT_STEPS = 50
"""DiTPipeline's own default is 250 steps, which no solver of today needs."""

Entry = Mapping[str, float] | None
"""{name in the model: weight w_i} of the adapters of one sample, or None for the base."""


@dataclass(frozen=True)
class Picture:
    """What a request gave: the image, and the latents (c, h, w) that it was decoded from."""

    image: Image.Image
    latents: Tensor


class Guidance(float):
    """A guidance scale of its own for every sample.

    Pipelines compare the scale with 1 and multiply a difference of predictions by it. As a number this is the largest
    of the scales, and as a factor of a tensor (b, ...) a column of them.
    """

    def __new__(cls, scales: Sequence[float]) -> Guidance:
        self = super().__new__(cls, max(scales))
        self.scales = tuple(scales)
        return self

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return super().__mul__(other)
        column = torch.tensor(self.scales, dtype=other.dtype, device=other.device)
        return column.view(-1, *[1] * (other.ndim - 1)) * other

    __rmul__ = __mul__


class Studio:
    """A pipeline that draws requests, joined in one batch where they allow it.

    Whether requests may share a batch, and whether each may have a guidance scale of its own, depends on the pipeline:
    a scheduler may draw noise for the whole batch at once, a model may embed one scale for all. `rehearse` finds out by
    drawing two requests alone and together.

    Args:
        pipe: A DiffusionPipeline that draws images of prompts or classes.
        limits: What one request may ask for.

    Raises:
        SerialLoraError: If the pipeline needs more than a prompt or a class.
    """

    def __init__(self, pipe: Any, limits: Limits = LIMITS) -> None:
        self.pipe, self.limits = pipe, limits
        self.takes = inspect.signature(pipe.__call__).parameters
        self.subject = "class_labels" if "class_labels" in self.takes else "prompt"
        empty, kinds = inspect.Parameter.empty, (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [name for name, p in self.takes.items() if p.default is empty and p.kind not in kinds]
        if self.subject not in self.takes or set(needed) - {self.subject}:
            raise SerialLoraError(
                f"{type(pipe).__name__} cannot be served: it has to draw from a prompt or a class alone, but takes "
                f"{', '.join(needed or self.takes)}. Give a text-to-image or class-to-image pipeline as the base."
            )
        pipe.set_progress_bar_config(disable=True)
        self.joins = False  # whether a batch may hold several requests at all
        self.mixes_guidance = False  # and requests of different guidance scales

    def request(self, body: Body) -> Request:
        """The request that a body stands for, complete.

        Raises:
            RequestError: If a value is not one that this pipeline and its limits allow.
        """
        steps = body.steps or min(self._default("num_inference_steps", MOST_DEFAULT_STEPS), MOST_DEFAULT_STEPS)
        if steps > self.limits.steps:
            raise RequestError(f"steps: at most {self.limits.steps} are allowed here; got {steps}.")
        guidance = self._default("guidance_scale", None) if body.guidance is None else body.guidance
        if body.guidance is not None and "guidance_scale" not in self.takes:
            raise RequestError(f"guidance: {type(self.pipe).__name__} takes no guidance scale; leave it out.")
        if body.negative_prompt and "negative_prompt" not in self.takes:
            raise RequestError(f"negative_prompt: {type(self.pipe).__name__} takes none; leave it out.")
        return Request(
            self._condition(body),
            secrets.randbits(32) if body.seed is None else body.seed,
            steps,
            None if guidance is None else float(guidance),
            self._size(body.size),
            body.negative_prompt or "",
            chosen_adapters(body.adapters, self.limits),
        )

    def key(self, request: Request) -> Hashable:
        """Requests of one key may share a batch."""
        if not self.joins:
            return id(request)
        scale = request.guidance
        return request.size, request.steps, None if scale is None else scale > 1 if self.mixes_guidance else scale

    def draw(
        self,
        requests: Sequence[Request],
        entries: Sequence[Entry] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Picture | SerialLoraError]:
        """Draw requests of one key in one batch.

        Args:
            requests: The requests.
            entries: Names in the model, and weights, of the adapters of each; the base alone by default.
            on_step: Called with the number of steps done and of all steps; what it raises ends the batch.

        Returns:
            For each request its picture, or why there is none.
        """
        with self._adapted(entries or [None] * len(requests)), self._noise(requests):
            images, latents = self._run(requests, on_step)
        return [self._picture(image, x) for image, x in zip(images, latents, strict=True)]

    def rehearse(self) -> None:
        """Draw two requests in two steps, alone and together, and set what requests of a batch may differ in.

        Raises:
            SerialLoraError: If the pipeline gives no images.
        """
        first, second = self._probes()
        self.joins = self.mixes_guidance = False
        alone = [self._latents([request])[0] for request in (first, second)]
        plain = replace(second, guidance=first.guidance)
        same_scale = self._latents([plain])[0]
        # How much a request's own guidance matters: in half precision, rounding has to stay well below that.
        apart = (alone[1] - same_scale).abs().max().item()
        for mixes, request, wanted in ((True, second, alone[1]), (False, plain, same_scale)):
            self.joins, self.mixes_guidance = True, mixes
            together = self._latents([first, request])
            allowed = [self._rounding(x, apart if mixes else None) for x in (alone[0], wanted)]
            errors = [(x - y).abs().max().item() for x, y in zip(together, (alone[0], wanted), strict=True)]
            if all(error <= limit for error, limit in zip(errors, allowed, strict=True)):
                return
        self.joins = self.mixes_guidance = False
        logger.warning(
            "%s gives a request another image in a batch than alone, so every request is drawn by itself: its "
            "scheduler, %s, may draw noise for the whole batch at once.",
            type(self.pipe).__name__,
            type(self.pipe.scheduler).__name__,
        )

    def _rounding(self, latents: Tensor, apart: float | None) -> float:
        """How far latents drawn in a batch may lie from those drawn alone, by the precision of the pipeline."""
        largest = max(1.0, latents.abs().max().item())
        if self.pipe.dtype == torch.float32:
            return 1e-4 * largest
        return 0.05 * largest if apart is None else min(0.05 * largest, 0.25 * apart)

    def _probes(self) -> tuple[Request, Request]:
        """Two small requests that differ in all that requests of one schedule may differ in."""
        texts = (0, 1) if self.subject == "class_labels" else ("a", "a photo of a small red fox in the deep snow")
        scale = self._default("guidance_scale", None)
        scales = (None, None) if scale is None else (max(scale, 1.5), max(scale, 1.5) + 2.0)
        size = 16 * self._multiple()
        sizes = (size, size) if {"height", "width"} <= set(self.takes) else None
        first, second = (Request(c, seed, 2, s, sizes) for c, seed, s in zip(texts, (0, 1), scales, strict=True))
        return first, second

    def _picture(self, image: np.ndarray, latents: Tensor) -> Picture | SerialLoraError:
        if np.isfinite(image).all() and torch.isfinite(latents).all():
            return Picture(self.pipe.numpy_to_pil(image)[0], latents)
        if torch.isfinite(latents).all():
            return RequestError("The image is not finite: the VAE overflows in this dtype. Serve with another --dtype.")
        return RequestError("The image is not finite: a weight of an adapter, or the guidance scale, is too large.")

    def _latents(self, requests: Sequence[Request]) -> Tensor:
        with self._noise(requests):
            return self._run(requests, None)[1]

    def _run(
        self, requests: Sequence[Request], on_step: Callable[[int, int], None] | None
    ) -> tuple[np.ndarray, Tensor]:
        """The images (b, H, W, 3) in [0, 1], and the latents that they were decoded from."""
        first = requests[0]
        arguments: dict[str, Any] = {
            self.subject: [request.condition for request in requests],
            "num_inference_steps": first.steps,
            "output_type": "np",
            "generator": [torch.Generator().manual_seed(request.seed) for request in requests],
        }
        if first.guidance is not None:
            scales = [float(request.guidance or 0) for request in requests]
            arguments["guidance_scale"] = Guidance(scales) if len(set(scales)) > 1 else scales[0]
        if "negative_prompt" in self.takes and any(request.negative for request in requests):
            arguments["negative_prompt"] = [request.negative for request in requests]
        if first.size is not None:
            arguments["height"], arguments["width"] = first.size
            if "use_resolution_binning" in self.takes:
                arguments["use_resolution_binning"] = False  # PixArt would round the size to one of its own
        with _watched(self.pipe.scheduler, on_step) as seen, torch.no_grad():
            output = self.pipe(**arguments)
        images = getattr(output, "images", None)
        if not isinstance(images, np.ndarray) or len(images) != len(requests) or "latents" not in seen:
            raise SerialLoraError(f"{type(self.pipe).__name__} cannot be served: it gives no image for each prompt.")
        return images, seen["latents"][: len(requests)].float().cpu()

    def _adapted(self, entries: Sequence[Entry]) -> AbstractContextManager[None]:
        if not any(entries):
            return nullcontext()
        return self.pipe.serial_lora_batch([dict(entry) if entry else None for entry in entries])

    @contextmanager
    def _noise(self, requests: Sequence[Request]) -> Iterator[None]:
        """Where a request is drawn by itself, noise that a scheduler takes from torch's own generator is its own."""
        if self.joins:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(requests[0].seed)
            yield

    def _condition(self, body: Body) -> str | int:
        if self.subject == "prompt":
            if body.prompt is None or body.label is not None:
                raise RequestError("This base draws prompts: give a prompt, and no class.")
            return body.prompt
        if body.label is None or body.prompt is not None:
            raise RequestError("This base draws classes: give a class (its name or number), and no prompt.")
        names: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        known = set(names.values()) or set(range(self.pipe.transformer.config.num_embeds_ada_norm))
        label = names.get(body.label) if isinstance(body.label, str) else body.label
        if label not in known:
            shown = list(names)[:5] if names else []
            these = f"{', '.join(shown)}, ... or " if shown else ""
            raise RequestError(f"class: must be {these}a number from {min(known)} to {max(known)}; got {body.label!r}.")
        return label

    def _size(self, size: int | list[int] | None) -> tuple[int, int] | None:
        sides = [size] * 2 if isinstance(size, int) else size
        if sides is None:
            return None
        if len(sides) != 2:
            raise RequestError(f"size: must be one number or [height, width]; got {sides}.")
        if not {"height", "width"} <= set(self.takes):
            own = self.own_side()
            if sides != [own, own]:
                raise RequestError(f"size: this base draws {own} x {own} pixels only; got {sides}.")
            return None
        multiple = self._multiple()
        if any(side % multiple or side > self.limits.side for side in sides):
            raise RequestError(f"size: must be multiples of {multiple} up to {self.limits.side}; got {sides}.")
        return sides[0], sides[1]

    def own_side(self) -> int:
        """Pixels of a side of an image of the pipeline's own size."""
        denoiser = getattr(self.pipe, "transformer", None) or self.pipe.unet
        return denoiser.config.sample_size * self._scale_factor()

    def _scale_factor(self) -> int:
        if hasattr(self.pipe, "vae_scale_factor"):
            return self.pipe.vae_scale_factor
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)  # DiTPipeline does not say

    def _multiple(self) -> int:
        denoiser = getattr(self.pipe, "transformer", None)
        patch = getattr(getattr(denoiser, "config", None), "patch_size", 1)
        return self._scale_factor() * max(2, patch if isinstance(patch, int) else 1)

    def _default(self, name: str, otherwise: Any) -> Any:
        return self.takes[name].default if name in self.takes else otherwise


@contextmanager
def _watched(scheduler: Any, on_step: Callable[[int, int], None] | None) -> Iterator[dict[str, Any]]:
    """Inside, `scheduler.step` reports every step, and its last samples are kept as `latents`.

    Every pipeline steps its scheduler once per step; callbacks for it only some pipelines have.
    """
    step, seen = scheduler.step, {}
    own = vars(scheduler).get("step")  # somebody else's wrapper

    @functools.wraps(step)  # pipelines look at its signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        seen["latents"], seen["done"] = output[0], seen.get("done", 0) + 1
        if on_step is not None:
            on_step(seen["done"], len(scheduler.timesteps))
        return output

    scheduler.step = watched
    try:
        yield seen
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
