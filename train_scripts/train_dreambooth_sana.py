"""Teaches Sana a subject or a style from a few images (DreamBooth), with Serial LoRA.

    accelerate launch train_scripts/train_dreambooth_sana.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir outputs/dog \
        --mixed_precision bf16 --cache_latents --gradient_checkpointing

The recipe is slora_diffusers/recipes/dreambooth_sana.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.dreambooth_sana import main

if __name__ == "__main__":
    run_script(main)
