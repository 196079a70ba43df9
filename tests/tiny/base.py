"""What a tiny model is: a configuration, and how to draw the inputs of one forward."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers.models.transformers as transformers_package
import torch
from diffusers import ModelMixin
from torch import Tensor, nn


class Draw:
    """Reproducible inputs: normal noise, integers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ints(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self.generator)


@dataclass
class TinyModel:
    """A model class, a configuration that builds in milliseconds, and the inputs of one forward.

    Args:
        config: Keyword arguments of the class.
        inputs: From a `Draw` to the keyword arguments of one forward.
        class_name: Filled in from the key the model is listed under.
    """

    config: dict[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    class_name: str = field(default="", kw_only=True)

    def build(self, seed: int = 0) -> Any:
        """A model in eval mode whose weights follow from the seed.

        Weights that start at zero (gates, output layers) or as whatever the memory holds are drawn too: zeros would
        hide the adapter's effect, and no trained model has them. Linears keep the size of what they read, for the
        same reason: PyTorch's initial ones divide it by the square root of 3.
        """
        with torch.random.fork_rng(devices=[]), _uninitialised_is_nan():
            torch.manual_seed(seed)
            model = transformer_classes()[self.class_name](**self.config).eval().requires_grad_(False)
            for parameter in model.parameters():
                if not parameter.any() or parameter.isnan().any():
                    parameter.normal_(std=0.1)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(3**0.5)
        return model

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of one forward, the same for the same seed."""
        return self.inputs(Draw(seed))

    @torch.no_grad()
    def run(self, model: nn.Module, seed: int = 0) -> Tensor:
        """Every tensor of one forward's output, flattened into one."""
        output = model(**self.arguments(seed))
        return torch.cat([tensor.flatten() for tensor in flat_tensors(output)])


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """Inside, `torch.empty` is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def flat_tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from flat_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flat_tensors(item)


def grid_ids(height: int, width: int, axes: int) -> Tensor:
    """Position ids of an image's tokens: (height * width, axes), rows and columns on axes 1 and 2."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)


def video(
    r: Draw, channels: int = 4, text: int = 16, frames: int = 2, size: int = 8, batch: int = 1, **more: Any
) -> dict[str, Any]:
    """The usual inputs of a video transformer; `more` adds to them or replaces some."""
    inputs = {
        "hidden_states": r(batch, channels, frames, size, size),
        "encoder_hidden_states": r(batch, 6, text),
        "timestep": r.ints(1000, batch),
    }
    return inputs | more


@cache
def transformer_classes() -> dict[str, type[nn.Module]]:
    """Every model that the installed diffusers defines in `diffusers.models.transformers`, exported or not.

    Those that are parts of a UNet are plain modules, told by their names.
    """
    found = {}
    for info in pkgutil.iter_modules(transformers_package.__path__, transformers_package.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, nn.Module)
            if own and (issubclass(value, ModelMixin) or re.fullmatch(r"\w*Transformer\w*Model", name)):
                found[name] = value
    return found
