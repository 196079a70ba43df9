"""What a model with a head says of an image: prepared as its file says, at the image's own size, or in tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .framing import TILE
from .preprocessing import pixels_of
from .tiling import averaged, blended, tiles


def predictions(model: Any, images: Sequence[Any]) -> Iterator[Tensor]:
    """Logits of PIL images, one after the other, in fp32 on the CPU; the model's mode (train, eval) stays.

    Args:
        model: A model with a head.
        images: Images of any size. They go through the model together, unless it sees them in tiles.

    Yields:
        (classes,), or of a model of pixels (classes, height, width) at the image's own size. In tiles: pixels are
        blended where tiles overlap; of an image's class the logits of the tiles are averaged.
    """
    prepare, like = model.preprocessing, next(model.backbone.parameters())
    if prepare.resize_mode == TILE:
        for image in images:
            with torch.no_grad():  # not around the yield: the caller goes on in between
                logits = _in_tiles(model, image, like)
            yield logits
        return
    prepared = [prepare.framed(image) for image in images]
    pixels, frames = torch.stack([x for x, _ in prepared]).to(like), [frame for _, frame in prepared]
    masks = torch.stack([frame.pixel_mask() for frame in frames]).to(like.device) if prepare.pads else None
    with torch.no_grad():
        output = model(pixels, **({} if masks is None else {"pixel_mask": masks})).logits.float()
    for logits, frame in zip(output, frames, strict=True):
        yield (frame.restore(logits) if model.of_pixels else logits).cpu()


def _in_tiles(model: Any, image: Any, like: Tensor) -> Tensor:
    prepare = model.preprocessing
    pixels = prepare.normalize(pixels_of(image))  # (3, H, W), on the CPU: a tile at a time goes to the device

    def run(area: Tensor, mask: Tensor) -> Tensor:
        return model(area.to(like), pixel_mask=mask.to(like.device)).logits

    seen = tiles(run, pixels, prepare.size, prepare.overlap)
    return (blended if model.of_pixels else averaged)(seen, tuple(pixels.shape[1:]), prepare.size, prepare.overlap)
