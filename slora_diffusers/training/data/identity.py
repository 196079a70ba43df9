"""Keys of what caches hold: the bytes of a thing and of everything that made it, never a name or a place.

Two images that are called 0.png have two keys, and one image under two names has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SerialLoraError
from ...files.save import library_version


def key_of(*parts: Any) -> str:
    """A hexadecimal key of JSON-able parts, bytes and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        data = _bytes(part)
        digest.update(f"{type(part).__name__} {len(data)}\n".encode())  # "a", "b" is not "ab"
        digest.update(data)
    return digest.hexdigest()[:40]


def model_key(model: nn.Module) -> str:
    """A key of a model: its class, its config, and every byte of its weights."""
    config = getattr(model, "config", {})
    config = dict(config) if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    # A private entry tells where the model came from.
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if meta := [name for name, value in weights.items() if value.is_meta]:
        raise SerialLoraError(f"{type(model).__name__} is offloaded: {meta[0]} cannot be read. Load the whole model.")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter's lock
        digests = list(pool.map(_weight_key, weights.values()))
    return key_of(type(model).__name__, config, dict(zip(weights, digests, strict=True)))


def component_key(component: Any) -> str | None:
    """A key of any component of a pipeline: a model, or what `save_pretrained` writes (tokenizers, processors)."""
    if component is None:
        return None
    if isinstance(component, nn.Module):
        return model_key(component)
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        files = {path.name: key_of(path.read_bytes()) for path in Path(folder).rglob("*") if path.is_file()}
    plain = {name: value for name, value in vars(component).items() if isinstance(value, str | int | float)}
    plain.pop("name_or_path", None)  # a place; the rest, such as the side that is padded, may differ from the files
    return key_of(type(component).__name__, files, plain)


def pipeline_key(pipe: Any, *without: str) -> str:
    """A key of a pipeline: its class, settings and components, except for those that are named."""
    components = {name: component_key(part) for name, part in pipe.components.items() if name not in without}
    settings = {k: v for k, v in pipe.config.items() if k not in pipe.components and not k.startswith("_")}
    return key_of(type(pipe).__name__, settings, components)


def library_versions() -> list[str]:
    """The libraries whose code encodes images and texts: another version may encode them otherwise."""
    others = [f"{name} {version(name)}" for name in ("diffusers", "transformers", "pillow")]
    return [f"slora_diffusers {library_version()}", *others]


def _weight_key(weight: Tensor) -> str:
    return key_of(str(weight.dtype), list(weight.shape), weight)


def _bytes(part: Any) -> bytes | memoryview:
    if isinstance(part, Tensor):
        flat = part.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
