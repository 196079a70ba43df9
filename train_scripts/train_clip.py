"""Teaches CLIP or SigLIP new classes from a few images, with the classes' names as prompts: a few shots, no new head.

    accelerate launch train_scripts/train_clip.py --pretrained_model_name_or_path openai/clip-vit-base-patch32 \
        --train_data_dir photos --shots 16 --template "a photo of a {}." --output_dir outputs/clip

The recipe is slora_diffusers/recipes/clip.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.clip import main

if __name__ == "__main__":
    run_script(main)
