"""The order of training images: which of them make a row, in which shape, and which class image goes with each.

A *row* is what all processes read at one micro-step: up to `batch size x processes` samples of one shape. An epoch
shows every image once, or as often as it is repeated, whatever the shapes: where the images of a shape do not fill its
last row, that row is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string

from ...errors import SerialLoraError
from ..randomness import generator
from .images import Item, Shape


def bucket_shapes(resolution: int, buckets: str | None, multiple: int) -> list[Shape]:
    """The shapes (height, width) that images are cut to.

    Args:
        resolution: Side of the square, and the root of the area of other shapes, in pixels.
        buckets: None for the square alone, "auto" for common aspect ratios, or "height,width;height,width".
        multiple: What every side must be a multiple of (VAE factor times patch size).

    Raises:
        SerialLoraError: If a side is not a multiple, or the text cannot be read.
    """
    if buckets == "auto":
        return generate_aspect_ratio_buckets(resolution, divisibility=multiple)
    try:
        shapes = parse_buckets_string(buckets) if buckets else [(resolution, resolution)]
    except ValueError as error:
        raise SerialLoraError(f"--aspect_ratio_buckets must be auto or 'height,width;...'; {error}") from error
    if wrong := [shape for shape in shapes if shape[0] % multiple or shape[1] % multiple or min(shape) < 1]:
        raise SerialLoraError(
            f"{wrong[0][0]} x {wrong[0][1]} pixels do not divide into the model's patches: every side (--resolution, "
            f"--aspect_ratio_buckets) must be a multiple of {multiple}."
        )
    return shapes


def nearest_shape(item: Item, shapes: Sequence[Shape]) -> Shape:
    """The shape nearest to an item's aspect ratio: of its own shapes, if it has any."""
    choice = list(item.shapes or shapes)
    return choice[find_nearest_bucket(*item.size, choice) or 0]


def enlarged(items: Sequence[Item], shapes: Sequence[Shape]) -> list[str]:
    """A line about the images that are smaller than the shape they are cut to, if there are any."""
    scales = [max(h / item.size[0], w / item.size[1]) for item, (h, w) in zip(items, shapes, strict=True)]
    small = [place for place, scale in enumerate(scales) if scale > 1]
    if not small:
        return []
    worst = max(small, key=lambda place: scales[place])
    return [
        f"{len(small)} of {len(items)} images are smaller than what they are cut to, and are enlarged, "
        f"{items[worst].name} {scales[worst]:.1f} times: larger originals or a smaller --resolution are sharper"
    ]


class Rows:
    """The order of samples: shuffled again each epoch, every row of one shape, every item in it as often as it says.

    Args:
        shapes: Shape of each item.
        size: Samples per row at most, over all processes.
        seed: The run's seed.
        repeats: How often an epoch has each item; once by default.
    """

    def __init__(self, shapes: Sequence[Shape], size: int, seed: int, repeats: Sequence[int] | None = None) -> None:
        self.shapes, self.size, self.seed = list(shapes), size, seed
        times = repeats or [1] * len(self.shapes)
        self._entries = [index for index, count in enumerate(times) for _ in range(count)]
        self.counts = Counter(self.shapes[index] for index in self._entries)
        self.per_epoch = sum(-(-count // size) for count in self.counts.values())
        self.longest = min(size, max(self.counts.values(), default=size))
        self._table: tuple[int, list[list[int]]] = (-1, [])

    @classmethod
    def of(cls, items: Sequence[Item], shapes: Sequence[Shape], size: int, seed: int) -> Rows:
        """Give every item the shape nearest to its own aspect ratio."""
        return cls([nearest_shape(item, shapes) for item in items], size, seed, [item.repeats for item in items])

    def __getitem__(self, number: int) -> list[int]:
        """The items of row `number`, counted over epochs."""
        epoch, position = divmod(number, self.per_epoch)
        return self.epoch(epoch)[position]

    def epoch(self, epoch: int) -> list[list[int]]:
        """All rows of an epoch."""
        if self._table[0] != epoch:
            self._table = (epoch, self._shuffle(epoch))
        return self._table[1]

    def report(self) -> list[str]:
        """What there is to say about shapes before training: how many samples each has, and which rows are short."""
        lines = []
        if len(self.counts) > 1:
            each = ", ".join(f"{h} x {w}: {count}" for (h, w), count in sorted(self.counts.items()))
            lines.append(f"samples per epoch by shape (height x width): {each}")
        if short := [count for count in self.counts.values() if count % self.size]:
            lines.append(
                f"{len(short)} of the {self.per_epoch} batches of an epoch hold fewer than {self.size} samples, over "
                "all processes, so that every image is seen equally often and no batch mixes shapes"
            )
        return lines

    def waste(self) -> list[str]:
        """A line where rows are less than half full on average."""
        mean = len(self._entries) / max(1, self.per_epoch)
        if mean >= self.size / 2:
            return []
        return [
            f"a batch holds {mean:.1f} of {self.size} samples on average: a smaller --train_batch_size, or fewer "
            "--aspect_ratio_buckets, train faster"
        ]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, "order", epoch)
        members: dict[Shape, list[int]] = {}
        for place in torch.randperm(len(self._entries), generator=draw).tolist():
            index = self._entries[place]
            members.setdefault(self.shapes[index], []).append(index)
        rows = []
        for _, indices in sorted(members.items()):
            rows += [indices[start : start + self.size] for start in range(0, len(indices), self.size)]
        if len(members) == 1:
            return rows
        return [rows[i] for i in torch.randperm(len(rows), generator=draw).tolist()]


class ClassOrder:
    """Which image of the class goes with which sample: each concept's, one after the other in an order of their own.

    Args:
        prior: Images of the class.
        items: The images of the subject; each gets one of its own concept's class images, if that has any.
        rows: The order of the subject's images.
    """

    def __init__(self, prior: Sequence[Item], items: Sequence[Item], rows: Rows) -> None:
        self._items, self._rows = items, rows
        self._own: dict[int, list[Item]] = {}
        for item in prior:
            self._own.setdefault(item.concept, []).append(item)
        self._orders = {c: Rows([(0, 0)] * len(own), len(own), rows.seed + 1) for c, own in self._own.items()}
        self._table: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, number: int, position: int) -> Item | None:
        """The class image beside the sample at `position` of row `number`; None if its concept has none."""
        epoch, place = divmod(number, self._rows.per_epoch)
        if self._table[0] != epoch:
            self._table = (epoch, self._ordinals(epoch))
        concept = self._items[self._rows[number][position]].concept
        if concept not in self._own:
            return None
        turn, index = divmod(self._table[1][place][position], len(self._own[concept]))
        return self._own[concept][self._orders[concept][turn][index]]

    def _ordinals(self, epoch: int) -> list[list[int]]:
        """How many samples of its own concept came before each sample, since the run began."""
        rows = self._rows.epoch(epoch)
        in_an_epoch = Counter(self._items[index].concept for row in rows for index in row)
        seen = Counter({concept: epoch * count for concept, count in in_an_epoch.items()})
        table = []
        for row in rows:
            ordinals = []
            for index in row:
                ordinals.append(seen[concept := self._items[index].concept])
                seen[concept] += 1
            table.append(ordinals)
        return table
