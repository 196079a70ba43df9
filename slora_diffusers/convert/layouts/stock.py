"""Ask a pipeline's own converter where the modules of a LoRA's file belong, and check that it leaves nothing out.

diffusers converts the layouts of many trainers, some of whose keys it drops in silence. So the converter gets no
weights here: each module goes through it as a LoRA of rank 1 whose `up` numbers its rows, and what comes out tells
which rows went where. A module that does not come out whole, or does not fit, is not the converter's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import shape_of
from .names import Place, linears_of, out_features
from .parts import Module, split_key
from .spellings import find_place


def stock_places(
    modules: Iterable[Module], pipeline: Any, models: Mapping[str, nn.Module], places: Mapping[str, Place]
) -> dict[str, Place]:
    """{module: where it belongs} of those that the pipeline's `lora_state_dict` understands.

    Args:
        modules: What the file holds.
        pipeline: A pipeline of diffusers; one without LoRA loader understands nothing.
        models: {component: model} of it.
        places: Every name of the models' own modules, for what comes out.
    """
    starts: dict[str, int] = {}
    heights: dict[str, int] = {}
    labelled: dict[str, Tensor] = {}
    start = 1  # converters drop what is all zero
    for module in modules:
        shape = shape_of(module)
        if shape is not None:
            starts[module.name], heights[module.name] = start, shape[0]
            labelled |= _labelled(module, start, shape)
            start += shape[0]
    converted = _convert(pipeline, labelled, models)
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    owners = [name for name, height in heights.items() for _ in range(height)]
    for key, up in converted.items():
        name, part = split_key(key)
        target = find_place(name, places) if part == "lora.up" else None
        if target is None or len(target.paths) != 1 or up.ndim != 2 or up.shape[1] != 1:
            continue
        labels = up.flatten().round().long() - 1
        ((path, rows),) = target.paths.items()
        if not labels.numel() or labels.min() < 0 or labels.max() >= len(owners):
            continue
        owner = owners[int(labels[0])]
        component, paths = found.setdefault(owner, (target.component, {}))
        if component == target.component and labels.numel() == out_features(linears_of(models[component])[path]):
            paths[path] = (labels + 1 - starts[owner])[rows]
    return {
        name: Place(component, paths)
        for name, (component, paths) in found.items()
        if sorted(torch.cat([*paths.values(), torch.empty(0)]).long().tolist()) == list(range(heights[name]))
    }


def _labelled(module: Module, start: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """A LoRA of rank 1 under the module's name, in the spelling of its keys, whose `up` numbers its rows."""
    down = module.keys.get("down", f"{module.name}.lora_down.weight")
    up = module.keys.get("up", f"{module.name}.lora_up.weight")
    labels = torch.arange(start, start + shape[0], dtype=torch.float64)[:, None]
    alpha = {f"{module.name}.alpha": torch.tensor(1.0)} if module.alpha is not None else {}
    return {down: torch.ones(1, max(1, shape[1]), dtype=torch.float64), up: labels, **alpha}


def _convert(pipeline: Any, labelled: dict[str, Tensor], models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the pipeline's converter makes of these; nothing where it has none, or gives up."""
    convert = getattr(pipeline, "lora_state_dict", None)
    if convert is None:
        return {}
    more = {"unet_config": models["unet"].config} if "unet" in models else {}
    with _quiet("diffusers"), contextlib.suppress(Exception):  # its errors are of every kind; our own names remain
        converted = convert(labelled, **more)
        converted = converted[0] if isinstance(converted, tuple) else converted
        return {key: tensor for key, tensor in converted.items() if isinstance(tensor, Tensor)}
    return {}


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """What it would log of these keys would be of no use."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
