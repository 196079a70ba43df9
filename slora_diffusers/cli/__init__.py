"""The `slora` command: demo, inspect, export, compress, merge, fuse, verify, serve, compare, app."""

import sys
from typing import Any

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command; where its extra is not installed, say so in one line."""
    try:
        from .look import app
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        sys.exit(f"error: the slora command needs the package {error.name}: pip install 'slora_diffusers[cli]'")
    app()


def __getattr__(name: str) -> Any:
    if name == "app":  # the typer application, imported when it is asked for
        from .look import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
