"""Teaches CLIP or SigLIP new classes from a few images, with the classes' names as prompts: a few shots, no new head.

    accelerate launch train_scripts/train_clip.py --pretrained_model_name_or_path openai/clip-vit-base-patch32 \
        --train_data_dir photos --shots 16 --template "a photo of a {}." --output_dir outputs/clip

`photos` holds a folder per class, whose name goes into the prompt. The result is one small file with adapter, prompts
and preprocessing, for pipelines/classify_images.py. In the manner of CLIP-LoRA (Zanella, Ben Ayed, arXiv 2405.18541).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import SerialLoraError
from ..heads.prompts import TOWERS, SerialLoraForPromptClassification
from ..training.parsing import option
from ..training.place import Place
from ..training.vision.classification import ClassOptions, find_items, train_classifier
from ..training.vision.recipe import hub_arguments, parse_options, prepared

LEARNING_RATES = {"serial": 4e-4, "full": 1e-6}  # twice CLIP-LoRA's rate for the pairs


@dataclass(frozen=True)
class Options(ClassOptions):
    """CLIP."""

    towers: str = option("both", "Where the pairs go.", choices=tuple(TOWERS))
    template: str = option("a photo of a {}.", "The prompt; {} stands for the class's name.")
    padding: str = option("longest", "How prompts are padded; SigLIP wants max_length.")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, write the scores and the confusion matrix, and return the scores."""
    options = parse_options(Options, __doc__, argv, LEARNING_RATES)
    if options.resolution is not None:
        raise SerialLoraError("--resolution: CLIP reads images of one size; leave it out.")
    if options.towers != "both":
        if options.targets or options.adapter != "serial":
            raise SerialLoraError("--towers chooses sites for Serial LoRA, instead of --targets: leave out the other.")
        options = replace(options, targets=[TOWERS[options.towers]])
    items, unseen, names = find_items(options)
    place = Place(options)
    loading: dict[str, Any] = {"dtype": place.weight_dtype, **hub_arguments(options)}
    prompts = {"template": options.template, "padding": options.padding}
    path = options.pretrained_model_name_or_path
    model = SerialLoraForPromptClassification.from_clip(path, names, None, **prompts, **loading)
    model.preprocessing = prepared(model.preprocessing, options)
    model.check_size(model.preprocessing.size)
    return train_classifier(place, options, model, items, unseen)
