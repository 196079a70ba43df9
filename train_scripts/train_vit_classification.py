"""Fine-tunes a vision backbone to classify images: a folder per class, or a data set of the `datasets` library.

    accelerate launch train_scripts/train_vit_classification.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir photos --shots 16 --output_dir outputs/classifier

The result is one small file with adapter, head, label names and preprocessing, for pipelines/classify_images.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from accelerate.utils import set_seed
from torch import Tensor

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.preprocessing import Preprocessing
from slora_diffusers.training.batches import Batch
from slora_diffusers.training.data import Item
from slora_diffusers.training.labelled import Fetch, few_shots, hold_out, hub_dataset, image_folder
from slora_diffusers.training.options import value
from slora_diffusers.training.run import Run
from slora_diffusers.training.scores import confusion_matrix, top_k_accuracy
from slora_diffusers.training.vision import batches_of, fit, open_for_training, parse_options, prepare_model
from slora_diffusers.vision import POOLINGS, SerialLoraForImageClassification

CLASSIFICATION = (
    ("dataset_name", value(str, None, "Data set on the Hub or saved to a folder, instead of --train_data_dir.")),
    ("dataset_split", value(str, "train", "Split of it to train on.")),
    ("validation_split", value(str, None, "Split of it to validate on.")),
    ("image_column", value(str, "image", "Column of the images.")),
    ("label_column", value(str, "label", "Column of the classes.")),
    ("shots", value(int, 0, "Training images of each class; 0 for all.")),
    ("validation_fraction", value(float, 0.2, "Share of every class to hold out where no validation data are given.")),
    ("pooling", value(str, "cls", "What the head reads: class token, mean of the patches, both.", choices=POOLINGS)),
)


def find_items(options: argparse.Namespace) -> tuple[list[Item], list[Item], list[str]]:
    """The items to train on, those to validate on, and the names of the classes."""
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
        items, unseen = hold_out(items, options.validation_fraction, options.seed)
    return few_shots(items, options.shots, options.seed), unseen, names


@torch.no_grad()
def logits_of(
    model: SerialLoraForImageClassification, items: Sequence[Item], prepare: Preprocessing, run: Run
) -> Tensor:
    """Logits (N, classes) of the validation images, a batch at a time."""
    size, found = run.options.train_batch_size, []
    for start in range(0, len(items), size):
        pixels = torch.stack([prepare(item.read()) for item in items[start : start + size]]).to(run.device)
        with run.accelerator.autocast():
            found.append(model(pixels.to(run.weight_dtype)).logits.float().cpu())
    return torch.cat(found)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, write the scores and the confusion matrix, and give the scores."""
    options = parse_options(__doc__ or "", CLASSIFICATION, argv)
    items, unseen, names = find_items(options)
    run = Run(options)
    set_seed(options.seed)  # of the adapter's initial weights: the same on every process
    backbone, prepare = open_for_training(options, run)
    model = SerialLoraForImageClassification.from_backbone(
        backbone, None, None, pooling=options.pooling, label_names=names, preprocessing=prepare
    )
    batches = batches_of(run, items, Fetch(prepare, options.smallest_crop, options.random_flip))
    called = prepare_model(run, model)
    labels = torch.tensor([item.label for item in unseen])

    def loss_of(batch: Batch) -> Tensor:
        targets = torch.tensor([item.label for item in batch.items], device=run.device)
        with run.accelerator.autocast():
            return called(batch.inputs.to(run.device, run.weight_dtype), labels=targets).loss

    def evaluate() -> dict[str, float]:
        logits = logits_of(model, unseen, prepare, run)
        if run.accelerator.is_main_process:
            confusion = confusion_matrix(logits.argmax(1), labels, len(names))
            report = {"labels": names, "rows": "true", "columns": "predicted", "confusion": confusion.tolist()}
            (run.output_dir / "confusion.json").write_text(json.dumps(report))
        return {"top1": top_k_accuracy(logits, labels, 1), "top5": top_k_accuracy(logits, labels, 5)}

    return fit(run, batches, loss_of, evaluate, "top1")


if __name__ == "__main__":
    main()
