"""Draws images of prompts with SD3, PixArt, Flux or another text-to-image pipeline and any number of adapters.

    python pipelines/generate_text_to_image.py --base stabilityai/stable-diffusion-3-medium-diffusers \
        --adapter outputs/dog --prompts "a photo of sks dog in a bucket" --dtype bf16

The code is slora_diffusers/recipes/generate_text_to_image.py.
"""

from slora_diffusers.errors import run_script
from slora_diffusers.recipes.generate_text_to_image import main

if __name__ == "__main__":
    run_script(main)
