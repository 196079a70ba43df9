"""Classifies images with what train_scripts/train_vit_classification.py or train_clip.py saved.

python pipelines/classify_images.py photo.jpg more_photos --model outputs/classifier --json results.json

The code is slora_diffusers/recipes/classify_images.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.classify_images import main

if __name__ == "__main__":
    run_script(main)
