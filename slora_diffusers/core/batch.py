"""Which sample each row of a model's batch belongs to, when every sample has adapters of its own.

Names belong to prompts. A pipeline puts several images of one prompt side by side (0 0 1 1), and classifier-free
guidance puts all of that once over again behind it (0 0 1 1 0 0 1 1), or calls the model twice. A text's beams, or
sequences, lie side by side, too. How many a prompt has only the call in progress knows: it is read there, or given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import AdapterStateError
from .calls import Sample

_PER_PROMPT = re.compile(r"num_\w+_per_prompt")  # images, videos, waveforms


class Layout(NamedTuple):
    """What the call in progress says of its batch: prompts (None: not known), and images, or sequences, of each.

    `repeats`: whether guidance may put all of that once over again behind it.
    """

    prompts: int | None
    images: int
    repeats: bool = True


def samples_of(entries: Iterable[Any]) -> tuple[Sample, ...]:
    """The adapters of each sample, as users write them.

    Args:
        entries: For each sample a name, (name, weight), {name: weight}, several of these, or None for the base.

    Raises:
        AdapterStateError: If it is not such a list, is empty, or a weight is not a finite number.
    """
    if isinstance(entries, str | Mapping) or not isinstance(entries, Iterable):
        raise AdapterStateError(f"serial_lora_batch takes a list with one adapter name per sample; got {entries!r}.")
    samples = tuple(_sample(entry) for entry in entries)
    if not samples:
        raise AdapterStateError("serial_lora_batch takes a list with one adapter name per sample; got an empty one.")
    return samples


def rows_of(samples: int, batch: int, images: int | None, module: nn.Module) -> tuple[int, ...]:
    """The sample of each row of a batch.

    Args:
        samples: Number of samples that adapters were given for.
        batch: Rows of the batch that the model is called with.
        images: Images of each sample; None asks the pipeline in progress.
        module: The model, to tell text encoders, which read prompts, from what draws images.

    Raises:
        AdapterStateError: If the batch does not hold these samples.
    """
    layout = Layout(samples, images) if images is not None else _layout(module)
    each = 1 if layout is None else layout.images
    if layout is not None and layout.prompts is None and batch == samples:
        each = 1  # one for every row, or the encoder's, which come before each text has several
    if layout is not None and layout.prompts not in (None, samples) and samples == (layout.prompts or 0) * each:
        each = 1  # one for every image
    elif layout is not None and layout.prompts not in (None, samples):
        raise AdapterStateError(
            f"serial_lora_batch was given {samples} adapter names, but the pipeline draws {each} image(s) for each of "
            f"{layout.prompts} prompt(s): give one name per prompt, or one per image."
        )
    if batch % (samples * each) or (layout is not None and not layout.repeats and batch != samples * each):
        raise AdapterStateError(
            f"serial_lora_batch was given {samples} adapter names, but {type(module).__name__} was called with a batch "
            f"of {batch}. Give one name per sample (with images_per_prompt=... where a sample has several rows); the "
            "batch may hold them several times over, as classifier-free guidance does."
        )
    return tuple(row % (samples * each) // each for row in range(batch))


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of the batch that a model is called with."""
    for value in (kwargs.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim):
            return len(value)  # some models take a list of images
    return None


def _sample(entry: Any) -> Sample:
    if entry is None:
        return ()
    if isinstance(entry, str):
        return ((entry, None),)
    if isinstance(entry, Mapping):
        return tuple(_weighed(name, weight) for name, weight in entry.items())
    parts = tuple(entry) if isinstance(entry, Iterable) else ()
    if len(parts) == 2 and isinstance(parts[0], str) and not isinstance(parts[1], str | tuple):
        return (_weighed(*parts),)
    several = [_sample(part) for part in parts if isinstance(part, str | tuple)]
    sample = tuple(one for part in several for one in part)
    if not parts or len(several) != len(parts) or len({name for name, _ in sample}) != len(parts):
        raise AdapterStateError(
            "serial_lora_batch takes for each sample a name, (name, weight), {name: weight}, a list of names, each "
            f"once, or None for the base; got {entry!r}."
        )
    return sample


def _weighed(name: Any, weight: Any) -> tuple[str, float]:
    if not isinstance(name, str):
        raise AdapterStateError(f"An adapter is called by its name; got {name!r}.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise AdapterStateError(f"The weight of {name!r} in serial_lora_batch must be a finite number; got {weight!r}.")
    return name, float(weight)


def _layout(module: nn.Module) -> Layout | None:
    """The layout of the call of a pipeline, or of `generate`, that is in progress in this thread, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner, values = frame.f_locals.get("self"), _values(frame)
        if frame.f_code.co_name == "generate" and (expanded := _sequences(values.get("generation_config"))):
            return Layout(None, expanded, repeats=False)
        images = next((n for k, n in values.items() if _PER_PROMPT.fullmatch(str(k)) and type(n) is int), None)
        calls = frame.f_code.co_name == "__call__" and not isinstance(owner, nn.Module)
        if calls and (hasattr(owner, "components") or images is not None):
            prompts = values.get("batch_size")
            each = 1 if images is None or _reads_prompts(module, owner) else images
            return Layout(prompts if type(prompts) is int else None, each)
        frame = frame.f_back
    return None


def _sequences(config: Any) -> int | None:
    """How many rows transformers' `generate` makes of each text, as its config says."""
    given = [getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    return None if config is None else max([1, *(n for n in given if type(n) is int)])


def _values(frame: FrameType) -> Mapping[str, Any]:
    """The local variables of a call; in a modular pipeline those of its state, too."""
    values = dict(frame.f_locals)
    for name, held in (("state", "values"), ("block_state", "__dict__")):
        more = getattr(values.get(name), held, None)
        values.update(more if isinstance(more, dict) else {})
    return values


def _reads_prompts(module: nn.Module, pipeline: Any) -> bool:
    """Whether a model is one of the pipeline's encoders, which run once per prompt."""
    names = [
        name for name, held in vars(pipeline).items() if held is module or getattr(held, "_orig_mod", None) is module
    ]
    return any("encoder" in name for name in names)
