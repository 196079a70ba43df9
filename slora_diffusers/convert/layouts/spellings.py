"""The ways in which trainers spell the name of a module, and whose it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from .names import DENOISERS, Place

# What stands before a module's path, or before its path with underscores for dots: of PEFT, ComfyUI, kohya's
# sd-scripts and musubi-tuner, OneTrainer, LyCORIS, and the first reference scripts.
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "conditional_transformer.",
    "unet.",
    "transformer.",
    "prior.",
    "lora_unet__",
    "lora_unet_",
    "lora_prior_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_",
    "text_encoder.",  # of a text encoder by itself
    "te_",
    "te1_",
)
_ENCODERS = {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "text_encoder"),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2", "text_encoder"),
}
_COMFY_ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.")
_COMPONENT = re.compile(
    r"(?:base_model\.model\.)?(?:lora_(?P<flat>te\d?|text_encoder(?:_\d)?|vae)_|text_encoders\.(?P<comfy>\w+)\.|"
    r"(?P<own>text_encoder(?:_\d)?|transformer_\w+|unet|transformer|prior|vae|connectors|text_conditioner)\.|"
    r"(?P<projection>text_embedding_projection)\.)"
)
_CALLED = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
    "text_embedding_projection": "connectors",
}


def find_place(name: str, places: Mapping[str, Place]) -> Place | None:
    """Where a module of a file belongs, by its name alone."""
    return next((places[spelling] for spelling in _spellings(name) if spelling in places), None)


def is_of_another_component(name: str, components: Iterable[str]) -> bool:
    """Whether a name says that it is of a component which is not among these."""
    match = _COMPONENT.match(name)
    if match is None:
        return False
    called = match["flat"] or match["own"] or match["comfy"] or match["projection"]
    component = _CALLED.get(called, "text_encoder" if match["comfy"] else called)
    main = component in ("transformer", "unet", "prior")
    return not (set(DENOISERS) & set(components) if main else component in components)


def _spellings(name: str) -> Iterator[str]:
    """The name as it is and as it would be without what a tool puts before it, the more specific first."""
    for plain in dict.fromkeys((name, *_old(name))):
        yield plain
        for prefix, components in _ENCODERS.items():
            if plain.startswith(prefix):
                rest = plain.removeprefix(prefix)
                yield from (f"{component}{'.' if '.' in prefix else '_'}{rest}" for component in components)
        if match := _COMFY_ENCODER.match(plain):
            yield f"text_encoder.{plain[match.end() :]}"
        yield from stripped(plain)


def stripped(name: str) -> Iterator[str]:
    """A name without what tools put before it, one after another."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            yield rest
            yield from stripped(rest)


def _old(name: str) -> Iterator[str]:
    """Names of diffusers' first LoRAs, which were attention processors: `attn1.processor.to_q`, `self_attn.to_q`."""
    plain = name.replace(".processor.", ".")
    if plain.endswith(".to_out") and "self_attn" not in plain:
        yield f"{plain}.0"
    if match := re.fullmatch(r"(.*self_attn)\.to_(q|k|v|out)", plain):
        yield f"{match[1]}.{match[2]}_proj"
    yield plain
