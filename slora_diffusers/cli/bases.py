"""Find and load what an adapter sits on: a pipeline or a model, from a folder or the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..convert.describe import is_lora
from ..convert.layouts.read import find_lora
from ..errors import AdapterFileError, SerialLoraError
from ..files.format import AdapterFile
from ..files.hub import base_id
from ..files.load import load_serial_lora
from ..files.storage import find_file
from .console import ERR, working

DEMO = "demo"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name."""
    if name not in DTYPES:
        raise SerialLoraError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}.")
    return DTYPES[name]


def load_base(base: str, dtype: str = "float32") -> Any:
    """A pipeline or a model from its folder or Hub id; `demo` is the one that comes with the package."""
    kind = dtype_of(dtype)
    if not ERR.is_terminal:
        _no_bars()
    with working(f"Loading {base}"):
        return _load(base, kind)


def _load(base: str, kind: torch.dtype) -> Any:
    if base == DEMO and not Path(base).exists():
        from ..demo.adapt import load_base as load_demo

        return load_demo() if kind == torch.float32 else load_demo().to(kind)
    folder = Path(base)
    if folder.exists() and not folder.is_dir():
        raise SerialLoraError(f"--base is a pipeline's or a model's folder, or a Hub id; {base} is a file.")
    if _has(base, "model_index.json"):
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(base, dtype=kind)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    config = _has(base, "config.json")
    if config is None:
        raise SerialLoraError(
            f"{base} is neither a folder nor a Hub repository with a model_index.json or a config.json. Give the base "
            "that the adapter was trained on, with --base."
        )
    return _load_model(base, json.loads(config.read_text(encoding="utf-8")), kind)


def kind_of(source: str, weight_name: str | None = None) -> str:
    """What a file, a folder or a Hub id holds: "model" (or pipeline), "LoRA" (of any kind but ours) or "adapter"."""
    if source == DEMO and not Path(source).exists():
        return "model"
    if any(_has(source, name) is not None for name in ("model_index.json", "config.json")):
        return "model"
    try:
        path = find_file(source, weight_name=weight_name)
    except AdapterFileError:
        try:
            path = find_lora(source, weight_name)
        except AdapterFileError:
            return "adapter"  # whose reader says what is wrong
    try:
        with safe_open(path, framework="pt") as file:
            return "LoRA" if is_lora(file.keys()) else "adapter"
    except (SafetensorError, OSError):
        return "adapter"


def load_with_adapters(
    base: str | None, adapters: Sequence[str], weights: Sequence[float] | None, dtype: str = "float32"
) -> tuple[Any, list[str]]:
    """The base with these adapters active, and their names; without a base, the one that the first file names."""
    states = [AdapterFile.read(adapter) for adapter in adapters]
    model = load_base(base or base_name(states[0]), dtype)
    names = [f"adapter_{i}" for i in range(len(states))] if len(states) > 1 else ["default"]
    for name, state, weight in zip(names, states, weights or [1.0] * len(states), strict=True):
        load_serial_lora(model, state, name, weight)
    return model, names


def _no_bars() -> None:
    """No bars of other packages, which draw over their own line again and again: a log file would be full of them."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    disable_progress_bars()


def _load_model(base: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    if "_class_name" in config:
        from diffusers import AutoModel

        return AutoModel.from_pretrained(base, dtype=dtype).eval()
    import transformers

    names = config.get("architectures") or ["AutoModel"]
    model_class = getattr(transformers, names[0], transformers.AutoModel)
    return model_class.from_pretrained(base, dtype=dtype).eval()


def base_name(file: AdapterFile) -> str:
    """The base that an adapter's header names."""
    name = base_id(file.components)
    if name is None:
        raise SerialLoraError("The adapter's file does not say what base it is for. Give it with --base.")
    return name


def _has(base: str, name: str) -> Path | None:
    """The local path of a file in a folder or a Hub repository, or None."""
    if Path(base).exists():
        path = Path(base) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(base, name))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
