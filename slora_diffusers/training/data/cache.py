"""Latents and text embeddings, encoded once: keyed by content and by everything that made them.

An entry's key holds the pixels (or the caption), the shape, the flip and the encoder's config and weights, so an edited
caption, another resolution or another VAE is a new key, and nothing stale is ever read.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import SerialLoraError
from ..randomness import randn
from .batches import Batch, Fetch
from .identity import key_of, library_versions, model_key
from .images import Item, Shape, mask_pixels, to_pixels

Tensors = dict[str, Tensor]


class TensorCache:
    """Named tensors by key, one safetensors file each; in memory where `folder` is None."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._memory: dict[str, Tensors] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists() if self.folder is not None else key in self._memory

    def __len__(self) -> int:
        return len(self._memory) if self.folder is None else sum(1 for _ in self.folder.glob("*.safetensors"))

    def __getitem__(self, key: str) -> Tensors:
        if self.folder is None:
            return self._memory[key]
        try:
            return load_file(self._path(key))
        except (OSError, SafetensorError) as error:
            raise SerialLoraError(
                f"{self._path(key)} is damaged ({error}): delete it, and it is made again."
            ) from error

    def __setitem__(self, key: str, tensors: Tensors) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.folder is None:
            self._memory[key] = tensors
            return
        # Another process, on any machine, may write the same entry: each its own file, and the last rename wins.
        temporary = self._path(key).with_suffix(f".{uuid.uuid4().hex}.tmp")
        save_file(tensors, temporary)
        os.replace(temporary, self._path(key))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def cache_texts(
    cache: TensorCache, texts: Iterable[str], encode: Callable[[str], Tensors], maker: str
) -> dict[str, str]:
    """Encode every text that the cache lacks; returns each text's key.

    Args:
        cache: Where the embeddings go.
        texts: Captions, prompts, the empty prompt.
        encode: One text to named tensors without a batch dimension.
        maker: Key of what makes them (text encoders, tokenizers, lengths).
    """
    keys = {text: key_of("text", library_versions(), maker, text) for text in texts}
    for text, key in keys.items():
        if key not in cache:
            cache[key] = encode(text)
    return keys


class PixelReader:
    """Fetches pixels, cut and flipped afresh at every draw."""

    def __init__(self, crop: bool = False, flip: bool = False) -> None:
        self.crop, self.flip = crop, flip

    def __call__(self, item: Item, shape: Shape, draw: torch.Generator) -> Tensor:
        """Pixels (3, H, W) in [-1, 1]."""
        return to_pixels(item.read(), shape, draw, self.crop, self.flip)

    def mask(self, item: Item, shape: Shape, draw: torch.Generator) -> Tensor:
        """What the pixels weigh, (1, H, W), cut and flipped as the pixels are with the same draws."""
        return mask_pixels(item, shape, draw, self.crop, self.flip)


class MomentReader:
    """Fetches the cached moments of latents, of the image or of its mirror image.

    Args:
        cache: Where the moments are.
        vae: The VAE that made them; only its key is kept.
        flip: Mirror half of the draws.
    """

    def __init__(self, cache: TensorCache, vae: nn.Module, flip: bool = False) -> None:
        self.cache, self.flip = cache, flip
        self.maker = key_of(library_versions(), model_key(vae))

    def __call__(self, item: Item, shape: Shape, draw: torch.Generator) -> Tensor:
        """Moments (2 C, h, w)."""
        mirrored = self.flip and bool(torch.rand(1, generator=draw) < 0.5)
        return self.cache[self._key(item, shape, mirrored)]["moments"]

    def mask(self, item: Item, shape: Shape, draw: torch.Generator) -> Tensor:
        """What the pixels weigh, (1, H, W), of the image or of its mirror image as with the same draws."""
        mirrored = self.flip and bool(torch.rand(1, generator=draw) < 0.5)
        if item.mask is None:
            return torch.ones(1, *shape)
        key = key_of("mask", item.mask_content, list(shape))
        if key not in self.cache:
            self.cache[key] = {"mask": mask_pixels(item, shape).half()}
        mask = self.cache[key]["mask"].float()
        return mask.flip(-1) if mirrored else mask

    def fill(self, items: Sequence[Item], shapes: Sequence[Iterable[Shape]], vae: nn.Module) -> None:
        """Encode what is not there yet: each item at each of its shapes."""
        for item, own_shapes in zip(items, shapes, strict=True):
            views = [
                (shape, mirrored) for shape in own_shapes for mirrored in ((False, True) if self.flip else (False,))
            ]
            if not (missing := [view for view in views if self._key(item, *view) not in self.cache]):
                continue
            picture = item.read()
            for shape, mirrored in missing:
                pixels = to_pixels(picture, shape)[None]
                pixels = pixels.flip(-1) if mirrored else pixels
                self.cache[self._key(item, shape, mirrored)] = {"moments": encode_moments(vae, pixels)[0]}

    def _key(self, item: Item, shape: Shape, mirrored: bool) -> str:
        return key_of("latent", self.maker, item.content, list(shape), mirrored)


