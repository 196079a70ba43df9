"""Teaches PixArt-alpha or PixArt-Sigma a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_pixart.py \
        --pretrained_model_name_or_path PixArt-alpha/PixArt-Sigma-XL-2-1024-MS \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --validation_prompt "a photo of sks dog in a bucket"

The recipe is slora_diffusers/recipes/dreambooth_pixart.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.dreambooth_pixart import main

if __name__ == "__main__":
    run_script(main)
