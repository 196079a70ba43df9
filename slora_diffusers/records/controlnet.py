"""Records of ControlNets that are transformers: they have the blocks of the model that they steer."""

from __future__ import annotations

from . import image
from .base import Architecture

_STEERS = {
    "SD3ControlNetModel": "SD3Transformer2DModel",
    "FluxControlNetModel": "FluxTransformer2DModel",
    "SanaControlNetModel": "SanaTransformer2DModel",
    "HunyuanDiT2DControlNetModel": "HunyuanDiT2DModel",
    "QwenImageControlNetModel": "QwenImageTransformer2DModel",
}
_RECORD_OF = {name: record for record in image.RECORDS for name in record.models}

RECORDS = tuple(
    Architecture(f"ControlNet: {model}", (name,), _RECORD_OF[model].sites, _RECORD_OF[model].note)
    for name, model in _STEERS.items()
)
