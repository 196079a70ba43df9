"""`python -m slora_diffusers.demo [output folder]`: the demo, as `slora demo` runs it."""

import sys

from .run import run_demo

if __name__ == "__main__":
    run_demo(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")
