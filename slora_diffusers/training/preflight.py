"""What can be found wrong in a second, before anything is downloaded or loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..adapters.lifecycle import add_serial_lora
from ..core.pair import GRADIENT
from ..core.parts import find_modules
from ..errors import SerialLoraError
from .init_from import start_of
from .methods import ADAPTERS
from .optim import optimizer_class
from .options import BaseOptions, LatentOptions, PipelineOptions
from .precision import BITSANDBYTES, quantization_config


def check_options(options: BaseOptions) -> None:
    """Check packages, and what options mean together.

    Raises:
        SerialLoraError: If a package is missing or options contradict each other.
    """
    optimizer_class(options.optimizer)
    ADAPTERS[options.adapter].check()
    if Path(options.output_dir).is_file():
        raise SerialLoraError(f"--output_dir {options.output_dir} is a file.")
    if options.run_name and (Path(options.run_name).is_absolute() or ".." in Path(options.run_name).parts):
        raise SerialLoraError(f"--run_name {options.run_name} leads out of --logging_dir: give a name.")
    for tracker in options.report_to or ():
        check_tracker(tracker)
    if options.optimizer == "prodigy" and options.lora_plus_ratio != 1:
        raise SerialLoraError("--optimizer prodigy finds one rate for all: leave out --lora_plus_ratio.")
    if options.init == GRADIENT and options.adapter not in ("serial", "lora"):
        raise SerialLoraError(
            f"--init gradient starts an adapter's matrices, and --adapter {options.adapter} has none."
        )
    if options.push_to_hub and options.adapter != "serial":
        raise SerialLoraError(f"--push_to_hub uploads Serial LoRA adapters; --adapter is {options.adapter}.")
    if isinstance(options, LatentOptions) and options.cache_latents and not options.center_crop:
        raise SerialLoraError("--cache_latents fixes the cut of every image: leave it out, or --no-center_crop.")
    if isinstance(options, PipelineOptions):
        _check_storage(options)


def _check_storage(options: PipelineOptions) -> None:
    """Raise SerialLoraError unless the base can be kept as --quantize and --offload say."""
    chosen = {"quantize": options.quantize, "offload": options.offload}
    flags = " ".join(f"--{name} {value}" for name, value in chosen.items() if value is not None)
    if flags and getattr(options, "adapter", None) == "full":
        raise SerialLoraError(
            f"--adapter full trains the weights themselves, and {flags} is for frozen ones: train an adapter."
        )
    if options.quantize in BITSANDBYTES:
        quantization_config(options.quantize, torch.float32)
        if options.offload:
            raise SerialLoraError(
                f"--offload moves plain weights, and --quantize {options.quantize} stores its own: use --quantize fp8, "
                "or leave one out."
            )
        if not has_gpu():
            raise SerialLoraError(
                f"--quantize {options.quantize} needs a GPU: diffusers quantizes nowhere else. --quantize fp8 does not."
            )
    elif flags and options.compile:
        raise SerialLoraError(f"{flags} moves weights between the layers, which --compile makes one: leave one out.")


def check_tracker(name: str) -> None:
    """See that a tracker exists and its package is installed; accelerate would go on without it.

    Raises:
        SerialLoraError: If not.
    """
    known, there = [str(kind) for kind in LOGGER_TYPE_TO_CLASS], [str(kind) for kind in get_available_trackers()]
    if name == "all" or name in there:
        return
    if name not in known:
        raise SerialLoraError(f"--report_to must be all or one of {', '.join(known)}; got {name!r}.")
    raise SerialLoraError(f"--report_to {name} needs the package {name}: pip install {name}.")


def has_gpu() -> bool:
    """Whether there is an accelerator that bitsandbytes runs on."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def check_sites(model_class: Any, options: BaseOptions) -> None:
    """Build the transformer from its config, without weights, and see that the adapter finds a place in it.

    Args:
        model_class: Class of the transformer, with diffusers' `load_config` and `from_config`.
        options: The options; they name the checkpoint and the adapter's settings.

    Raises:
        SerialLoraError: If there is no such checkpoint, or no attention matches --inputs, --targets or --layers.
    """
    path = options.pretrained_model_name_or_path
    where = {"subfolder": "transformer", "revision": options.revision, "cache_dir": options.cache_dir}
    try:
        config = model_class.load_config(path, **where)
    except (OSError, ValueError) as error:
        raise SerialLoraError(
            f"--pretrained_model_name_or_path {path} has no transformer of a pipeline: {error}"
        ) from error
    if (given := config.get("_class_name", model_class.__name__)) != model_class.__name__:
        raise SerialLoraError(f"{path} has a {given}; this recipe trains a {model_class.__name__}.")
    if options.adapter == "serial":
        start, _ = start_of(options, "transformer")
        with torch.device("meta"):
            model = model_class.from_config(config)
            find_modules(model, start.modules_to_save or ())  # without weights there is nothing to copy
            add_serial_lora(model, replace(start, modules_to_save=None))
