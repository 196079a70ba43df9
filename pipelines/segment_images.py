"""Segments images with what train_scripts/train_vit_segmentation.py saved: masks, overlay pictures, a table of areas.

python pipelines/segment_images.py photo.jpg more_photos --model outputs/segmenter --output_dir outputs/masks

The code is slora_diffusers/recipes/segment_images.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.segment_images import main

if __name__ == "__main__":
    run_script(main)
