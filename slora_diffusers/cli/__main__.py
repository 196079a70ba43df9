"""The `slora` command, and `python -m slora_diffusers.cli`."""

import sys


def main() -> None:
    """Run the command; without the extra that it needs, say which."""
    try:
        from . import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"error: the slora command needs the package {error.name}: pip install 'slora_diffusers[cli]'")
    app()


if __name__ == "__main__":
    main()
