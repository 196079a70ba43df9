"""Teaches CLIP or SigLIP new classes from a few images, with the classes' names as prompts: a few shots, no new head.

    accelerate launch train_scripts/train_clip.py --pretrained_model_name_or_path openai/clip-vit-base-patch32 \
        --train_data_dir photos --shots 16 --template "a photo of a {}." --output_dir outputs/clip

`photos` holds a folder per class, whose name goes into the prompt. The result is one small file with adapter, prompts
and preprocessing, for pipelines/classify_images.py. In the manner of CLIP-LoRA (Zanella, Ben Ayed, arXiv 2405.18541).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import set_seed

from slora_diffusers.errors import SerialLoraError, run_script
from slora_diffusers.heads.prompts import TOWERS, SerialLoraForPromptClassification
from slora_diffusers.training.options import value
from slora_diffusers.training.run import Run
from slora_diffusers.training.vision.classification import CLASSES, find_items, train_classifier
from slora_diffusers.training.vision.recipe import hub_arguments, parse_options

CLIP = (
    ("towers", value(str, "both", "Where the pairs go.", choices=TOWERS)),
    ("template", value(str, "a photo of a {}.", "The prompt; {} stands for the class's name.")),
    ("padding", value(str, "longest", "How prompts are padded; SigLIP wants max_length.")),
)
LEARNING_RATES = {"serial": 4e-4, "full": 1e-6}  # twice CLIP-LoRA's rate for the pairs


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save, write the scores and the confusion matrix, and give the scores."""
    options = parse_options(__doc__ or "", (*CLASSES, *CLIP), argv, LEARNING_RATES)
    if options.resolution is not None:
        raise SerialLoraError("--resolution: CLIP reads images of one size; leave it out.")
    if options.towers != "both" and (options.targets or options.adapter != "serial"):
        raise SerialLoraError("--towers chooses sites for Serial LoRA, instead of --targets: leave out the other.")
    items, unseen, names = find_items(options)
    run = Run(options)
    set_seed(options.seed)  # of the adapter's initial weights: the same on every process
    loading: dict[str, Any] = {"dtype": run.weight_dtype, **hub_arguments(options)}
    prompts = {"template": options.template, "padding": options.padding}
    path = options.pretrained_model_name_or_path
    model = SerialLoraForPromptClassification.from_clip(path, names, None, **prompts, **loading)
    if options.towers != "both":
        options.targets = [TOWERS[options.towers]]
    return train_classifier(run, model, items, unseen)


if __name__ == "__main__":
    run_script(main)
