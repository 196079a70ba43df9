"""Where an image lies in a model's input (stretched, padded, cropped, or as it is), and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SerialLoraError
from .losses import IGNORE_INDEX

Shape = tuple[int, int]  # height and width in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom
NEAREST, BILINEAR = 0, 2  # as Pillow numbers them
STRETCH, PAD, CROP, TILE = "stretch", "pad", "crop", "tile"


@dataclass(frozen=True)
class Frame:
    """One image in a model's input: the part of it that is seen, resized, in the upper left; the rest is padding.

    Args:
        size: Height and width of the input.
        image: Height and width of the image.
        box: The part of the image that is seen, in its pixels.
        shape: Height and width of that part in the input.
        mode: Key of `RESIZE_MODES`.
    """

    size: Shape
    image: Shape
    box: Box
    shape: Shape
    mode: str = STRETCH

    def resized(self, image: Any, resample: int = BILINEAR) -> Any:
        """The part of a PIL image that is seen, at its size in the input."""
        return image.resize(self.shape[::-1], resample, self.box)

    def fill(self, pixels: Tensor, value: float) -> Tensor:
        """Pixels (..., h, w) of that part as an input (..., H, W), with a value for padding."""
        (height, width), (h, w) = self.size, self.shape
        return F.pad(pixels, (0, width - w, 0, height - h), value=value)

    def pixel_mask(self) -> Tensor:
        """1 where the input is image, 0 where it is padding: (H, W), as transformers' `pixel_mask`."""
        return self.fill(torch.ones(self.shape), 0.0)

    def labels(self, mask: Any) -> Tensor:
        """Class indices of the image's pixels, a PIL image, as those of the input's, (H, W); padding is 255.

        Raises:
            SerialLoraError: If the mask is not of the image's size.
        """
        import numpy as np

        if mask.size != self.image[::-1]:
            raise SerialLoraError(f"The mask has (width, height) {mask.size}, its image {self.image[::-1]}.")
        return self.fill(torch.from_numpy(np.array(self.resized(mask, NEAREST))).long(), IGNORE_INDEX)

    def points(self, points: Tensor) -> Tensor:
        """Points (..., 2), x and y in pixels of the image, in pixels of the input. Of boxes, both corners."""
        left, top, right, bottom = self.box
        scale = points.new_tensor([self.shape[1] / (right - left), self.shape[0] / (bottom - top)])
        return (points - points.new_tensor([left, top])) * scale

    def restore(self, maps: Tensor) -> Tensor:
        """Maps (C, h, w) or (B, C, h, w) over the input, at any size, as maps over the image, at its own size.

        Raises:
            SerialLoraError: If part of the image was not seen.
        """
        if self.box != _all_of(self.image):
            raise SerialLoraError('Of a cropped image a part was not seen: use resize_mode="pad" or "stretch".')
        batch = maps[None] if maps.ndim == 3 else maps
        if self.mode != STRETCH:  # by way of the input's size, also where nothing is padded: as SAM's processor
            batch = _sized(batch, self.size)[..., : self.shape[0], : self.shape[1]]
        batch = _sized(batch, self.image)
        return batch[0] if maps.ndim == 3 else batch


def _sized(maps: Tensor, size: Shape) -> Tensor:
    same = tuple(maps.shape[-2:]) == size
    return maps if same else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _all_of(image: Shape) -> Box:
    height, width = image
    return 0, 0, width, height


def _stretched(image: Shape, size: Shape) -> tuple[Box, Shape]:
    return _all_of(image), size


def _padded(image: Shape, size: Shape) -> tuple[Box, Shape]:
    """The longest side fits, rounded as SAM does."""
    scale = min(size[0] / image[0], size[1] / image[1])
    height, width = (max(1, min(most, int(side * scale + 0.5))) for side, most in zip(image, size, strict=True))
    return _all_of(image), (height, width)


def _cropped(image: Shape, size: Shape) -> tuple[Box, Shape]:
    """The centre of the image that has the input's shape."""
    scale = min(image[0] / size[0], image[1] / size[1])  # pixels of the image for one of the input
    height, width = min(size[0] * scale, image[0]), min(size[1] * scale, image[1])  # min: of rounding
    top, left = (image[0] - height) / 2, (image[1] - width) / 2
    return (left, top, image[1] - left, image[0] - top), size


def _as_it_is(image: Shape, size: Shape) -> tuple[Box, Shape]:
    if image[0] > size[0] or image[1] > size[1]:
        raise SerialLoraError(
            f"An image of {image[0]} x {image[1]} pixels is seen in tiles of {size[0]} x {size[1]}: use "
            "model.predict(image)."
        )
    return _all_of(image), image


RESIZE_MODES: dict[str, Callable[[Shape, Shape], tuple[Box, Shape]]] = {
    STRETCH: _stretched,
    PAD: _padded,
    CROP: _cropped,
    TILE: _as_it_is,
}
"""Name -> from the sizes of image and input to the part that is seen, and its size in the input."""


def frame_of(image: Shape, size: Shape, mode: str) -> Frame:
    """Where an image of a size lies in an input of a size."""
    return Frame(size, image, *RESIZE_MODES[mode](image, size), mode)


def check_framed(labels: Tensor, pixels: Tensor, padded: bool) -> None:
    """Raise SerialLoraError if labels (..., h, w) cannot lie over a padded input; the bare image's would shift."""
    (height, width), (h, w) = pixels.shape[-2:], labels.shape[-2:]
    if padded and h * width != w * height:
        raise SerialLoraError(
            f"The input is padded, {height} x {width}, and the labels of {h} x {w} have another shape: lay them out in "
            "the same way, model.preprocessing.frame((height, width)).labels(mask)."
        )


def check_pixel_mask(pixel_mask: Tensor, pixels: Tensor) -> None:
    """Raise SerialLoraError unless a mask (B, H, W) is of its images (B, 3, H, W)."""
    expected = (len(pixels), *pixels.shape[-2:])
    if tuple(pixel_mask.shape) != expected:
        raise SerialLoraError(f"pixel_mask must be {expected}, 1 on the image; got {tuple(pixel_mask.shape)}.")


def ignore_padding(labels: Tensor, pixel_mask: Tensor) -> Tensor:
    """Class indices (B, h, w) with 255 where the input (B, H, W) is padding."""
    seen = F.interpolate(pixel_mask[:, None].float(), labels.shape[-2:], mode="nearest")[:, 0]
    return labels.masked_fill(seen == 0, IGNORE_INDEX)
