"""The losses of the heads. Labels that could give a wrong number are refused: a NaN, or a mean over nothing, trains.

The names of the problems, and what each computes, are transformers'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SerialLoraError

IGNORE_INDEX = 255
"""Label of pixels that count for nothing, as in most segmentation data sets."""
IGNORED_CLASS = -100
"""Label of images that count for nothing, as PyTorch's cross-entropy has it."""


def single_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; 0 where no image counts.

    Args:
        logits: (B, classes).
        labels: (B,) class indices, -100 for an image that counts for nothing; or (B, classes) probabilities.
    """
    if labels.is_floating_point():
        _check(labels, tuple(logits.shape), "probabilities")
        _check_range(labels, 0, 1, "probabilities")
        if not torch.allclose(labels.float().sum(1), labels.new_ones(len(labels)).float(), atol=0.02):
            raise SerialLoraError(
                "The labels are floats whose rows do not sum to 1, so they are not probabilities of classes. Several "
                'labels for an image need problem_type="multi_label_classification", numbers "regression".'
            )
        return F.cross_entropy(logits, labels.to(logits))
    _check(labels, (len(logits),), "class indices")
    counted = labels != IGNORED_CLASS
    _check_range(labels[counted], 0, logits.shape[1] - 1, "class indices")
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED_CLASS, reduction="sum")
    return loss / counted.sum().clamp_min(1)


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of every label.

    Args:
        logits: (B, classes).
        labels: (B, classes) of 0 and 1, or probabilities.
    """
    _check(labels, tuple(logits.shape), "0 and 1 for every class")
    _check_range(labels, 0, 1, "0 and 1 for every class")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits))


def regression(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error.

    Args:
        logits: (B, outputs).
        labels: (B, outputs) numbers, or (B,) for one output.
    """
    if labels.ndim == 1 and logits.shape[1] == 1:
        labels = labels[:, None]
    _check(labels, tuple(logits.shape), "numbers")
    if not torch.isfinite(labels).all():
        raise SerialLoraError("The labels hold NaN or infinity.")
    return F.mse_loss(logits, labels.to(logits))


SINGLE_LABEL = "single_label_classification"
PROBLEMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    SINGLE_LABEL: single_label,
    "multi_label_classification": multi_label,
    "regression": regression,
}
"""transformers' problem_type -> loss of logits (B, classes) in fp32 and labels."""


def check_problem(problem_type: str) -> None:
    """Raise SerialLoraError unless there is such a problem."""
    if problem_type not in list(PROBLEMS):  # what a file names may not be hashable
        raise SerialLoraError(f"problem_type must be one of {', '.join(PROBLEMS)}; got {problem_type!r}.")


def pixel_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the pixels that count, each with the weight of its class; 0 where none counts.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W); 255 counts for nothing.
        weights: Weight of each class, (classes,).
    """
    labels = labels.long()
    counted = labels != IGNORE_INDEX
    total = counted.sum() if weights is None else (weights[labels.where(counted, 0)] * counted).sum()
    loss = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / total.clamp_min(torch.finfo(torch.float32).tiny)  # PyTorch's own mean is 0 / 0 there


def check_pixel_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Raise SerialLoraError unless these are (B, H, W) class indices, or 255; warn of a mask that may be 0 and 255."""
    if labels.ndim != 3 or len(labels) != batch or not labels.numel():
        raise SerialLoraError(
            f"Masks must be class indices (B, H, W), for a batch of {batch} images; got {tuple(labels.shape)}. "
            "Of masks (B, 1, H, W) take [:, 0], of one channel per class argmax(1)."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise SerialLoraError(f"Masks must be whole numbers, class indices; got {labels.dtype}. Use labels.long().")
    counted = labels != IGNORE_INDEX
    _check_range(labels[counted], 0, classes - 1, f"class indices, or {IGNORE_INDEX} for pixels that count for nothing")
    if classes == 2 and not counted.all() and not labels[counted].any():
        warnings.warn(
            f"The masks of this batch hold 0 and {IGNORE_INDEX} alone, and {IGNORE_INDEX} counts for nothing here. If "
            f"it stands for the object, use labels // {IGNORE_INDEX}.",
            stacklevel=3,
        )


def mask_loss(logits: Tensor, masks: Tensor, counted: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, plus one minus the mean soft Dice of the masks (B, prompts, h, w).

    Args:
        logits: (B, prompts, h, w).
        masks: (B, prompts, h, w) of 0 to 1.
        counted: (B, 1, h, w), 1 on the pixels that count; None for all.
    """
    p, m = logits.sigmoid(), masks
    entropy = F.binary_cross_entropy_with_logits(logits, m, reduction="none")
    if counted is not None:
        p, m, entropy = p * counted, m * counted, entropy * counted / counted.mean()
    dice = (2 * (p * m).sum((2, 3)) + 1) / (p.sum((2, 3)) + m.sum((2, 3)) + 1)  # (B, prompts)
    return entropy.mean() + 1 - dice.mean()


def check_masks(masks: Tensor, batch: int, prompts: int) -> None:
    """Raise SerialLoraError unless these are (B, prompts, h, w) of 0 to 1."""
    if masks.ndim != 4 or tuple(masks.shape[:2]) != (batch, prompts) or not masks.numel():
        raise SerialLoraError(
            f"masks must be (B, prompts, h, w), one for every prompt, here ({batch}, {prompts}, h, w); got the shape "
            f"{tuple(masks.shape)}."
        )
    _check_range(masks, 0, 1, "0 beside the object and 1 on it; divide masks of 0 and 255 by 255")


def _check(labels: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(labels.shape) != shape:
        raise SerialLoraError(f"The labels must be {what} of the shape {shape}; got {tuple(labels.shape)}.")


def _check_range(values: Tensor, low: int, high: int, what: str) -> None:
    """A label out of range would end a CUDA process with a device-side assertion, or give a negative Dice."""
    if torch.compiler.is_compiling() or not values.numel():
        return
    smallest, largest = values.min().item(), values.max().item()
    if not (smallest >= low and largest <= high):  # NaN too
        raise SerialLoraError(f"Labels must lie in [{low}, {high}] ({what}); got {smallest:g} to {largest:g}.")
