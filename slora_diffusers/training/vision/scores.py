"""What a classifier or a segmentation is worth: everything from the confusion matrix, and the Dice loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...heads.losses import IGNORE_INDEX


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): row = true class, column = predicted; elements labelled 255 are left out."""
    counted = truth != IGNORE_INDEX
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class Overlap:
    """Per class, what predicted and true pixels have in common; NaN, and in no mean, for a class that is in neither.

    Attributes:
        iou: |P and T| / |P or T| of each class, (classes,).
        dice: 2 |P and T| / (|P| + |T|) of each class, (classes,).
    """

    iou: Tensor
    dice: Tensor

    @classmethod
    def of(cls, confusion: Tensor) -> Overlap:
        """From a confusion matrix (classes, classes)."""
        both = confusion.diagonal().double()
        total = (confusion.sum(0) + confusion.sum(1)).double()  # |P| + |T|
        return cls(both / (total - both), 2 * both / total)

    def means(self) -> dict[str, float]:
        """Mean IoU and Dice over the classes that occur, in percent."""
        return {"miou": 100 * self.iou.nanmean().item(), "dice": 100 * self.dice.nanmean().item()}


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share, in percent, of samples whose label (N,) is among the k largest logits (N, classes)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(1).float().mean().item()


def segmentation_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, dice: float = 0.0, masks: Tensor | None = None,
    images: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy, plus `dice` times one minus the mean soft Dice of the classes that are there.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W); 255 counts for nothing.
        weights: Weight of each class in the cross-entropy, (classes,).
        dice: Weight of the Dice term.
        masks: What each pixel weighs in both means, (B, H, W); all the same by default.
        images: What the loss of each image is multiplied by, (B,); 1 by default.
    """
    labels, counted = labels.long(), labels != IGNORE_INDEX
    m = counted.float() if masks is None else counted * masks  # (B, H, W)
    w = m if images is None else m * images[:, None, None]
    each = m if weights is None else m * weights[labels.where(counted, 0)]
    entropy = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE_INDEX, reduction="none")  # (B, H, W)
    tiny = torch.finfo(torch.float32).tiny  # where nothing counts the loss is 0
    loss = (w * entropy).sum() / each.sum().clamp_min(tiny)
    if not dice:
        return loss
    p = logits.softmax(1)
    t = F.one_hot(labels.where(counted, 0), logits.shape[1]).movedim(-1, 1)
    w, axes = w[:, None], (0, 2, 3)
    overlap = 2 * (w * p * t).sum(axes) / (w * (p + t)).sum(axes).clamp_min(1e-8)  # (classes,)
    there = (w * t).sum(axes) > 0
    scale = w.sum() / m.sum().clamp_min(tiny)
    return loss + dice * scale * ((1 - overlap) * there).sum() / there.sum().clamp_min(1)


def class_weights(confusion_rows: Tensor) -> Tensor:
    """Weights inversely proportional to how often classes occur, (classes,), of mean 1 over those that occur."""
    counts = confusion_rows.double()
    inverse = torch.where(counts > 0, counts.clamp_min(1).reciprocal(), 0)
    return (inverse * (counts > 0).sum() / inverse.sum()).float()
