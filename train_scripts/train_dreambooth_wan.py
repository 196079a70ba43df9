"""Teaches Wan 2.1 to draw images a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_wan.py \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

The recipe is slora_diffusers/recipes/dreambooth_wan.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.dreambooth_wan import main

if __name__ == "__main__":
    run_script(main)
