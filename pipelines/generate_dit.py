"""Draws images of classes with a DiT and any number of Serial LoRA adapters.

python pipelines/generate_dit.py --base facebook/DiT-XL-2-256 --adapter outputs/dit --labels 207 360 --fuse

The code is slora_diffusers/recipes/generate_dit.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.generate_dit import main

if __name__ == "__main__":
    run_script(main)
