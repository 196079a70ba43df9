"""Teaches Stable Diffusion 3 or 3.5 a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_sd3.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --validation_prompt "a photo of sks dog in a bucket"

The recipe is slora_diffusers/recipes/dreambooth_sd3.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.dreambooth_sd3 import main

if __name__ == "__main__":
    run_script(main)
