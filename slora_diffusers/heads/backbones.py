"""What any vision backbone gives: a class token and maps of patch features, whatever shape its own output has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, SerialLoraError

STRIDES = (1, 2, 4, 8, 16, 32, 64)
"""Downsampling of a stage's map against the patches, in hierarchical backbones."""


def last_features(backbone: nn.Module, pixel_values: Tensor) -> tuple[Tensor | None, Tensor]:
    """The final class token (B, d), or None where there is none, and the patch features (B, d, h, w).

    Args:
        backbone: A model of transformers with `last_hidden_state`, or of timm with `forward_features`.
        pixel_values: (B, 3, H, W), both sides multiples of the patch.

    Raises:
        SerialLoraError: If the image does not divide into patches, or the backbone takes no other size than its own.
        ArchitectureError: If the backbone's output is none of these.
    """
    backbone = _timm_inside(backbone)
    if hasattr(backbone, "forward_features"):
        output = _of_timm(backbone, backbone.forward_features, pixel_values)
    else:
        output = getattr(_run(backbone, pixel_values), "last_hidden_state", None)
    if not isinstance(output, Tensor):
        raise ArchitectureError(
            f"{type(backbone).__name__} gives no last_hidden_state and has no forward_features. Pass the headless "
            "backbone (AutoModel, or a timm model)."
        )
    return _split(_last_norm(backbone)(output), pixel_values, backbone)


