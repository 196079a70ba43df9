"""Teaches Z-Image a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_z_image.py \
        --pretrained_model_name_or_path Tongyi-MAI/Z-Image \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

The recipe is slora_diffusers/recipes/dreambooth_z_image.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.dreambooth_z_image import main

if __name__ == "__main__":
    run_script(main)
