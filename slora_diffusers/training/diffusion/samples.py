"""The batches of a run: training batches of every process, fixed ones for validation, and the clean latents of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from accelerate.logging import get_logger
from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..data.cache import Latents, TensorCache
from ..data.images import Item, Shape, content_of
from ..data.order import Rows, enlarged, nearest_shape
from ..options import CommonOptions
from ..place import Place
from ..residence import bring
from .validation import fixed_batches

logger: Any = get_logger(__name__)


class Samples:
    """Everything that a run reads.

    Args:
        place: The processes.
        options: How images are cut, cached and put into batches.
        vae: Encodes pixels.
        items: The images to train on.
        unseen: The images of the fixed-noise validation loss.
        shapes: Shapes (height, width) that images are cut to; each takes the one nearest to its own.
        prior: Images of the class, for prior preservation.

    Attributes:
        per_epoch: Micro-batches of one pass over the images.
    """

    def __init__(
        self, place: Place, options: CommonOptions, vae: nn.Module, items: Sequence[Item], unseen: Sequence[Item],
        shapes: list[Shape], prior: Sequence[Item] = (),
    ) -> None:  # fmt: skip
        cache = TensorCache(options.encodings_dir or place.output_dir / "cache") if options.cache_latents else None
        self._latents = Latents(vae, cache, not options.center_crop, options.random_flip, place.device)
        rows = Rows.of(items, shapes, options.train_batch_size * place.processes, options.seed)
        self.per_epoch = rows.per_epoch
        place.identities["the images, captions and weights"] = content_of(items, prior)
        for line in rows.report():
            logger.info(line)
        for line in (*rows.waste(), *enlarged(items, rows.shapes)):
            logger.warning(line)
        beside: dict[int, set[Shape]] = {}  # the shapes that a concept's class images are cut to
        for item, shape in zip(items, rows.shapes, strict=True):
            beside.setdefault(item.concept, set()).add(shape)
        own = [[shape] for shape in rows.shapes]
        fixed = [[nearest_shape(item, shapes)] for item in unseen]
        self._place, self._vae = place, vae
        if cache is None:
            vae.to(place.device)
        with self.decoding():
            for images, needed in ((items, own), (unseen, fixed), (prior, [sorted(beside[i.concept]) for i in prior])):
                self._latents.fill(*place.share(images, needed))
        place.wait()
        this_one = (place.accelerator.process_index, place.processes)
        self._batches = Batches(items, rows, self._latents.fetch, *this_one, prior=prior)
        self._unseen, self._shapes, self._options, self._prior = unseen, shapes, options, len(prior)

    def describe(self) -> dict[str, str]:
        """What is learnt from: counts of images, and the shapes that they are cut to."""
        counts = sorted(self._batches.rows.counts.items())
        lines = {
            "images": f"{len(self._batches.items)}, and {len(self._unseen)} in the validation loss",
            "samples per epoch": ", ".join(f"{count} of {height} x {width}" for (height, width), count in counts),
        }
        if self._options.cache_latents:
            lines["VAE"] = f"on {next(self._vae.parameters()).device}, but for pictures: latents are cached"
        return lines | ({"class images": str(self._prior)} if self._prior else {})

    def decoding(self) -> AbstractContextManager[None]:
        """Inside, the VAE is on the run's device; with cached latents it is not otherwise."""
        return bring(self._place.device, self._vae)

    def latents(self, batch: Batch) -> Tensor:
        """z_0 of a batch, (B, C, h, w) in fp32."""
        return self._latents(batch)

    def read(self, start: int) -> Iterator[Batch]:
        """Training batches from micro-step `start` on, without end."""
        return self._batches.read(start, self._options.dataloader_num_workers)

    def fixed(self) -> Iterator[Batch]:
        """The validation images, one to a batch, the same at every call."""
        return fixed_batches(self._unseen, self._shapes, self._latents.fetch, self._options.seed)


def evenly_spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, spread over all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
