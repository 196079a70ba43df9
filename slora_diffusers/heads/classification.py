"""Image classification: a linear classifier over any vision backbone that Serial LoRA adapts.

    model = SerialLoraForImageClassification.from_backbone("facebook/dinov2-small", 10, SerialLoraConfig(rank=8))
    loss = model(pixel_values, labels=labels).loss
    model.save_pretrained("digits")  # adapter, head, label names and preprocessing: one small file

The pairs sit in the backbone, so that the file's adapter also loads into a plain backbone with `load_serial_lora`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..errors import SerialLoraError
from .backbones import last_features
from .base import SerialLoraWithHead, dtype_of, probe
from .deploy import grey_image, image_classifier, save_for_pipeline
from .framing import check_pixel_mask
from .losses import PROBLEMS, SINGLE_LABEL, check_problem
from .preprocessing import Preprocessing

POOLINGS = ("cls", "mean", "both")


class SerialLoraForImageClassification(SerialLoraWithHead):
    """A linear classifier over an adapted backbone: logits = W pool(features) + b.

    Make one with `from_backbone` or `from_pretrained`.
    """

    task = "image classification"

    @classmethod
    def from_backbone(
        cls,
        model_or_id: nn.Module | str | os.PathLike[str],
        num_labels: int | None,
        config: SerialLoraConfig | None,
        *,
        pooling: str = "cls",
        problem_type: str = SINGLE_LABEL,
        label_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        **loading: Any,
    ) -> SerialLoraForImageClassification:
        """Put a new head, and a new adapter, on a backbone. Both are trainable, the base is frozen.

        Args:
            model_or_id: A headless model of transformers or timm, or the folder or Hub id of one of transformers.
            num_labels: Number of classes, or of numbers that a regression gives; None if `label_names` are given.
            config: The adapter; None adds none (training the head alone, or another adapter of your own).
            pooling: What the head reads: "cls" token, "mean" of the patches, or "both" side by side.
            problem_type: As in transformers: "single_label_classification" (cross-entropy),
                "multi_label_classification" (binary cross-entropy of each label) or "regression" (squared error).
            label_names: Names of the classes; 0, 1, ... by default.
            preprocessing: Size and normalisation of images; by default what the backbone was pretrained with.
            **loading: For the backbone's `from_pretrained`; `dtype` is float32 by default.

        Raises:
            SerialLoraError: If labels or pooling do not fit, or no record covers the backbone.
        """
        settings = {"pooling": pooling, "problem_type": problem_type}
        fewest = 2 if problem_type == SINGLE_LABEL else 1
        return cls._from_backbone(
            model_or_id, num_labels, config, settings, label_names, preprocessing, loading, fewest
        )

    @classmethod
    def _make_head(
        cls, backbone: nn.Module, classes: int, settings: dict[str, Any], preprocessing: Preprocessing
    ) -> nn.Module:
        check_problem(settings.get("problem_type", SINGLE_LABEL))
        if settings.get("pooling") not in list(POOLINGS):
            raise SerialLoraError(f"pooling must be one of {', '.join(POOLINGS)}; got {settings.get('pooling')!r}.")
        token, patches = probe(backbone, preprocessing, last_features)
        features = pool(token, patches, settings["pooling"])  # (1, d)
        head = nn.Linear(features.shape[1], classes)
        nn.init.zeros_(head.weight)  # so that the first step's gradient, not chance, chooses the direction
        nn.init.zeros_(head.bias)
        return head

    @property
    def problem_type(self) -> str:
        """Which loss; see `from_backbone`."""
        return self.settings.get("problem_type", SINGLE_LABEL)

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """What the head reads: (B, d), or (B, 2 d) with pooling "both"; the mean is over the image, not its padding."""
        token, patches = last_features(self.backbone, pixel_values)  # (B, d), (B, d, h, w)
        if pixel_mask is not None:
            check_pixel_mask(pixel_mask, pixel_values)
        return pool(token, patches, self.settings["pooling"], pixel_mask)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, pixel_mask: Tensor | None = None) -> Any:
        """Logits (B, classes), and the loss of the problem if there are labels.

        Args:
            pixel_values: (B, 3, H, W), as `preprocessing` gives them.
            labels: (B,) class indices (-100 counts for nothing) or (B, classes) probabilities; for several labels
                (B, classes) of 0 and 1; for regression (B, numbers).
            pixel_mask: (B, H, W), 1 on the image and 0 on its padding, which is left out of a mean over patches.

        Raises:
            SerialLoraError: If the labels are of another shape, or out of range.

        Returns:
            transformers' `ImageClassifierOutput`.
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        x = self.features(pixel_values, pixel_mask)  # (B, d)
        logits = self.head(x.to(dtype_of(self.head)))  # (B, classes)
        loss = None if labels is None else PROBLEMS[self.problem_type](logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def to_transformers(self, save_directory: str | os.PathLike[str] | None = None) -> Any:
        """The family's own `...ForImageClassification` with the adapter fused into it; this model stays as it is.

        It gives the same logits, which is checked: where transformers' class pools otherwise, that is an error.

        Args:
            save_directory: Folder to write it to, with its image processor, so that
                `transformers.pipeline("image-classification", folder)` opens it.

        Raises:
            SerialLoraError: If transformers has no class that reads what this head reads.
        """
        if self.preprocessing.pads and self.settings["pooling"] != "cls":
            raise SerialLoraError(
                f"pooling={self.settings['pooling']!r} leaves padding out of the mean over patches, which no class of "
                "transformers does. Deploy the model itself, with pixel_mask as its third input."
            )
        image = grey_image(self.preprocessing, next(self.backbone.parameters()))
        training = self.training
        with torch.no_grad():
            expected = self.eval()(image).logits
        self.train(training)
        model = image_classifier(
            self.backbone, self.head, self.label_names, self.problem_type, self.preprocessing, expected
        )
        if save_directory is not None:
            save_for_pipeline(model, self.preprocessing, save_directory)
        return model


def pool(token: Tensor | None, patches: Tensor, pooling: str, pixel_mask: Tensor | None = None) -> Tensor:
    """One vector per image: the class token (B, d), the mean of the patches (B, d), or both (B, 2 d).

    With a mask (B, H, W) each patch weighs in the mean what part of it is image.

    Raises:
        SerialLoraError: If the backbone has no class token and the pooling needs one.
    """
    mean = patches.mean((2, 3))
    if pixel_mask is not None:
        h, w = patches.shape[-2:]
        share = F.adaptive_avg_pool2d(pixel_mask[:, None].to(patches), (h, w))  # (B, 1, h, w)
        mean = (patches * share).sum((2, 3)) / share.sum((2, 3))
    if pooling == "mean":
        return mean
    if token is None:
        raise SerialLoraError(f'The backbone has no class token, which pooling={pooling!r} reads: use pooling="mean".')
    return token if pooling == "cls" else torch.cat([token, mean], dim=1)
