"""Fine-tunes a class-conditional DiT on a folder of images per class, or on the demo's glyphs.

    accelerate launch train_scripts/train_dit.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --train_data_dir photos --output_dir outputs/dit --mixed_precision bf16

The recipe is slora_diffusers/recipes/dit.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.dit import main

if __name__ == "__main__":
    run_script(main)
