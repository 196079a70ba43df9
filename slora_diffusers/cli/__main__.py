"""`python -m slora_diffusers.cli`, the same as `slora`."""

from . import app

if __name__ == "__main__":
    app()
