"""Number formats: what the frozen base is held in, quantized bases, and the rule that what is trained stays fp32."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import SerialLoraError

if TYPE_CHECKING:
    from .options import PipelineOptions

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP8 = "fp8"  # see residence.py; the rest is bitsandbytes's
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
QUANTIZATIONS = (*BITSANDBYTES, FP8)


def quantization_config(name: str | None, compute_dtype: torch.dtype) -> Any | None:
    """The `quantization_config` for a transformer's from_pretrained, or None.

    Args:
        name: A name of `QUANTIZATIONS`, or None; there is one for those of `BITSANDBYTES`.
        compute_dtype: What 4-bit weights are multiplied in.

    Raises:
        SerialLoraError: If bitsandbytes is not installed.
    """
    if name not in BITSANDBYTES:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SerialLoraError(f"--quantize {name} needs the package bitsandbytes: pip install bitsandbytes.")
    from diffusers import BitsAndBytesConfig

    settings = dict(BITSANDBYTES[name])
    if name == "nf4":
        settings["bnb_4bit_compute_dtype"] = compute_dtype
    return BitsAndBytesConfig(**settings)


def load_pipeline(pipeline_class: Any, transformer_class: Any, options: PipelineOptions, dtype: torch.dtype) -> Any:
    """The pipeline to adapt, on the CPU: the transformer (quantized if asked) and encoders in `dtype`, the VAE in fp32.

    Args:
        pipeline_class: Class of the pipeline.
        transformer_class: Class of its transformer.
        options: They name the checkpoint, its revision and variant, and the quantization.
        dtype: Dtype of the weights.
    """
    path = options.pretrained_model_name_or_path
    where = {name: getattr(options, name) for name in ("revision", "variant", "cache_dir")}
    quantization = quantization_config(options.quantize, dtype)
    extra = {} if quantization is None else {"quantization_config": quantization}
    dtypes = {"vae": torch.float32, "default": dtype}  # half precision overflows in some VAEs
    try:
        model = transformer_class.from_pretrained(path, subfolder="transformer", dtype=dtype, **where, **extra)
        if quantization is not None:
            model.to("cpu")  # until its turn: bitsandbytes loads to the GPU
        pipe = pipeline_class.from_pretrained(path, transformer=model, dtype=dtypes, **where)
    except OSError as error:
        raise SerialLoraError(f"--pretrained_model_name_or_path {path} is not a whole pipeline: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and name != "transformer":
            module.requires_grad_(False).eval()
    return pipe


def trainable(models: Iterable[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that train, over several models, in a fixed order."""
    return [
        (f"{index}.{name}", parameter)
        for index, model in enumerate(models)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def check_trainables_fp32(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise SerialLoraError unless every trainable parameter is fp32: fp16 steps are lost to rounding."""
    wrong = [f"{name} ({parameter.dtype})" for name, parameter in named if parameter.dtype != torch.float32]
    if wrong:
        raise SerialLoraError(
            f"trained weights must stay fp32, but {', '.join(wrong[:3])} do not. Load the model in fp32 and choose "
            "--mixed_precision for the forward pass."
        )
