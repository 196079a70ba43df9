"""Which modules that a file brings whole (`modules_to_save`) fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..config import SerialLoraConfig
from ..core.parts import find_modules, persistent
from ..errors import SerialLoraError
from .format import Component


@dataclass
class Modules:
    """The base's modules that those of a file fit, by their paths, and what does not fit."""

    fitting: dict[str, nn.Module] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)


def plan_modules(model: nn.Module, part: Component, config: SerialLoraConfig | None) -> Modules:
    """Compare a component's modules with a model's.

    Args:
        model: The model.
        part: The component of the file.
        config: The file's settings, which say what has to be there; None where they are not known.
    """
    plan, given = Modules(), part.modules()
    wanted = [path for name in (config and config.modules_to_save) or () for path in _found(model, name)]
    plan.missing = sorted({path for path in wanted if path not in given})
    for path, tensors in given.items():
        module = _found(model, path).get(path)
        if module is None:
            plan.unexpected.append(path)
        elif wrong := _misfit(module, {name: tuple(t.shape) for name, t in tensors.items()}):
            plan.mismatched[path] = f"{path}: {wrong}"
        else:
            plan.fitting[path] = module
    return plan


def _found(model: nn.Module, name: str) -> Mapping[str, nn.Module | None]:
    """{path: module} of those that a name chooses; of one that chooses none itself, with None."""
    try:
        return find_modules(model, [name])
    except SerialLoraError:
        return {name: None}


def _misfit(module: nn.Module, given: Mapping[str, tuple[int, ...]]) -> str:
    own = {key: tuple(getattr(owner, name).shape) for key, owner, name in persistent(module)}
    differ = sorted(set(own.items()) ^ set(given.items()))
    return ", ".join(f"{name} {shape}" for name, shape in differ[:4]) + " differ" if differ else ""
