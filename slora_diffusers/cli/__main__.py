"""`python -m slora_diffusers.cli`, the same as `slora`."""

from . import main

if __name__ == "__main__":
    main()
