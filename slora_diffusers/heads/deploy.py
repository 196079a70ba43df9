"""A model with a head as a plain model of transformers: fused, of its own class, in a folder that opens anywhere."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.fuse import fuse_serial_lora
from ..adapters.lifecycle import unload_serial_lora
from ..core.components import has_adapters
from ..errors import ArchitectureError, SerialLoraError
from .framing import CROP, PAD, STRETCH
from .preprocessing import Preprocessing

_ELSE = (
    "Deploy the model itself: it goes through torch.export, torch.onnx.export(dynamo=True), torch.jit.trace and "
    "dynamic quantization, live or after fuse()."
)


def fused_copy(backbone: nn.Module) -> Any:
    """A copy of a backbone with its adapters in its weights; the backbone stays as it is."""
    plain = copy.deepcopy(backbone)
    if has_adapters(plain):
        fuse_serial_lora(plain)
        unload_serial_lora(plain)
    return plain.requires_grad_(False).eval()


def whole_model(backbone: nn.Module, save_directory: str | os.PathLike[str] | None) -> Any:
    """`fused_copy`, for a base that is the model of its task itself; written to the folder, if one is given."""
    model = fused_copy(backbone)
    if save_directory is not None:
        model.save_pretrained(save_directory)
    return model


def image_classifier(
    backbone: nn.Module,
    head: Any,
    label_names: Sequence[str],
    problem_type: str,
    preprocessing: Preprocessing,
    expected: Tensor,
) -> Any:
    """The family's own `...ForImageClassification` with this backbone, fused, and this head.

    Args:
        backbone: A model of transformers.
        head: Its linear classifier.
        label_names: Names of the classes.
        problem_type: Which loss.
        preprocessing: Size of its images.
        expected: Logits (1, classes) of a grey image, which the result has to give.

    Raises:
        SerialLoraError: If transformers has no such class, or one that reads other features.
    """
    import transformers

    plain = fused_copy(backbone)
    config: Any = copy.deepcopy(getattr(plain, "config", None))
    names = dict(enumerate(label_names))
    try:
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
        config.problem_type = problem_type
        model = transformers.AutoModelForImageClassification.from_config(config)
    except (AttributeError, ValueError, TypeError) as error:
        raise ArchitectureError(f"transformers classifies no images with a {type(plain).__name__}. {_ELSE}") from error
    model = model.to(expected.device, next(plain.parameters()).dtype).requires_grad_(False).eval()
    inner = getattr(model, model.base_model_prefix, None)
    classifier: Any = getattr(model, "classifier", None)
    fits = isinstance(classifier, nn.Linear) and classifier.weight.shape == head.weight.shape
    if isinstance(inner, nn.Module) and fits:
        wrong = inner.load_state_dict(plain.state_dict(), strict=False)
        classifier.load_state_dict(head.state_dict())
        missing = [key for key in wrong.missing_keys if "pool" not in key]
        if not missing and _agrees(model, preprocessing, expected):
            return model
    raise ArchitectureError(
        f"{type(model).__name__} does not read what this head reads (its pooling): its logits would differ. {_ELSE}"
    )


def save_for_pipeline(model: Any, preprocessing: Preprocessing, folder: str | os.PathLike[str]) -> None:
    """Write a plain model and how its images are prepared: what `pipeline("image-classification", folder)` opens."""
    processor = image_processor(preprocessing)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_processor(preprocessing: Preprocessing) -> Any:
    """The image processor of transformers that prepares images in the same way, which is checked.

    Raises:
        SerialLoraError: If the installed transformers has none.
    """
    import transformers

    height, width = preprocessing.size
    edges = {"height": height, "width": width}
    sizes: dict[str, dict[str, Any]] = {
        STRETCH: {"size": edges},
        PAD: {"size": {"max_height": height, "max_width": width}, "do_pad": True, "pad_size": edges},
        CROP: {"size": {"shortest_edge": max(height, width)}, "do_center_crop": True, "crop_size": edges},
    }
    if preprocessing.resize_mode in sizes:
        kind = transformers.BitImageProcessor if preprocessing.resize_mode == CROP else transformers.ViTImageProcessor
        processor = kind(
            do_resize=True,
            resample=2,
            do_rescale=True,
            do_normalize=True,
            image_mean=list(preprocessing.mean),
            image_std=list(preprocessing.std),
            **sizes[preprocessing.resize_mode],
        )
        if _prepares(processor, preprocessing):
            return processor
    raise ArchitectureError(
        f"transformers' image processors do not prepare images as resize_mode={preprocessing.resize_mode!r} with the "
        f"size {preprocessing.size} does. Leave out save_directory=, save the model with its own save_pretrained, and "
        "prepare images with model.preprocessing."
    )


def _prepares(processor: Any, preprocessing: Preprocessing) -> bool:
    from PIL import Image

    height, width = preprocessing.size
    down, across = (60 * torch.linspace(0, 6, 2 * side).sin() for side in (height, width))
    grey = (127 + down[:, None] + across).to(torch.uint8)  # tells a shift in either direction
    for sides in ((2 * width, height), (width, 2 * height)):
        image = Image.fromarray(grey.numpy()).convert("RGB").resize(sides)
        try:
            got = processor(image, return_tensors="pt")["pixel_values"][0]
        except (ValueError, TypeError, KeyError):
            return False
        expected = preprocessing(image)
        if got.shape != expected.shape or (got - expected).abs().max() > 0.1:
            return False
    return True


def grey_image(preprocessing: Preprocessing, like: Tensor) -> Tensor:
    """An image (1, 3, H, W) that is not flat: the same one whenever it is asked for."""
    values = torch.linspace(-1, 1, 3 * preprocessing.size[0] * preprocessing.size[1])
    return values.sin().view(1, 3, *preprocessing.size).to(like)


def _agrees(model: Any, preprocessing: Preprocessing, expected: Tensor) -> bool:
    with torch.no_grad():
        try:
            logits = model(pixel_values=grey_image(preprocessing, next(model.parameters()))).logits
        except (ValueError, RuntimeError):
            return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 3e-2
    return bool(
        (logits.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max().clamp_min(1)
    )


def no_class_for(task: str) -> SerialLoraError:
    """The error of a task whose heads transformers has no class for."""
    return ArchitectureError(f"transformers has no class with a head of this library's for {task}. {_ELSE}")
