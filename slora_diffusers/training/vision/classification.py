"""What the recipes that classify share: where labelled images come from, the loss, the scores, the confusion matrix."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import SerialLoraError
from ...heads.base import SerialLoraWithHead
from ..data.batches import Batch
from ..data.images import Item
from ..data.labelled import Fetch, few_shots, hold_out, hub_dataset, image_folder
from ..options import Group, switch, value
from ..run import Run
from .recipe import batches_of, fit, prepare_model
from .scores import class_weights, confusion_matrix, top_k_accuracy

CLASSES: Group = (
    ("dataset_name", value(str, None, "Data set on the Hub or saved to a folder, instead of --train_data_dir.")),
    ("dataset_split", value(str, "train", "Split of it to train on.")),
    ("validation_split", value(str, None, "Split of it to validate on.")),
    ("image_column", value(str, "image", "Column of the images.")),
    ("label_column", value(str, "label", "Column of the classes.")),
    ("shots", value(int, 0, "Training images of each class; 0 for all.")),
    ("validation_fraction", value(float, 0.2, "Share of every class to hold out where no validation data are given.")),
    ("balance_classes", switch("Weigh classes in the cross-entropy by how few images they have.")),
)


def find_items(options: argparse.Namespace) -> tuple[list[Item], list[Item], list[str]]:
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
        items, names = hub_dataset(options.dataset_name, options.dataset_split, *columns)
    if options.validation_data_dir is not None:
        unseen, _ = image_folder(options.validation_data_dir, names)
    elif options.validation_split is not None:
        unseen, _ = hub_dataset(options.dataset_name, options.validation_split, *columns, names)
    else:
        items, unseen = hold_out(items, options.validation_fraction, options.seed, names)
    return few_shots(items, options.shots, options.seed, names), unseen, names


@torch.no_grad()
def logits_of(model: SerialLoraWithHead, items: Sequence[Item], run: Run) -> Tensor:
    """Logits (N, classes) of images, a batch at a time."""
    size, found = run.options.train_batch_size, []
    for start in range(0, len(items), size):
        pixels = torch.stack([model.preprocessing(item.read()) for item in items[start : start + size]]).to(run.device)
        with run.accelerator.autocast():
            found.append(model(pixels.to(run.weight_dtype)).logits.float().cpu())
    return torch.cat(found)


def train_classifier(
    run: Run, model: SerialLoraWithHead, items: Sequence[Item], unseen: Sequence[Item]
) -> dict[str, float]:
    """Train a model of either kind, save it, write the confusion matrix, and give the scores.

    Args:
        run: A run that is not prepared yet.
        model: The model, not adapted yet.
        items: The images to train on.
        unseen: The images to validate on.
    """
    options, names = run.options, list(model.label_names)
    batches = batches_of(run, items, Fetch(model.preprocessing, options.smallest_crop, options.random_flip))
    called = prepare_model(run, model)
    counts = torch.tensor([item.label for item in items]).bincount(minlength=len(names))
    weights = class_weights(counts).to(run.device) if options.balance_classes else None
    labels = torch.tensor([item.label for item in unseen])
    confusion = torch.zeros(len(names), len(names), dtype=torch.long)

    def loss_of(batch: Batch) -> Tensor:
        targets = torch.tensor([item.label for item in batch.items], device=run.device)
        with run.accelerator.autocast():
            logits = called(batch.inputs.to(run.device, run.weight_dtype)).logits
        return F.cross_entropy(logits.float(), targets, weights)

    def evaluate() -> dict[str, float]:
        logits = logits_of(model, unseen, run)
        confusion.copy_(confusion_matrix(logits.argmax(1), labels, len(names)))
        return {"top1": top_k_accuracy(logits, labels, 1), "top5": top_k_accuracy(logits, labels, 5)}

    def keep() -> None:
        report = {"labels": names, "rows": "true", "columns": "predicted", "confusion": confusion.tolist()}
        (run.output_dir / "confusion.json").write_text(json.dumps(report))

    return fit(run, batches, loss_of, evaluate, "top1", keep)
