"""Fine-tunes a vision backbone to classify images: a folder per class, or a data set of the `datasets` library.

    accelerate launch train_scripts/train_vit_classification.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir photos --shots 16 --output_dir outputs/classifier

The result is one small file with adapter, head, label names and preprocessing, for pipelines/classify_images.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import set_seed

from slora_diffusers.errors import run_script
from slora_diffusers.heads.classification import POOLINGS, SerialLoraForImageClassification
from slora_diffusers.training.options import value
from slora_diffusers.training.run import Run
from slora_diffusers.training.vision.classification import CLASSES, find_items, train_classifier
from slora_diffusers.training.vision.recipe import open_for_training, parse_options

POOLING = (
    ("pooling", value(str, "cls", "What the head reads: class token, mean of the patches, both.", choices=POOLINGS)),
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, write the scores and the confusion matrix, and give the scores."""
    options = parse_options(__doc__ or "", (*CLASSES, *POOLING), argv)
    items, unseen, names = find_items(options)
    run = Run(options)
    set_seed(options.seed)  # of the adapter's initial weights: the same on every process
    backbone, prepare = open_for_training(options, run)
    model = SerialLoraForImageClassification.from_backbone(
        backbone, None, None, pooling=options.pooling, label_names=names, preprocessing=prepare
    )
    return train_classifier(run, model, items, unseen)


if __name__ == "__main__":
    run_script(main)
