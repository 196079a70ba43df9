"""Serial LoRA for diffusion and vision transformers: `x~ = (I + s B A) x`, one pair per attention input.

Source: Zhong et al., Serial Low-rank Adaptation of Vision Transformer, ICME 2025, arXiv 2503.17750.
"""

from .adapters.contexts import disable_serial_lora, serial_lora_batch, serial_lora_scale
from .adapters.fuse import fuse_serial_lora, unfuse_serial_lora
from .adapters.initialise import InitializeReport, initialize_serial_lora
from .adapters.lifecycle import (
    add_serial_lora,
    delete_serial_lora,
    reserve_serial_lora,
    set_serial_lora,
    unload_serial_lora,
)
from .adapters.status import SerialLoraStatus, serial_lora_parameters, serial_lora_status
from .config import SerialLoraConfig
from .convert import compress_lora, export_lora, merge_serial_lora
from .core.hooks import SerialLoraAttnProcessor
from .errors import AdapterFileError, AdapterStateError, ArchitectureError, SerialLoraError
from .files.format import library_version as _library_version
from .files.load import load_serial_lora
from .files.save import save_serial_lora, serial_lora_state_dict
from .heads.classification import SerialLoraForImageClassification
from .heads.promptable import SerialLoraForPromptableSegmentation
from .heads.prompts import SerialLoraForPromptClassification
from .heads.segmentation import SerialLoraForSemanticSegmentation
from .loader import SerialLoraLoaderMixin
from .records.registry import Architecture, Pair, register_architecture
from .verbs import give_verbs as _give_verbs

__version__ = _library_version()

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

_give_verbs()
