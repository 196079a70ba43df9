"""`python -m slora_diffusers.recipes NAME ...` runs a recipe: what `slora train` gives to accelerate's launcher."""

import sys

from ..errors import run_script
from . import catalog

if __name__ == "__main__":
    name = sys.argv.pop(1)
    sys.argv[0] = f"slora train {name}"  # what --help and errors call the command
    run_script(catalog.load(name).main)
