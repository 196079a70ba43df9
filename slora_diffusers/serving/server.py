"""What `slora serve` starts: a studio, its adapters and its queue behind HTTP."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SerialLoraError
from .adapters import Adapters, Catalogue
from .batcher import POLICY, Batcher, Policy
from .http import KEY_VARIABLE, create_app
from .requests import LIMITS, Limits
from .studio import Studio

logger = logging.getLogger("diffusers.slora_diffusers")


def make_batcher(
    pipe: Any,
    folder: str | os.PathLike[str] | None = None,
    hub: Sequence[str] = (),
    memory: int = 1 << 30,
    policy: Policy = POLICY,
    limits: Limits = LIMITS,
) -> Batcher:
    """A batcher on a pipeline, rehearsed: it knows what requests may share a batch.

    Args:
        pipe: A pipeline of diffusers that draws prompts or classes.
        folder: Folder of adapters.
        hub: Ids of adapters on the Hub that requests may name.
        memory: Bytes of the adapters that are held at a time.
        policy: How requests are joined.
        limits: What one request may ask for.
    """
    catalogue = Catalogue(None if folder is None else Path(folder), hub)
    studio = Studio(pipe, limits)
    studio.rehearse()
    return Batcher(studio, Adapters(pipe, catalogue, memory), policy)


def api_key() -> str | None:
    """The API key in the environment, or None.

    Raises:
        SerialLoraError: If it is set, but empty.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise SerialLoraError(f"{KEY_VARIABLE} is set, but empty: set it to a key, or unset it to ask for none.")
    return key


def run(batcher: Batcher, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until the process is told to end; then draw what has been accepted, and end."""
    import uvicorn

    key = api_key()
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("Everybody who reaches %s may draw: set %s to ask for a key.", host, KEY_VARIABLE)
    uvicorn.run(create_app(batcher, key), host=host, port=port, log_level="warning")
