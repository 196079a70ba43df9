"""Semantic segmentation: per-pixel classes from the features of any vision backbone that Serial LoRA adapts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..errors import SerialLoraError
from .backbones import last_features, layer_features
from .base import SerialLoraWithHead, dtype_of, probe
from .framing import CROP, check_framed, check_pixel_mask, ignore_padding
from .losses import IGNORE_INDEX, check_pixel_labels, pixel_cross_entropy
from .pixel_heads import ConvolutionalHead, UPerNet, scales_of
from .preprocessing import Preprocessing

SEGMENTATION_HEADS = ("linear", "convolutional", "upernet")
WIDEST = 2048


class SerialLoraForSemanticSegmentation(SerialLoraWithHead):
    """Per-pixel classes from the patch features of an adapted backbone.

    Make one with `from_backbone` or `from_pretrained`.
    """

    task = "semantic segmentation"
    of_pixels = True

    @classmethod
    def from_backbone(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        num_labels: int | None,
        config: SerialLoraConfig | None,
        *,
        head: str = "linear",
        layers: Sequence[int] | None = None,
        width: int = 128,
        label_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        **loading: Any,
    ) -> SerialLoraForSemanticSegmentation:
        """Put a new head, and a new adapter, on a backbone. Both are trainable, the base is frozen.

        Args:
            model_or_id: As for classification.
            num_labels: Number of classes, background included; None if `label_names` are given.
            config: The adapter; None adds none.
            head: "linear" on the last features; over several layers "convolutional" (`ConvolutionalHead`) or the
                larger "upernet" (`UPerNet`).
            layers: Blocks (of hierarchical backbones: stages) that a head over several reads, from 0; by default
                four, evenly spread.
            width: Channels of a head over several layers.
            label_names: Names of the classes; 0, 1, ... by default.
            preprocessing: As for classification.
            **loading: As for classification.

        Raises:
            SerialLoraError: If labels, head or layers do not fit, or no record covers the backbone.
        """
        if head not in SEGMENTATION_HEADS or width < 1 or (layers is not None and (head == "linear" or not layers)):
            raise SerialLoraError(
                f"head must be one of {', '.join(SEGMENTATION_HEADS)}, width at least 1, and layers, one or more, go "
                f"with a head over several only; got head={head!r}, width={width}, layers={layers}."
            )
        if len(label_names or ()) > IGNORE_INDEX or (num_labels or 0) > IGNORE_INDEX:
            raise SerialLoraError(f"At most {IGNORE_INDEX} labels: {IGNORE_INDEX} marks pixels that count for nothing.")
        settings = {"head": head, "layers": None if layers is None else list(layers), "width": width}
        return cls._from_backbone(model_or_id, num_labels, config, settings, label_names, preprocessing, loading)

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> nn.Module:
        _check_settings(settings)
        if preprocessing.resize_mode == CROP:
            raise SerialLoraError(
                'Cropped images have pixels that are not seen, so they cannot be segmented: use resize_mode="pad", '
                '"stretch" or "tile".'
            )
        if settings["head"] == "linear":
            return nn.Conv2d(probe(backbone, preprocessing, last_features)[1].shape[1], classes, 1)
        maps = probe(backbone, preprocessing, layer_features)
        if settings["layers"] is None:
            settings["layers"] = sorted({len(maps) * (i + 1) // 4 - 1 for i in range(4)} - {-1})
        chosen = probe(backbone, preprocessing, partial(layer_features, layers=settings["layers"]))
        widths = [x.shape[1] for x in chosen]
        if settings["head"] == "convolutional":
            return ConvolutionalHead(widths, settings["width"], classes)
        scales = scales_of(chosen)
        if len(scales) != len(chosen) or min(min(x.shape[-2:]) for x in chosen) < 2:
            raise SerialLoraError(
                f"UPerNet reads at most four layers, of at least 2 x 2 patches each; here are {len(chosen)}, of "
                f"{[tuple(x.shape[-2:]) for x in chosen]}. Choose others with layers=, larger images, or "
                'head="convolutional".'
            )
        return UPerNet(widths, settings["width"], classes, scales)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, pixel_mask: Tensor | None = None) -> Any:
        """Logits (B, classes, H, W) at the size of the input, and the cross-entropy if there are labels.

        Args:
            pixel_values: (B, 3, H, W).
            labels: (B, H', W') class indices, at any size; pixels of 255 count for nothing. Of padded images they lie
                over the input as the images do (`Frame.labels`).
            pixel_mask: (B, H, W), 1 on the image and 0 on its padding, which counts for nothing.

        Raises:
            SerialLoraError: If the labels are of another shape, not whole numbers, or out of range.

        Returns:
            transformers' `SemanticSegmenterOutput`.
        """
        from transformers.modeling_outputs import SemanticSegmenterOutput

        if pixel_mask is not None:
            check_pixel_mask(pixel_mask, pixel_values)
        dtype = dtype_of(self.head)
        if self.settings["head"] == "linear":
            x = self.head(last_features(self.backbone, pixel_values)[1].to(dtype))  # (B, classes, h, w)
        else:
            maps = layer_features(self.backbone, pixel_values, self.settings["layers"])
            x = self.head([x.to(dtype) for x in maps])  # (B, classes, up to 4 h, 4 w)
        logits = F.interpolate(x.float(), pixel_values.shape[-2:], mode="bilinear")  # (B, classes, H, W)
        loss = None
        if labels is not None:
            check_pixel_labels(labels, len(logits), logits.shape[1])
            check_framed(labels, pixel_values, self.preprocessing.pads or pixel_mask is not None)
            labels = labels if pixel_mask is None else ignore_padding(labels, pixel_mask)
            same = labels.shape[-2:] == logits.shape[-2:]
            sized = logits if same else F.interpolate(x.float(), labels.shape[-2:], mode="bilinear")
            loss = pixel_cross_entropy(sized, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise SerialLoraError unless a head can be made of settings, which a file may hold."""
    head, layers, width = (settings.get(key) for key in ("head", "layers", "width"))
    fits = layers is None or (isinstance(layers, list) and layers and all(isinstance(i, int) for i in layers))
    if head not in list(SEGMENTATION_HEADS) or not fits or not isinstance(width, int) or not 1 <= width <= WIDEST:
        raise SerialLoraError(
            f"A segmentation head has head: one of {', '.join(SEGMENTATION_HEADS)}, layers: None or whole numbers, and "
            f"width: from 1 to {WIDEST}; got {dict(settings)}."
        )
