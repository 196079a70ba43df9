"""Fine-tunes a vision backbone to segment images: a folder with `images`, and `masks` of the same file names.

    accelerate launch train_scripts/train_vit_segmentation.py --pretrained_model_name_or_path facebook/dinov2-small \
        --train_data_dir scenes --validation_data_dir more_scenes --label_map labels.json --head convolutional

The recipe is slora_diffusers/recipes/vit_segmentation.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.vit_segmentation import main

if __name__ == "__main__":
    run_script(main)
