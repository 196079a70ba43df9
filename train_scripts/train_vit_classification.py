"""Fine-tunes a vision backbone to classify images: a folder per class, or a data set of the `datasets` library.

    accelerate launch train_scripts/train_vit_classification.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir photos --shots 16 --output_dir outputs/classifier

The recipe is slora_diffusers/recipes/vit_classification.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.vit_classification import main

if __name__ == "__main__":
    run_script(main)
