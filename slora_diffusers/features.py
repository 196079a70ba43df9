"""What any vision backbone gives: a class token and maps of patch features, whatever shape its own output has."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .errors import ArchitectureError, SerialLoraError

STRIDES = (1, 2, 4, 8, 16)
"""Downsampling of a stage's map against the patches, in hierarchical backbones."""


def last_features(backbone: nn.Module, pixel_values: Tensor) -> tuple[Tensor | None, Tensor]:
    """The final class token (B, d), or None where there is none, and the patch features (B, d, h, w).

    Args:
        backbone: A model of transformers with `last_hidden_state`, or of timm with `forward_features`.
        pixel_values: (B, 3, H, W), both sides multiples of the patch.

    Raises:
        SerialLoraError: If the image does not divide into patches.
        ArchitectureError: If the backbone's output is none of these.
    """
    if hasattr(backbone, "forward_features"):
        output = backbone.forward_features(pixel_values)  # pyright: ignore[reportCallIssue]
    else:
        output = getattr(_run(backbone, pixel_values), "last_hidden_state", None)
    if not isinstance(output, Tensor):
        raise ArchitectureError(
            f"{type(backbone).__name__} gives no last_hidden_state and has no forward_features. Pass the headless "
            "backbone (AutoModel, or a timm model)."
        )
    return _split(output, pixel_values, patch_size(backbone))


def layer_features(backbone: nn.Module, pixel_values: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
    """The patch features (B, d, h, w) after each block (of hierarchical models: stage), or after those in `layers`.

    Args:
        backbone: A model of transformers that gives `hidden_states`, or of timm with `forward_intermediates`.
        pixel_values: (B, 3, H, W).
        layers: Indices of the blocks, from 0; negative ones count from the end.

    Raises:
        SerialLoraError: If there is no block of such an index, or the image does not divide into patches.
        ArchitectureError: If the backbone gives no intermediate features.
    """
    if hasattr(backbone, "forward_intermediates"):
        outputs = backbone.forward_intermediates(pixel_values, intermediates_only=True)  # pyright: ignore
    else:
        hidden = getattr(_run(backbone, pixel_values, output_hidden_states=True), "hidden_states", None)
        outputs = list(hidden)[1:] if hidden is not None else []  # the first is what the blocks read
    if not outputs:
        raise ArchitectureError(f"{type(backbone).__name__} gives no features of its layers: use the linear head.")
    layers = range(len(outputs)) if layers is None else layers
    if wrong := [i for i in layers if not -len(outputs) <= i < len(outputs)]:
        raise SerialLoraError(f"layers={list(layers)} names {wrong}, but the backbone has {len(outputs)} layers.")
    size = patch_size(backbone)
    return [_split(outputs[i], pixel_values, size)[1] for i in layers]


def patch_size(backbone: nn.Module) -> int:
    """Side of a patch in pixels; 1 where the model does not tell.

    Raises:
        ArchitectureError: If patches are not square.
    """
    config: Any = getattr(backbone, "config", None)
    config = getattr(config, "backbone_config", None) or config
    size = getattr(config, "patch_size", None) or getattr(config, "patch_stride", None)
    size = size or getattr(getattr(backbone, "patch_embed", None), "patch_size", None) or 1
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ArchitectureError(f"{type(backbone).__name__} has patches of {size} pixels; they must be square.")
    return sides.pop()


def _run(backbone: nn.Module, pixel_values: Tensor, **arguments: Any) -> Any:
    if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        arguments["interpolate_pos_encoding"] = True  # images of another size than in pretraining
    return backbone(pixel_values=pixel_values, return_dict=True, **arguments)


def _split(x: Tensor, image: Tensor, patch: int) -> tuple[Tensor | None, Tensor]:
    """Class token and map of an output: (B, prefix + h w, d), (B, d, h, w) or (B, h, w, d)."""
    height, width = image.shape[-2:]
    if height % patch or width % patch:
        raise SerialLoraError(f"The image, {height} x {width}, must divide into patches of {patch} x {patch} pixels.")
    if x.ndim == 4:
        h, w = x.shape[2:]
        channels_first = height % h == 0 and width % w == 0 and height // h == width // w
        return None, x if channels_first else x.permute(0, 3, 1, 2)
    for k in STRIDES:
        h, w = -(-height // (patch * k)), -(-width // (patch * k))
        prefix = x.shape[1] - h * w  # class and register tokens come first
        if prefix >= 0:
            patches = x[:, prefix:].transpose(1, 2).unflatten(2, (h, w))  # (B, d, h, w)
            return (x[:, 0] if prefix else None), patches
    raise ArchitectureError(f"{x.shape[1]} tokens are no map of patches of an image of {height} x {width} pixels.")
