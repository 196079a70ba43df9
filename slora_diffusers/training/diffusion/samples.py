"""The batches of a run: training batches of every process, fixed ones for validation, and the clean latents of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..data.batches import Batch, Batches, Rows, Shape
from ..data.cache import Latents, TensorCache
from ..data.images import Item
from ..run import Run
from .validation import fixed_batches


class Samples:
    """Everything that a run reads.

    Args:
        run: Knows the options and the processes.
        vae: Encodes pixels.
        items: The images to train on.
        unseen: The images of the fixed-noise validation loss.
        shapes: Shapes (height, width) that images are cut to; each takes the one nearest to its own.
        prior: Images of the class, for prior preservation.
    """

    def __init__(
        self, run: Run, vae: nn.Module, items: Sequence[Item], unseen: Sequence[Item], shapes: list[Shape],
        prior: Sequence[Item] = (),
    ) -> None:  # fmt: skip
        options, accelerator = run.options, run.accelerator
        cache = TensorCache(options.encodings_dir or run.output_dir / "cache") if options.cache_latents else None
        self._latents = Latents(vae, cache, not options.center_crop, options.random_flip, run.device)
        rows = Rows.of(items, shapes, run.rows, options.seed)
        run.count_steps(rows.per_epoch)
        used = sorted(set(rows.shapes))
        own = [[shape] for shape in rows.shapes]
        fixed = [[shape] for shape in Rows.of(unseen, shapes, 1, options.seed).shapes] if unseen else []
        for images, needed in ((items, own), (unseen, fixed), (prior, [used] * len(prior))):
            self._latents.fill(*run.share(images, needed))
        accelerator.wait_for_everyone()
        place = (accelerator.process_index, accelerator.num_processes)
        self._batches = Batches(items, rows, self._latents.fetch, *place, prior=prior)
        self._unseen, self._shapes, self._options = unseen, shapes, options

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
