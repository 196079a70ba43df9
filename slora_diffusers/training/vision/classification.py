"""What the recipes that classify share: where labelled images come from, the loss, the scores, the confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...errors import SerialLoraError
from ...heads.base import SerialLoraWithHead
from ...heads.predict import predictions
from ..data.batches import Batch
from ..data.images import Item
from ..data.labelled import Fetch, few_shots, hold_out, hub_dataset, image_folder
from ..fit import Best
from ..options import NOT_NEGATIVE
from ..parsing import but, option
from ..place import Place
from .pictures import captioned, sheet, spread
from .recipe import VisionOptions, train_with_head
from .scores import class_weights, confusion_matrix, top_k_accuracy

SHOWN = 12
"""Validation images on the run's page."""


@dataclass(frozen=True)
class ClassOptions(VisionOptions):
    """Classes."""

    label_column: str = option("label", "Column of the classes.")
    shots: int = option(0, "Training images of each class; 0 for all.", within=NOT_NEGATIVE)
    validation_fraction: float = but(
        VisionOptions,
        "validation_fraction",
        0.2,
        help="Share of every class to hold out where no validation data are given.",
    )
    balance_classes: bool = option(False, "Weigh classes in the cross-entropy by how few images they have.")


def find_items(options: ClassOptions) -> tuple[list[Item], list[Item], list[str]]:
    """The items to train on, those to validate on, and the names of the classes.

    Raises:
        SerialLoraError: If it is not clear where they come from, or there are too few.
    """
    if (options.train_data_dir is None) == (options.dataset_name is None):
        raise SerialLoraError("give one of --train_data_dir and --dataset_name.")
    columns = (options.image_column, options.label_column)
    if options.train_data_dir is not None:
        items, names = image_folder(options.train_data_dir)
    else:
        source = (options.dataset_name or "", options.dataset_split, *columns)
        items, names = hub_dataset(*source, weight_column=options.weight_column)
    if options.validation_data_dir is not None:
        unseen, _ = image_folder(options.validation_data_dir, names)
    elif options.validation_split is not None:
        unseen, _ = hub_dataset(options.dataset_name or "", options.validation_split, *columns, names)
    else:
        items, unseen = hold_out(items, options.validation_fraction, options.seed, names)
    return few_shots(items, options.shots, options.seed, names), unseen, names


def logits_of(model: SerialLoraWithHead, items: Sequence[Item], place: Place, batch_size: int) -> Tensor:
    """Logits (N, classes) of images, a batch at a time."""
    found: list[Tensor] = []
    for start in range(0, len(items), batch_size):
        with place.autocast():
            found += predictions(model, [item.read() for item in items[start : start + batch_size]])
    return torch.stack(found)


def train_classifier(
    place: Place, options: ClassOptions, model: SerialLoraWithHead, items: Sequence[Item], unseen: Sequence[Item]
) -> dict[str, float]:
    """Train a model of either kind, save it, write the confusion matrix, and return the scores.

    Args:
        place: The processes.
        options: The options.
        model: The model, not adapted yet.
        items: The images to train on.
        unseen: The images to validate on.
    """
    names = list(model.label_names)
    counts = torch.tensor([item.label for item in items]).bincount(minlength=len(names))
    weights = class_weights(counts).to(place.device) if options.balance_classes else None
    labels = torch.tensor([item.label for item in unseen])
    guesses, confusion = torch.zeros_like(labels), torch.zeros(len(names), len(names), dtype=torch.long)

    def loss_of(called: Any, batch: Batch) -> Tensor:
        targets = torch.tensor([item.label for item in batch.items], device=place.device)
        pixels = batch.inputs[:, :3].to(place.device, place.weight_dtype)
        padding = {"pixel_mask": batch.inputs[:, 3].to(place.device)} if batch.inputs.shape[1] == 4 else {}
        with place.autocast():
            logits = called(pixels, **padding).logits
        losses = F.cross_entropy(logits.float(), targets, weights, reduction="none")  # (B,)
        mean_weight = 1.0 if weights is None else weights[targets].mean()
        return (losses * batch.weights.to(losses)).mean() / mean_weight

    def evaluate() -> dict[str, float]:
        logits = logits_of(model, unseen, place, options.train_batch_size)
        guesses.copy_(logits.argmax(1))
        confusion.copy_(confusion_matrix(guesses, labels, len(names)))
        return {"top1": top_k_accuracy(logits, labels, 1), "top5": top_k_accuracy(logits, labels, 5)}

    def show() -> Image.Image:
        pictures = []
        for i in spread(range(len(unseen)), SHOWN):
            guess, truth = names[int(guesses[i])], names[int(labels[i])]
            pictures.append(captioned(unseen[i].read(), guess if guess == truth else f"{guess}, not {truth}"))
        return sheet([pictures[i : i + 4] for i in range(0, len(pictures), 4)])

    def keep() -> None:
        report = {"labels": names, "rows": "true", "columns": "predicted", "confusion": confusion.tolist()}
        (place.output_dir / "confusion.json").write_text(json.dumps(report))

    fetch = Fetch(model.preprocessing, options.smallest_crop, options.random_flip)
    best = Best("top1", options.early_stopping, keep)
    return train_with_head(place, options, model, items, fetch, loss_of, evaluate, show, best)
