"""Fine-tunes a vision backbone to segment images: a folder with `images`, and `masks` of the same file names.

    accelerate launch train_scripts/train_vit_segmentation.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir scenes --validation_data_dir more_scenes --label_map labels.json --head convolutional

`labels.json` says what the masks' values mean, {"background": 0, "cat": 1, "ignore": 255}, or their colours, [r, g, b].
Images and masks may also be columns of a data set (--dataset_name).
The result is one small file with adapter, head, label names and preprocessing, for pipelines/segment_images.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SerialLoraError
from ..heads.framing import CROP
from ..heads.segmentation import IGNORE_INDEX, SEGMENTATION_HEADS, SerialLoraForSemanticSegmentation
from ..training.data.batches import Batch
from ..training.data.images import Item
from ..training.data.labelled import Fetch, Mask, hold_out
from ..training.data.loss_masks import masked
from ..training.data.masks import LabelMap, class_names, mask_dataset, mask_folder, read_label_map
from ..training.fit import Best
from ..training.options import ANY, COUNT, NOT_NEGATIVE, MaskOptions
from ..training.parsing import option
from ..training.place import Place
from ..training.vision.pictures import overlay, sheet, spread
from ..training.vision.recipe import VisionOptions, open_for_training, parse_options, train_with_head
from ..training.vision.scores import Overlap, class_weights, confusion_matrix, segmentation_loss

Masks = dict[str, Callable[[], Mask]]
SHOWN, WIDTH = 4, 240
"""Validation images on the run's page, and their width in pixels."""


@dataclass(frozen=True)
class Options(VisionOptions, MaskOptions):
    """Images, masks, and the head."""

    mask_column: str = option("mask", "Column of the masks, as images.")
    label_map: str = option(None, "JSON file: what the masks' values or colours mean.", required=True)
    head: str = option("linear", "Head over the patches.", choices=tuple(SEGMENTATION_HEADS))
    head_layers: list[int] | None = option(None, "Blocks that a head over several reads; four by default.", within=ANY)
    head_width: int = option(128, "Channels of a head over several layers.", within=COUNT)
    dice_weight: float = option(0.0, "Weight of the Dice loss beside the cross-entropy.", within=NOT_NEGATIVE)
    balance_classes: bool = option(False, "Weigh classes in the cross-entropy by how rare their pixels are.")


def find_items(options: Options, label_map: LabelMap) -> tuple[list[Item], Masks, list[Item], Masks]:
    """The images to train on and readers of their masks, by name; and those to validate on."""
    if (options.train_data_dir is None) == (options.dataset_name is None):
        raise SerialLoraError("give one of --train_data_dir and --dataset_name.")
    if options.validation_split is not None and options.dataset_name is None:
        raise SerialLoraError("--validation_split is one of --dataset_name; with a folder, --validation_data_dir.")
    dataset, columns = options.dataset_name or "", (options.image_column, options.mask_column)
    if options.train_data_dir is not None:
        folder = Path(options.train_data_dir)
        if options.mask_data_dir is not None and Path(options.mask_data_dir).resolve() == (folder / "masks").resolve():
            raise SerialLoraError("--mask_data_dir is for masks of the loss, and these are the classes of the pixels.")
        items, masks = mask_folder(folder, label_map)
        items = masked(items, folder / "images", options)
    else:
        if options.mask_data_dir is not None or options.alpha_mask:
            raise SerialLoraError("--mask_data_dir and --alpha_mask go with --train_data_dir.")
        items, masks = mask_dataset(dataset, options.dataset_split, *columns, label_map, options.weight_column)
    if options.validation_data_dir is not None:
        return items, masks, *mask_folder(options.validation_data_dir, label_map)
    if options.validation_split is not None:
        return items, masks, *mask_dataset(dataset, options.validation_split, *columns, label_map)
    items, unseen = hold_out(items, options.validation_fraction, options.seed)
    return items, {item.name: masks[item.name] for item in items}, unseen, masks


def confusion_of(model: SerialLoraForSemanticSegmentation, items: Sequence[Item], masks: Masks, place: Place) -> Tensor:
    """The confusion matrix over all validation pixels, each image at its original resolution."""
    total = torch.zeros(model.num_labels, model.num_labels, dtype=torch.long)
    for item in items:
        truth = torch.from_numpy(masks[item.name]())  # (H, W)
        with place.autocast():
            predicted = model.predict(item.read()).argmax(0)  # (H, W)
        total += confusion_matrix(predicted, truth, model.num_labels)
    return total


def compared(
    model: SerialLoraForSemanticSegmentation, item: Item, truth: np.ndarray, place: Place
) -> list[Image.Image]:
    """An image, the mask that it has, and the one that is predicted."""
    image = item.read()
    with place.autocast():
        predicted = model.predict(image).argmax(0).byte().numpy()
    size = (WIDTH, max(1, round(image.height * WIDTH / image.width)))
    small = image.resize(size)
    masks = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in (truth, predicted)]
    return [small, *(overlay(small, mask, model.label_names) for mask in masks)]


def pixel_counts(masks: Masks, classes: int) -> Tensor:
    """How many pixels each class has in the training masks, (classes,)."""
    truths = (torch.from_numpy(read()) for read in masks.values())
    return sum((confusion_matrix(truth, truth, classes).diagonal() for truth in truths), torch.zeros(classes))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, and return the scores."""
    options = parse_options(Options, __doc__, argv)
    label_map = read_label_map(options.label_map)
    names = class_names(label_map)
    items, masks, unseen, unseen_masks = find_items(options, label_map)
    if options.resize_mode == CROP:
        raise SerialLoraError("--resize_mode crop leaves pixels out, which cannot be segmented: use pad, or --tile.")
    place = Place(options)
    backbone, prepare = open_for_training(options, place)
    shape = {"layers": options.head_layers, "width": options.head_width}
    model = SerialLoraForSemanticSegmentation.from_backbone(
        backbone, None, None, head=options.head, label_names=names, preprocessing=prepare, **shape
    )
    weights = class_weights(pixel_counts(masks, len(names))).to(place.device) if options.balance_classes else None

    def loss_of(called: Any, batch: Batch) -> Tensor:
        pixels, targets = batch.inputs[:, :3], batch.inputs[:, 3].long().to(place.device)  # (B, 3, H, W), (B, H, W)
        targets[batch.weights == 0] = IGNORE_INDEX
        with place.autocast():
            logits = called(pixels.to(place.device, place.weight_dtype)).logits
        shares = (None if batch.masks is None else batch.masks[:, 0].to(place.device), batch.weights.to(place.device))
        return segmentation_loss(logits.float(), targets, weights, options.dice_weight, *shares)

    def evaluate() -> dict[str, float]:
        overlap = Overlap.of(confusion_of(model, unseen, unseen_masks, place))
        each = {f"iou/{name}": 100 * iou.item() for name, iou in zip(names, overlap.iou, strict=True)}
        return {**overlap.means(), **{name: iou for name, iou in each.items() if iou == iou}}  # NaN: not there

    def show() -> Image.Image:
        return sheet([compared(model, item, unseen_masks[item.name](), place) for item in spread(unseen, SHOWN)])

    fetch = Fetch(prepare, options.smallest_crop, options.random_flip, masks)
    best = Best("miou", options.early_stopping)
    return train_with_head(place, options, model, items, fetch, loss_of, evaluate, show, best)
