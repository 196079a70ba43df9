"""How an image becomes a backbone's input: size, scale and normalisation, saved with the head that expects them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import is_number
from ..errors import SerialLoraError
from .framing import PAD, RESIZE_MODES, STRETCH, TILE, Frame, frame_of

_LARGEST = 4096  # pixels along a side
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = ((0.5,) * 3, (0.5,) * 3)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_PRETRAINED_WITH = {"vit": _HALF, "beit": _HALF, "siglip": _HALF, "siglip2": _HALF, "clip": _CLIP}
"""Mean and standard deviation by the model's type, where the published weights were not trained with ImageNet's."""
_PRETRAINED_PADDED = ("sam", "sam_hq")
"""Types of models whose images were kept in shape and padded."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `size`, scale to [0, 1], then (x - mean) / std per channel.

    Args:
        size: Height and width of the model's input in pixels; of a tile, with resize_mode "tile".
        mean: Mean per channel of values in [0, 1].
        std: Standard deviation per channel.
        resize_mode: What becomes of an image of another shape: "stretch" squashes all of it to `size`; "pad" keeps its
            shape and fills up to the right and below with zeros, as SAM does; "crop" keeps it and takes the centre;
            "tile" does not resize: `model.predict` sees it in overlapping tiles.
        overlap: Pixels that neighbouring tiles share.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize_mode: str = STRETCH
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.resize_mode not in list(RESIZE_MODES):  # a file's may not be hashable
            raise SerialLoraError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}; got {self.resize_mode!r}.")
        if not isinstance(self.overlap, int) or not 0 <= self.overlap < min(self.size):
            raise SerialLoraError(
                f"Tiles of {self.size} must share from 0 to less than {min(self.size)} pixels; got {self.overlap!r}."
            )

    @property
    def pads(self) -> bool:
        """Whether part of an input may be padding."""
        return self.resize_mode in (PAD, TILE)

    def __call__(self, image: Any) -> Tensor:
        """A PIL image, of any size and mode, as pixel values (3, H, W): upright, transparent parts white.

        Raises:
            SerialLoraError: If it is larger than the tiles that it is to be seen in.
        """
        return self.framed(image)[0]

    def framed(self, image: Any) -> tuple[Tensor, Frame]:
        """The same, and where the image lies in it."""
        upright = upright_rgb(image)
        frame = self.frame((upright.height, upright.width))
        return frame.fill(self.normalize(pixels_of(frame.resized(upright))), 0.0), frame

    def frame(self, size: tuple[int, int]) -> Frame:
        """Where an upright image of a height and width lies in the input: its padding, labels, points, the way back."""
        return frame_of(size, self.size, self.resize_mode)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], (..., 3, H, W), as the backbone reads them."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build one from `to_dict`'s values.

        Raises:
            SerialLoraError: If they are not two sizes and three numbers each, or no such mode, as a file's may not be.
        """
        given: list[Any] = [values.get(key) for key in ("size", "mean", "std")]
        size, *channels = given
        whole = all(isinstance(value, list | tuple) for value in given)
        if not whole or len(size) != 2 or not all(isinstance(n, int) and 1 <= n <= _LARGEST for n in size):
            raise SerialLoraError(
                f"The preprocessing must have a size of two whole numbers from 1 to {_LARGEST}, a mean and a std; got "
                f"{dict(values)}."
            )
        if not all(len(c) == 3 and all(is_number(value) for value in c) for c in channels) or min(channels[1]) <= 0:
            raise SerialLoraError(
                f"The preprocessing's mean and std must be three numbers each, std above 0; got {channels}."
            )
        named: dict[str, Any] = {key: tuple(values[key]) for key in ("size", "mean", "std")}
        named |= {key: values[key] for key in ("resize_mode", "overlap") if key in values}  # files of before squash
        return cls(**named)

    @classmethod
    def of(cls, source: nn.Module | str | os.PathLike[str], **hub: Any) -> Preprocessing:
        """What a backbone was pretrained with: from its folder or Hub repository, else its config and type.

        Args:
            source: The backbone, or its folder or Hub id.
            **hub: `revision` and `cache_dir` of a Hub repository.

        Raises:
            SerialLoraError: If an image's size cannot be known.
        """
        if not isinstance(source, nn.Module):
            from transformers import AutoConfig

            return cls._from_repository(source, **hub) or cls._from_config(AutoConfig.from_pretrained(source, **hub))
        config: Any = getattr(source, "config", source)  # a model of timm has its pretrained_cfg itself
        if built_for := getattr(getattr(getattr(source, "timm_model", source), "patch_embed", None), "img_size", None):
            return replace(cls._from_config(config), size=_size(built_for))  # timm's create_model(..., img_size=)
        name = getattr(config, "_name_or_path", None)  # of a model that came from a folder or the Hub
        return (name and cls._from_repository(name, **hub)) or cls._from_config(config)

    @classmethod
    def _from_repository(cls, source: str | os.PathLike[str], **hub: Any) -> Preprocessing | None:
        """What the repository's preprocessor_config.json says, or None where there is none."""
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            values, _ = ImageProcessingMixin.get_image_processor_dict(source, **hub)
        except OSError:
            return None
        cropped = values.get("crop_size") if values.get("do_center_crop", True) else None
        size = cropped or values.get("pad_size") or values.get("size") or 224
        mean, std = values.get("image_mean") or IMAGENET_MEAN, values.get("image_std") or IMAGENET_STD
        mode = PAD if values.get("do_pad") and values.get("pad_size") else STRETCH
        return cls(_size(size), tuple(mean), tuple(std), mode)

    @classmethod
    def _from_config(cls, config: Any) -> Preprocessing:
        if timms := getattr(config, "pretrained_cfg", None):
            return cls(tuple(timms["input_size"][1:]), tuple(timms["mean"]), tuple(timms["std"]))
        kind = getattr(config, "model_type", "").removesuffix("_vision_model")
        mean, std = _PRETRAINED_WITH.get(kind, (IMAGENET_MEAN, IMAGENET_STD))
        return cls(_size(_image_size(config)), mean, std, PAD if kind in _PRETRAINED_PADDED else STRETCH)


def pixels_of(image: Any) -> Tensor:
    """A PIL image, of any size and mode, as pixels (3, H, W) in [0, 1]: upright, transparent parts white."""
    import numpy as np

    return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1).float() / 255


def upright_rgb(image: Any) -> Any:
    """Turn as EXIF says, put transparent pixels on white, and give 8-bit RGB (16-bit grey is scaled, not clipped)."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        largest = values.max(initial=0)
        top = 1 if image.mode == "F" and largest <= 1 else 255 if largest <= 255 else 65535
        image = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _image_size(config: Any) -> Any:
    """A config's size of images, with two towers that of the vision tower; 224 where it does not tell."""
    for part in ("vision_config", "backbone_config"):  # SAM 2 has both
        config = getattr(config, part, None) or config
    return getattr(config, "image_size", None) or 224


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        side = value.get("shortest_edge") or value.get("longest_edge")
        value = (value.get("height", side), value.get("width", side))
    height, width = value if isinstance(value, list | tuple) else (value, value)
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        raise SerialLoraError(f"The size of an image must be whole numbers of pixels; got {value!r}.")
    return height, width
