"""Serial LoRA for diffusion and vision transformers: `x~ = (I + s B A) x`, one pair per attention input.

The names are imported when they are used, so that `slora --help` need not wait for torch. Every DiffusionPipeline
and ModularPipeline has the verbs as soon as both packages are imported, whichever comes first.

Source: Zhong et al., Serial Low-rank Adaptation of Vision Transformer, ICME 2025, arXiv 2503.17750.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .verbs import give_verbs as _give_verbs

if TYPE_CHECKING:
    from .adapters.contexts import disable_serial_lora, serial_lora_batch, serial_lora_scale
    from .adapters.fuse import fuse_serial_lora, unfuse_serial_lora
    from .adapters.initialise import InitializeReport, initialize_serial_lora
    from .adapters.lifecycle import (
        add_serial_lora,
        delete_serial_lora,
        move_serial_lora,
        reserve_serial_lora,
        set_serial_lora,
        unload_serial_lora,
    )
    from .adapters.status import SerialLoraStatus, serial_lora_parameters, serial_lora_status
    from .config import SerialLoraConfig
    from .convert import compress_lora, export_lora, merge_serial_lora
    from .core.hooks import SerialLoraAttnProcessor
    from .errors import AdapterFileError, AdapterStateError, ArchitectureError, SerialLoraError
    from .files.load import load_serial_lora
    from .files.save import save_serial_lora, serial_lora_state_dict
    from .heads.classification import SerialLoraForImageClassification
    from .heads.promptable import SerialLoraForPromptableSegmentation
    from .heads.prompts import SerialLoraForPromptClassification
    from .heads.segmentation import SerialLoraForSemanticSegmentation
    from .loader import SerialLoraLoaderMixin
    from .records.registry import Architecture, Pair, register_architecture

_PLACES = {
    "errors": "AdapterFileError AdapterStateError ArchitectureError SerialLoraError",
    "records.registry": "Architecture Pair register_architecture",
    "adapters.initialise": "InitializeReport initialize_serial_lora",
    "core.hooks": "SerialLoraAttnProcessor",
    "config": "SerialLoraConfig",
    "heads.classification": "SerialLoraForImageClassification",
    "heads.prompts": "SerialLoraForPromptClassification",
    "heads.promptable": "SerialLoraForPromptableSegmentation",
    "heads.segmentation": "SerialLoraForSemanticSegmentation",
    "loader": "SerialLoraLoaderMixin",
    "adapters.status": "SerialLoraStatus serial_lora_parameters serial_lora_status",
    "adapters.lifecycle": "add_serial_lora delete_serial_lora move_serial_lora reserve_serial_lora set_serial_lora "
    "unload_serial_lora",
    "convert": "compress_lora export_lora merge_serial_lora",
    "adapters.contexts": "disable_serial_lora serial_lora_batch serial_lora_scale",
    "adapters.fuse": "fuse_serial_lora unfuse_serial_lora",
    "files.load": "load_serial_lora",
    "files.save": "save_serial_lora serial_lora_state_dict",
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names.split()}

__all__ = [
    "AdapterFileError",
    "AdapterStateError",
    "Architecture",
    "ArchitectureError",
    "InitializeReport",
    "Pair",
    "SerialLoraAttnProcessor",
    "SerialLoraConfig",
    "SerialLoraError",
    "SerialLoraForImageClassification",
    "SerialLoraForPromptClassification",
    "SerialLoraForPromptableSegmentation",
    "SerialLoraForSemanticSegmentation",
    "SerialLoraLoaderMixin",
    "SerialLoraStatus",
    "add_serial_lora",
    "compress_lora",
    "delete_serial_lora",
    "disable_serial_lora",
    "export_lora",
    "fuse_serial_lora",
    "initialize_serial_lora",
    "load_serial_lora",
    "merge_serial_lora",
    "move_serial_lora",
    "register_architecture",
    "reserve_serial_lora",
    "save_serial_lora",
    "serial_lora_batch",
    "serial_lora_parameters",
    "serial_lora_scale",
    "serial_lora_state_dict",
    "serial_lora_status",
    "set_serial_lora",
    "unfuse_serial_lora",
    "unload_serial_lora",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("slora_diffusers")
        except PackageNotFoundError:
            return "0+unknown"
    if name not in _PLACE_OF and not name.startswith("_") and find_spec(f".{name}", __name__) is not None:
        return import_module(f".{name}", __name__)  # a folder, such as slora_diffusers.heads
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_PLACE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_give_verbs()
