"""Fine-tunes a vision backbone to classify images: a folder per class, or a data set of the `datasets` library.

    accelerate launch train_scripts/train_vit_classification.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir photos --shots 16 --output_dir outputs/classifier

The result is one small file with adapter, head, label names and preprocessing, for pipelines/classify_images.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..heads.classification import POOLINGS, SerialLoraForImageClassification
from ..training.parsing import option
from ..training.place import Place
from ..training.vision.classification import ClassOptions, find_items, train_classifier
from ..training.vision.recipe import open_for_training, parse_options


@dataclass(frozen=True)
class Options(ClassOptions):
    """The head."""

    pooling: str = option("cls", "What the head reads: class token, mean of the patches, both.", choices=POOLINGS)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, write the scores and the confusion matrix, and return the scores."""
    options = parse_options(Options, __doc__, argv)
    items, unseen, names = find_items(options)
    place = Place(options)
    backbone, prepare = open_for_training(options, place)
    model = SerialLoraForImageClassification.from_backbone(
        backbone, None, None, pooling=options.pooling, label_names=names, preprocessing=prepare
    )
    return train_classifier(place, options, model, items, unseen)
