"""LoRAs as other people write them, for any tiny model: every layout, with the change of each Linear known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import diffusers.loaders.lora_pipeline as mixins
import torch
from torch import Tensor, nn

from slora_diffusers.convert.layouts.names import ORIGINALS, Place, linears_of, original_names, out_features, places_of

Named = Iterator[tuple[str, Place]]


@dataclass(frozen=True)
class Layout:
    """How a trainer writes a LoRA.

    Args:
        names: From a model to its modules under the trainer's names.
        down, up: What follows the name.
        alpha: Whether each module has a key for its alpha.
    """

    names: Callable[[nn.Module], Named]
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: bool = True


def here(prefix: str, separator: str = ".") -> Callable[[nn.Module], Named]:
    """The model's own paths behind a prefix."""

    def names(model: nn.Module) -> Named:
        for path, linear in linears_of(model).items():
            if linear.weight.ndim == 2 and isinstance(linear, nn.Linear):
                rows = torch.arange(out_features(linear))
                yield prefix + path.replace(".", separator), Place("transformer", {path: rows})

    return names


def there(prefix: str, separator: str = ".") -> Callable[[nn.Module], Named]:
    """The original names behind a prefix."""

    def names(model: nn.Module) -> Named:
        dotted = {name.replace(".", "_"): name for name in places_of({"transformer": model}) if "." in name}
        for flat, place in original_names({"transformer": model}).items():
            if all(isinstance(linears_of(model)[path], nn.Linear) for path in place.paths):
                name = flat.removeprefix("lora_unet_")
                yield prefix + (name if separator == "_" else dotted.get(name, name)), place

    return names


def xlabs(model: nn.Module) -> Named:
    """XLabs' trainer adapts the attentions of Flux alone."""
    for i in range(len(model.transformer_blocks)):
        site = f"transformer_blocks.{i}.attn"
        for n, qkv, out in ((1, "to_{}", "to_out.0"), (2, "add_{}_proj", "to_add_out")):
            yield f"double_blocks.{i}.processor.qkv_lora{n}", stack(model, *(f"{site}.{qkv.format(x)}" for x in "qkv"))
            yield f"double_blocks.{i}.processor.proj_lora{n}", stack(model, f"{site}.{out}")


def stack(model: nn.Module, *paths: str) -> Place:
    """Linears below each other."""
    linears, start, rows = linears_of(model), 0, {}
    for path in paths:
        rows[path] = torch.arange(start, start := start + out_features(linears[path]))
    return Place("transformer", rows)


AB = {"down": ".lora_A.weight", "up": ".lora_B.weight", "alpha": False}
EVERYWHERE = {
    "diffusers": Layout(here("transformer."), **AB),
    "PEFT": Layout(here("base_model.model."), **AB),
    "PEFT, the adapter named": Layout(
        here("base_model.model."), ".lora_A.default.weight", ".lora_B.default.weight", False
    ),
    "no prefix": Layout(here(""), **AB),
    "ai-toolkit": Layout(here("diffusion_model."), **AB),
    "OneTrainer": Layout(here("lora_transformer_", "_")),
    "LyCORIS": Layout(here("lycoris_", "_")),
    "kohya, diffusers' names": Layout(here("lora_unet_", "_")),
    "diffusers' first": Layout(here("transformer."), ".lora.down.weight", ".lora.up.weight", False),
}
ORIGINAL = {
    "kohya, musubi-tuner": Layout(there("lora_unet_", "_")),
    "ComfyUI": Layout(there("diffusion_model.")),
    "ComfyUI, A and B": Layout(there("diffusion_model."), **AB),
}
XLABS = {"XLabs": Layout(xlabs, ".down.weight", ".up.weight", False)}
LAYOUTS = EVERYWHERE | ORIGINAL | XLABS

FAMILIES = [name for name in ORIGINALS if name != "UNet2DConditionModel"]
"""The families whose original names are known, by class; all others are written under diffusers' names alone."""

MIXINS = {
    "SD3Transformer2DModel": "SD3",
    "FluxTransformer2DModel": "Flux",
    "ChromaTransformer2DModel": "Flux",
    "Flux2Transformer2DModel": "Flux2",
    "AuraFlowTransformer2DModel": "AuraFlow",
    "Lumina2Transformer2DModel": "Lumina2",
    "ZImageTransformer2DModel": "ZImage",
    "Ideogram4Transformer2DModel": "Ideogram4",
    "Krea2Transformer2DModel": "Krea2",
    "QwenImageTransformer2DModel": "QwenImage",
    "QwenImage21Transformer2DModel": "QwenImage",
    "HiDreamImageTransformer2DModel": "HiDreamImage",
    "ErnieImageTransformer2DModel": "ErnieImage",
    "WanTransformer3DModel": "Wan",
    "WanVACETransformer3DModel": "Wan",
    "WanAnimateTransformer3DModel": "Wan",
    "ChronoEditTransformer3DModel": "Wan",
    "SkyReelsV2Transformer3DModel": "SkyReelsV2",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo",
    "MochiTransformer3DModel": "Mochi1",
    "LTXVideoTransformer3DModel": "LTXVideo",
    "LTX2VideoTransformer3DModel": "LTX2",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CosmosTransformer3DModel": "Cosmos",
    "Kandinsky5Transformer3DModel": "Kandinsky",
    "MiniMaxH3Transformer3DModel": "MiniMaxH3",
    "AceStepTransformer1DModel": "AceStep",
}


def mixin_of(class_name: str) -> type | None:
    """The LoRA loader of a family's pipelines in diffusers, if it has one."""
    name = MIXINS.get(class_name)
    return getattr(mixins, f"{name}LoraLoaderMixin") if name else None


def layouts_of(class_name: str) -> dict[str, Layout]:
    """The layouts that a family goes by."""
    known = EVERYWHERE | (ORIGINAL if class_name in ORIGINALS else {})
    return known | (XLABS if class_name == "FluxTransformer2DModel" else {})


def written_of(class_name: str) -> set[str]:
    """The layouts that `export_lora` writes for a family: one file serves kohya's tools and ComfyUI."""
    original = {"kohya, musubi-tuner", "ComfyUI"} if class_name in ORIGINALS else set()
    return original | {"PEFT"} | ({"diffusers"} if class_name in MIXINS else set())


def make_lora(
    model: nn.Module, layout: Layout, rank: int = 2, alpha: float = 3.0, seed: int = 0, only: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the file's tensors, {path: dW}) of a random LoRA on a model's Linears, those whose paths match `only`."""
    generator = torch.Generator().manual_seed(seed)
    linears = linears_of(model)
    tensors, changes = {}, {}
    for name, place in layout.names(model):
        if not any(re.search(only, path) for path in place.paths):
            continue
        width: int = linears[next(iter(place.paths))].in_features  # pyright: ignore[reportAssignmentType]
        A = torch.randn(rank, width, generator=generator) / width**0.5
        B = torch.randn(place.height, rank, generator=generator) * 0.3
        tensors |= {name + layout.down: A, name + layout.up: B}
        if layout.alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        dW = B.double() @ A.double() * (alpha / rank if layout.alpha else 1.0)
        changes |= {path: dW[rows] for path, rows in place.paths.items()}
    return tensors, changes