def layer_features(backbone: nn.Module, pixel_values: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
    """The patch features (B, d, h, w) after each block (of hierarchical models: stage), or after those in `layers`.

    Args:
        backbone: A model of transformers that gives `hidden_states`, or of timm with `forward_intermediates`.
        pixel_values: (B, 3, H, W).
        layers: Indices of the blocks, from 0; negative ones count from the end.

    Raises:
        SerialLoraError: If there is no block of such an index, or as for `last_features`.
        ArchitectureError: If the backbone gives no intermediate features.
    """
    backbone = _timm_inside(backbone)
    if hasattr(backbone, "forward_intermediates"):
        outputs = _of_timm(backbone, backbone.forward_intermediates, pixel_values, intermediates_only=True)
    else:
        output = _run(backbone, pixel_values, output_hidden_states=True)
        hidden = getattr(output, "reshaped_hidden_states", None) or getattr(output, "hidden_states", None)
        outputs = list(hidden or ())
        if _model_type(backbone) != "segformer":  # elsewhere the first is what the blocks read
            outputs = outputs[1:]
    if not outputs:
        raise ArchitectureError(f"{type(backbone).__name__} gives no features of its layers: use the linear head.")
    layers = range(len(outputs)) if layers is None else layers
    if wrong := [i for i in layers if not -len(outputs) <= i < len(outputs)]:
        raise SerialLoraError(f"layers={list(layers)} names {wrong}, but the backbone has {len(outputs)} layers.")
    return [_split(outputs[i], pixel_values, backbone, of_layer=True)[1] for i in layers]


def patch_size(backbone: nn.Module) -> int | None:
    """Side of a patch in pixels; None where the model does not tell.

    Raises:
        ArchitectureError: If patches are not square.
    """
    backbone = _timm_inside(backbone)
    config: Any = getattr(backbone, "config", None)
    config = getattr(config, "backbone_config", None) or config
    size = getattr(config, "patch_size", None) or getattr(config, "patch_stride", None)
    for part in ("patch_embed", "embeds"):  # timm, and its NaFlex
        size = size or getattr(getattr(backbone, part, None), "patch_size", None)
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ArchitectureError(f"{type(backbone).__name__} has patches of {size} pixels; they must be square.")
    return sides.pop()


def _timm_inside(backbone: nn.Module) -> Any:
    """The model of timm that transformers' TimmWrapperModel holds."""
    return getattr(backbone, "timm_model", backbone)


def _last_norm(backbone: nn.Module) -> nn.Module:
    """The norm that a model applies after its own pooling, where its last features come without."""
    if _model_type(backbone) == "clip_vision_model":  # in transformers 4 with a vision_model inside
        inner: Any = getattr(backbone, "vision_model", backbone)
        return inner.post_layernorm
    if isinstance(getattr(backbone, "norm", None), nn.Identity):  # timm with pooling "avg"
        return getattr(backbone, "fc_norm", nn.Identity())
    return nn.Identity()


def _model_type(backbone: nn.Module) -> str:
    return getattr(getattr(backbone, "config", None), "model_type", "")


def _of_timm(backbone: nn.Module, method: Any, pixel_values: Tensor, **arguments: Any) -> Any:
    try:
        return method(pixel_values, **arguments)
    except AssertionError as error:
        if getattr(getattr(backbone, "patch_embed", None), "img_size", None) in (None, tuple(pixel_values.shape[-2:])):
            raise
        raise SerialLoraError(
            f"This {type(backbone).__name__} takes images of one size only: {str(error).rstrip('.')}. Make it "
            "with timm.create_model(..., dynamic_img_size=True) or img_size= of yours, and give that as preprocessing."
        ) from error


def _run(backbone: nn.Module, pixel_values: Tensor, **arguments: Any) -> Any:
    parameters = inspect.signature(backbone.forward).parameters
    if "spatial_shapes" in parameters:
        raise ArchitectureError(
            f"{type(backbone).__name__} reads lists of patches, not images, so a head cannot sit on it; SigLIP 2 of "
            "fixed resolution is a SiglipModel, which takes one. Pairs alone go in with add_serial_lora()."
        )
    if "interpolate_pos_encoding" in parameters:
        arguments["interpolate_pos_encoding"] = True  # images of another size than in pretraining
    hides = "noise" in parameters and hasattr(backbone.config, "mask_ratio")
    if hides:  # a masked autoencoder shuffles by noise, in eval mode too; rising noise leaves the order
        side = patch_size(backbone) or 1
        patches = torch.arange(pixel_values[0, 0, ::side, ::side].numel(), device=pixel_values.device)
        arguments["noise"] = patches.float().expand(len(pixel_values), -1)
    try:
        with _nothing_hidden(backbone.config) if hides else nullcontext():
            return backbone(pixel_values=pixel_values, return_dict=True, **arguments)
    except ValueError as error:  # of SAM, whose relative positions have one size
        raise SerialLoraError(f"{type(backbone).__name__} does not take these images: {error}") from error


@contextmanager
def _nothing_hidden(config: Any) -> Iterator[None]:
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def _split(x: Tensor, image: Tensor, backbone: nn.Module, of_layer: bool = False) -> tuple[Tensor | None, Tensor]:
    """Class token and map of an output: (B, prefix + h w, d), (B, d, h, w) or (B, h, w, d)."""
    height, width = map(int, image.shape[-2:])  # int: torch.jit.trace has tensors for them
    known = patch_size(backbone)
    patch = known or 1
    if height % patch or width % patch:
        raise SerialLoraError(f"The image, {height} x {width}, must divide into patches of {patch} x {patch} pixels.")
    grids = [(-(-height // (k * patch)), -(-width // (k * patch))) for k in STRIDES]
    if x.ndim == 4:
        _, *sides = map(int, x.shape[1:])
        first, last = tuple(sides) in grids, tuple(map(int, x.shape[1:3])) in grids
        if first or last:
            channels_last = last and (not first or _channels_last(backbone, of_layer))
            return None, x.permute(0, 3, 1, 2) if channels_last else x
    elif known is None:
        raise ArchitectureError(
            f"{type(backbone).__name__} does not tell its patch size, so its tokens cannot be laid out as a map."
        )
    else:
        prefixes = {grids[0]: _prefixes(backbone), **{grid: {0} for grid in grids[1:]}}
        for (h, w), allowed in prefixes.items():
            prefix = int(x.shape[1]) - h * w  # class and register tokens come first
            if prefix in allowed:
                patches = x[:, prefix:].transpose(1, 2).unflatten(2, (h, w))  # (B, d, h, w)
                return (x[:, 0] if prefix and _has_class_token(backbone) else None), patches
    raise ArchitectureError(
        f"{type(backbone).__name__} gives {tuple(x.shape[1:])}, no map of an image of {height} x {width} pixels."
    )


def _channels_last(backbone: nn.Module, of_layer: bool) -> bool:
    """Whether a map that could be read either way is (B, h, w, d): in SAM its layers are, in SAM 2 all."""
    kind = _model_type(backbone)
    if kind.startswith("sam"):
        return of_layer or kind.startswith("sam2")
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC" and not of_layer  # timm; its layers are (B, d, h, w)


def _prefixes(backbone: nn.Module) -> set[int]:
    """How many tokens may precede the patches: class token, registers, distillation token."""
    known = getattr(backbone, "num_prefix_tokens", None)
    registers = getattr(getattr(backbone, "config", None), "num_register_tokens", 0) or 0
    return {known} if known is not None else {1 + registers} if registers else {0, 1, 2}


def _has_class_token(backbone: nn.Module) -> bool:
    if hasattr(backbone, "forward_features"):  # timm may have registers alone
        return getattr(backbone, "has_class_token", getattr(backbone, "cls_token", None) is not None)
    return True
