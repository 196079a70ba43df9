"""Fine-tunes a vision backbone to segment images: a folder with `images`, and `masks` of the same file names.

    accelerate launch train_scripts/train_vit_segmentation.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir scenes --validation_data_dir more_scenes --label_map labels.json --head convolutional

`labels.json` says what the masks' values or colours mean: {"background": 0, "cat": [255, 0, 0], "ignore": 255}.
The result is one small file with adapter, head, label names and preprocessing, for pipelines/segment_images.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.preprocessing import Preprocessing
from slora_diffusers.training.batches import Batch
from slora_diffusers.training.data import Item
from slora_diffusers.training.labelled import Fetch, Mask
from slora_diffusers.training.masks import class_names, mask_folder, read_label_map
from slora_diffusers.training.options import switch, value
from slora_diffusers.training.run import Run
from slora_diffusers.training.scores import Overlap, class_weights, confusion_matrix, segmentation_loss
from slora_diffusers.training.vision import batches_of, fit, open_for_training, parse_options, prepare_model
from slora_diffusers.vision import SEGMENTATION_HEADS, SerialLoraForSemanticSegmentation

SEGMENTATION = (
    ("label_map", value(str, None, "JSON file: what the masks' values or colours mean.", required=True)),
    ("head", value(str, "linear", "Head over the patches.", choices=SEGMENTATION_HEADS)),
    ("head_layers", value(int, None, "Blocks that the convolutional head reads; four by default.", nargs="+")),
    ("head_width", value(int, 128, "Channels of the convolutional head.")),
    ("dice_weight", value(float, 0.0, "Weight of the Dice loss beside the cross-entropy.")),
    ("balance_classes", switch("Weigh classes in the cross-entropy by how rare their pixels are.")),
)
Masks = dict[str, Callable[[], Mask]]


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
    if options.train_data_dir is None or options.validation_data_dir is None:
        raise SerialLoraError("give --train_data_dir and --validation_data_dir.")
    label_map = read_label_map(options.label_map)
    names = class_names(label_map)
    items, masks = mask_folder(options.train_data_dir, label_map)
    unseen, unseen_masks = mask_folder(options.validation_data_dir, label_map)
    run = Run(options)
    set_seed(options.seed)  # of the head's and the adapter's initial weights: the same on every process
    backbone, prepare = open_for_training(options, run)
    shape = {} if options.head == "linear" else {"layers": options.head_layers, "width": options.head_width}
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
    main()
