"""Fine-tunes a vision backbone to segment images: a folder with `images`, and `masks` of the same file names.

    accelerate launch train_scripts/train_vit_segmentation.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir scenes --validation_data_dir more_scenes --label_map labels.json --head convolutional

`labels.json` says what the masks' values mean, {"background": 0, "cat": 1, "ignore": 255}, or their colours, [r, g, b].
Images and masks may also be columns of a data set (--dataset_name).
The result is one small file with adapter, head, label names and preprocessing, for pipelines/segment_images.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from slora_diffusers.errors import SerialLoraError, run_script
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.segmentation import SEGMENTATION_HEADS, SerialLoraForSemanticSegmentation
from slora_diffusers.training.data.batches import Batch
from slora_diffusers.training.data.images import Item
from slora_diffusers.training.data.labelled import Fetch, Mask, hold_out
from slora_diffusers.training.data.masks import LabelMap, class_names, mask_dataset, mask_folder, read_label_map
from slora_diffusers.training.options import switch, value
from slora_diffusers.training.run import Run
from slora_diffusers.training.vision.recipe import batches_of, fit, open_for_training, parse_options, prepare_model
from slora_diffusers.training.vision.scores import Overlap, class_weights, confusion_matrix, segmentation_loss

SEGMENTATION = (
    ("dataset_name", value(str, None, "Data set on the Hub or saved to a folder, instead of --train_data_dir.")),
    ("dataset_split", value(str, "train", "Split of it to train on.")),
    ("validation_split", value(str, None, "Split of it to validate on.")),
    ("image_column", value(str, "image", "Column of the images.")),
    ("mask_column", value(str, "mask", "Column of the masks, as images.")),
    ("validation_fraction", value(float, 0.2, "Share of the images to hold out where no validation data are given.")),
    ("label_map", value(str, None, "JSON file: what the masks' values or colours mean.", required=True)),
    ("head", value(str, "linear", "Head over the patches.", choices=SEGMENTATION_HEADS)),
    ("head_layers", value(int, None, "Blocks that the convolutional head reads; four by default.", nargs="+")),
    ("head_width", value(int, 128, "Channels of the convolutional head.")),
    ("dice_weight", value(float, 0.0, "Weight of the Dice loss beside the cross-entropy.")),
    ("balance_classes", switch("Weigh classes in the cross-entropy by how rare their pixels are.")),
)
Masks = dict[str, Callable[[], Mask]]


def find_items(options: argparse.Namespace, label_map: LabelMap) -> tuple[list[Item], Masks, list[Item], Masks]:
    """The images to train on and readers of their masks, by name; and those to validate on."""
    if (options.train_data_dir is None) == (options.dataset_name is None):
        raise SerialLoraError("give one of --train_data_dir and --dataset_name.")
    columns = (options.image_column, options.mask_column)
    if options.train_data_dir is not None:
        items, masks = mask_folder(options.train_data_dir, label_map)
    else:
        items, masks = mask_dataset(options.dataset_name, options.dataset_split, *columns, label_map)
    if options.validation_data_dir is not None:
        return items, masks, *mask_folder(options.validation_data_dir, label_map)
    if options.validation_split is not None:
        return items, masks, *mask_dataset(options.dataset_name, options.validation_split, *columns, label_map)
    items, unseen = hold_out(items, options.validation_fraction, options.seed)
    return items, {item.name: masks[item.name] for item in items}, unseen, masks


@torch.no_grad()
def confusion_of(
    model: SerialLoraForSemanticSegmentation, items: Sequence[Item], masks: Masks, prepare: Preprocessing, run: Run
) -> Tensor:
    """The confusion matrix over all validation pixels, each image at its original resolution."""
    total = torch.zeros(model.num_labels, model.num_labels, dtype=torch.long)
    for item in items:
        truth = torch.from_numpy(masks[item.name]())  # (H, W)
        with run.accelerator.autocast():
            logits = model(prepare(item.read())[None].to(run.device, run.weight_dtype)).logits.float()
        predicted = F.interpolate(logits, truth.shape, mode="bilinear").argmax(1)[0]  # (H, W)
        total += confusion_matrix(predicted.cpu(), truth, model.num_labels)
    return total


def pixel_counts(masks: Masks, classes: int) -> Tensor:
    """How many pixels each class has in the training masks, (classes,)."""
    truths = (torch.from_numpy(read()) for read in masks.values())
    return sum((confusion_matrix(truth, truth, classes).diagonal() for truth in truths), torch.zeros(classes))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, and give the scores."""
    options = parse_options(__doc__ or "", SEGMENTATION, argv)
    label_map = read_label_map(options.label_map)
    names = class_names(label_map)
    items, masks, unseen, unseen_masks = find_items(options, label_map)
    run = Run(options)
    set_seed(options.seed)  # of the head's and the adapter's initial weights: the same on every process
    backbone, prepare = open_for_training(options, run)
    shape = {"layers": options.head_layers, "width": options.head_width}
    model = SerialLoraForSemanticSegmentation.from_backbone(
        backbone, None, None, head=options.head, label_names=names, preprocessing=prepare, **shape
    )
    batches = batches_of(run, items, Fetch(prepare, options.smallest_crop, options.random_flip, masks))
    called = prepare_model(run, model)
    weights = class_weights(pixel_counts(masks, len(names))).to(run.device) if options.balance_classes else None

    def loss_of(batch: Batch) -> Tensor:
        pixels, targets = batch.inputs[:, :3], batch.inputs[:, 3].long().to(run.device)  # (B, 3, H, W), (B, H, W)
        with run.accelerator.autocast():
            logits = called(pixels.to(run.device, run.weight_dtype)).logits
        return segmentation_loss(logits.float(), targets, weights, options.dice_weight)

    def evaluate() -> dict[str, float]:
        overlap = Overlap.of(confusion_of(model, unseen, unseen_masks, prepare, run))
        each = {f"iou/{name}": 100 * iou.item() for name, iou in zip(names, overlap.iou, strict=True)}
        return {**overlap.means(), **{name: iou for name, iou in each.items() if iou == iou}}  # NaN: not there

    return fit(run, batches, loss_of, evaluate, "miou")


if __name__ == "__main__":
    run_script(main)
