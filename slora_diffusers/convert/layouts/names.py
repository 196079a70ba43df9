"""Under which names a model's modules go in other people's files.

`places_of` gives every name that a LoRA may use for a Linear of these models, `original_names` those that ComfyUI and
sd-scripts read, in which a name may stand for several of our Linears.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.sites import unwrap
from ...errors import SerialLoraError
from .names_image import IMAGE
from .names_video import VIDEO
from .originals import Names, Original

ORIGINALS: dict[str, Original] = IMAGE | VIDEO
DENOISERS = ("transformer", "unet", "prior", "model")
"""Components that a file may mean without naming them, in this order; `model` is a bare one."""

_CLIP = re.compile(r"(text_model\.)?encoder\.layers\.")


@dataclass(frozen=True)
class Place:
    """Linears of one component that a name stands for, as the rows that each has there.

    Args:
        component: The component.
        paths: {path of a Linear: its rows among those of the name}.
    """

    component: str
    paths: Mapping[str, Tensor]

    @property
    def height(self) -> int:
        """How many rows the name has."""
        return sum(rows.numel() for rows in self.paths.values())


def places_of(models: Mapping[str, nn.Module]) -> dict[str, Place]:
    """{name in a file: where it is here}, under every name that is known, with dots and without.

    A name that could mean two places means none.
    """
    found: dict[str, Place] = {}
    unclear: set[str] = set()
    for component, model in models.items():
        linears = linears_of(model)
        for name, place in _names_in(component, model, linears):
            for spelling in {name, name.replace(".", "_")}:
                if spelling in found and _other(found[spelling], place):
                    unclear.add(spelling)
                found.setdefault(spelling, place)
    return {name: place for name, place in found.items() if name not in unclear}


def original_names(models: Mapping[str, nn.Module]) -> dict[str, Place]:
    """{flat name in kohya's and ComfyUI's files: where it is here}.

    Args:
        models: {component: model}, the denoiser among them.

    Raises:
        SerialLoraError: If the denoiser is of a family that has no names there.
    """
    main = {c: m for c, m in models.items() if original_of(m) is not None}
    if not main:
        raise SerialLoraError(
            f"ComfyUI and kohya's tools have no names for {[type(unwrap(m)).__name__ for m in models.values()]}; they "
            f"do for {', '.join(ORIGINALS)}. Export with format='diffusers' or format='peft'."
        )
    names: dict[str, Place] = {}
    for component, model in main.items():
        original, linears = original_of(model), linears_of(model)
        assert original is not None
        for name, place in stood_for(original.names, component, linears):
            names[f"lora_unet_{name.replace('.', '_')}"] = place
        if original.same:
            named = {path for place in names.values() if place.component == component for path in place.paths}
            for path in linears:
                if path not in named:
                    there = renamed_path(path, original.renamed).replace(".", "_")
                    names[f"lora_unet_{there}"] = _whole(component, path, linears)
        for encoder, prefix in original.encoders.items():
            if encoder in models:
                names |= _encoder_names(encoder, models[encoder], prefix)
    return names


def original_of(model: nn.Module) -> Original | None:
    """The table of a model's original names, if there is one."""
    model = unwrap(model)
    original = next((ORIGINALS[c.__name__] for c in type(model).__mro__ if c.__name__ in ORIGINALS), None)
    config = getattr(model, "config", None)
    if original is None or any(_setting(config, key) != value for key, value in original.requires.items()):
        return None
    return original


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of everything in a model that a LoRA may sit on: modules with a weight matrix."""
    found = {path.replace("_orig_mod.", ""): m for path, m in unwrap(model).named_modules()}
    return {path: m for path, m in found.items() if isinstance(W := getattr(m, "weight", None), Tensor) and W.ndim >= 2}


def out_features(linear: nn.Module) -> int:
    """Width of what a Linear gives; known also where the stored weight is quantized."""
    known = getattr(linear, "out_features", None) or getattr(linear, "nf", None)  # nf: Conv1D of GPT-2
    return known or weight_of(linear).shape[0]


def weight_of(linear: nn.Module) -> Tensor:
    """A module's weight as (out, in, ...); the Conv1D of GPT-2 stores it the other way round."""
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    return weight.t() if type(linear).__name__ == "Conv1D" else weight


def _names_in(component: str, model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    """Every name of a model's modules: its path with and without the component, and the original names."""
    main = component in DENOISERS
    for path in linears:
        place = _whole(component, path, linears)
        plain = path.removeprefix("text_model.")
        # transformers 5 dropped the level `text_model` from some classes; the files have it or not.
        for name in {path, plain, f"text_model.{plain}"} if _CLIP.match(path) else {path}:
            yield f"{component}.{name}", place
            if main:
                yield name, place
    original = original_of(model)
    if original is None or not main:
        return
    for table in (original.names, original.aliases):
        yield from stood_for(table, component, linears)
    for path in linears:
        if (there := renamed_path(path, original.renamed)) != path:
            yield there, _whole(component, path, linears)


def stood_for(names: Names, component: str, linears: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    """The names of a table that this model has the Linears for, its blocks counted."""
    for name, marked in names.items():
        paths = [path.partition("~")[0] for path in marked]
        for index in _indices(paths[0], linears):
            here = [path.format(index) for path in paths]
            if all(path in linears for path in here):
                swaps = [_is_swapped(mark, linears[path]) for mark, path in zip(marked, here, strict=True)]
                heights = [out_features(linears[path]) for path in here]
                yield name.format(index), Place(component, _rows(here, heights, swaps))


def _rows(paths: list[str], heights: list[int], swaps: list[bool]) -> dict[str, Tensor]:
    """{path: its rows} of Linears below each other."""
    found, start = {}, 0
    for path, height, swapped in zip(paths, heights, swaps, strict=True):
        rows = torch.arange(start, start + height)
        found[path] = rows.roll(height // 2) if swapped else rows
        start += height
    return found


def _indices(path: str, linears: Mapping[str, nn.Module]) -> list[str]:
    if "{}" not in path:
        return [""] if path in linears else []
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
    return [match[1] for p in linears if (match := pattern.fullmatch(p))]


def _is_swapped(marked: str, linear: nn.Module) -> bool:
    _, mark, parts = marked.partition("~")
    return bool(mark) and (not parts or out_features(linear) == int(parts) * weight_of(linear).shape[1])


def renamed_path(path: str, renamed: Mapping[str, str]) -> str:
    """A path with another start, where a table has one for it."""
    for here, there in renamed.items():
        if path == here or (here.endswith(".") and path.startswith(here)):
            return there + path[len(here) :]
    return path


def _encoder_names(component: str, model: nn.Module, prefix: str) -> dict[str, Place]:
    linears = linears_of(model)
    names = {}
    for path in linears:
        there = f"text_model.{path}" if path.startswith("encoder.layers.") else path
        names[f"{prefix}_{there.replace('.', '_')}"] = _whole(component, path, linears)
    return names


def _whole(component: str, path: str, linears: Mapping[str, nn.Module]) -> Place:
    return Place(component, {path: torch.arange(out_features(linears[path]))})


def _other(one: Place, two: Place) -> bool:
    same = one.component == two.component and one.paths.keys() == two.paths.keys()
    return not (same and all(torch.equal(rows, two.paths[path]) for path, rows in one.paths.items()))


def _setting(config: object, key: str) -> object:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
