"""The `slora` command: demo, inspect, export, compress, merge, fuse, verify."""

from .commands import app

__all__ = ["app"]