class Latents:
    """Clean latents of batches: from the VAE at every step, or from its moments, cached once.

    Args:
        vae: Encodes pixels; frozen.
        cache: Where moments are kept, or None to encode each time.
        crop: Cut at random places (without a cache only).
        flip: Mirror half of the draws.
        device: Where latents go.
    """

    def __init__(self, vae: nn.Module, cache: TensorCache | None, crop: bool, flip: bool, device: torch.device) -> None:
        self.vae, self.device = vae.requires_grad_(False).eval(), device
        self.config: Mapping[str, Any] = dict(vae.config)  # type: ignore[arg-type]
        self.fetch: Fetch = PixelReader(crop, flip) if cache is None else MomentReader(cache, vae, flip)

    def fill(self, items: Sequence[Item], shapes: Sequence[Iterable[Shape]]) -> None:
        """Encode what the cache lacks, if there is one."""
        if isinstance(self.fetch, MomentReader):
            self.fetch.fill(items, shapes, self.vae)

    def __call__(self, batch: Batch) -> Tensor:
        """z_0, (B, C, h, w) in fp32."""
        inputs = batch.inputs.to(self.device)
        moments = inputs if isinstance(self.fetch, MomentReader) else encode_moments(self.vae, inputs)
        return sample_latents(moments, self.config, batch.draws("latents"))


@torch.no_grad()
def encode_moments(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Mean and log-variance of the latents of pixels (B, 3, H, W): (B, 2 C, h, w)."""
    parameter = next(vae.parameters())
    encode: Any = vae.encode
    pixels = pixels.to(parameter.device, parameter.dtype)
    of_videos = hasattr(vae.config, "temperal_downsample")  # (diffusers' spelling) an image is a video of one frame
    encoded = encode(pixels[:, :, None] if of_videos else pixels)
    if hasattr(encoded, "latent_dist"):
        moments = encoded.latent_dist.parameters.float()
        return moments[:, :, 0] if of_videos else moments
    # The tiny and the deep compression autoencoder give a point: a variance of practically zero.
    latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
    return torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)


def sample_latents(moments: Tensor, vae_config: Mapping[str, Any], draws: Sequence[torch.Generator]) -> Tensor:
    """z_0 = (z - shift_factor) scaling_factor with z ~ N(mean, variance), from moments (B, 2 C, h, w).

    A VAE of videos has a mean and a deviation for each channel instead.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    z = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * randn(draws, mean)
    if (shift := vae_config.get("latents_mean")) is not None and vae_config.get("latents_std") is not None:
        shift, scale = (torch.tensor(values).to(z).view(-1, 1, 1) for values in (shift, vae_config["latents_std"]))
        return (z - shift) / scale
    return (z - (vae_config.get("shift_factor") or 0.0)) * vae_config.get("scaling_factor", 1.0)


def vae_factor(vae: Any) -> int:
    """Pixels per latent, along a side."""
    known = getattr(vae, "spatial_compression_ratio", None)
    return known or 2 ** (len(vae.config.block_out_channels) - 1)
