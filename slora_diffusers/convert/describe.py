"""Say what a LoRA's file is: its kind and layout, the families that it fits, and, on a base, what pairs would carry."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from safetensors import safe_open

from ..config import block_index
from ..core.components import components_of, is_pipeline
from ..core.names import split_place
from ..records.registry import ARCHITECTURES
from .compress import slots_with_parts
from .layouts.kinds import change_of, needs_weight, obstacle, settings_of
from .layouts.names import DENOISERS, ORIGINALS
from .layouts.parts import Module, Parts, split_key
from .layouts.read import find_lora, open_lora, read_lora, sort_lora
from .layouts.spellings import is_of_another_component, stripped
from .lowrank import LowRank

_LAYOUTS = {
    r"base_model\.model\.": "PEFT",
    r"lora_(unet|te\d?|prior_unet)_": "kohya's sd-scripts or musubi-tuner",
    r"lora_transformer_": "OneTrainer",
    r"lycoris_": "LyCORIS",
    r"(model\.)?diffusion_model\.|text_encoders\.": "ComfyUI or ai-toolkit",
    r".*\.processor\.(qkv|proj)_lora": "XLabs",
    r"(transformer(_\d)?|unet|text_encoder(_\d)?|prior)\.": "diffusers",
}
_BASE_FIELDS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model")


@dataclass(frozen=True)
class Carried:
    """What `compress_lora` would make of a LoRA on a base.

    Args:
        pairs: {component: {name of the pair: how many}}.
        not_carried: Modules that no pair carries.
        elsewhere: Modules of components that the base does not have.
        unknown: Modules that the base does not have.
    """

    pairs: Mapping[str, Mapping[str, int]]
    not_carried: tuple[str, ...]
    elsewhere: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA's file holds.

    Args:
        source: The file, folder or id.
        kinds: {LoRA, DoRA, LoHa, LoKr or OFT: number of modules}.
        layout: Whose names its keys have.
        families: Models whose modules it seems to name, the best match first.
        base: What the file says of its base.
        ranks: Ranks of its modules, each once.
        alphas: Their alphas, each once; none where the rank is meant.
        parameters: Its parameters.
        dtypes: Dtypes of its tensors.
        bytes: Size of the file.
        not_understood: Keys that are no part of any module.
        carried: What would be carried, if a base was given.
        obstacle: Why it cannot be read as a LoRA, if so.
    """

    source: str
    kinds: Mapping[str, int]
    layout: str
    families: tuple[str, ...]
    base: str | None
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int | None
    not_understood: tuple[str, ...]
    carried: Carried | None = None
    obstacle: str | None = None
    kind: str = field(default="lora", init=False)


def describe_lora(source: Any, base: Any = None, weight_name: str | None = None) -> LoraReport:
    """Describe a LoRA's file; with a base, also what pairs of it would carry.

    Args:
        source: File, folder, Hub id or state dict.
        base: A model or a pipeline.
        weight_name: Name of the file in its folder.

    Raises:
        SerialLoraError: If it cannot be read, or holds no LoRA.
    """
    tensors, settings = open_lora(source, weight_name)
    parts = sort_lora(tensors, source)
    path = None if isinstance(source, Mapping) else find_lora(source, weight_name)
    reason = next(filter(None, map(obstacle, settings.values())), None)
    labels = [module.label for module in parts.modules.values()]
    alphas = {_alpha(module, settings_of(module.name, settings)) for module in parts.modules.values()}
    return LoraReport(
        source="a state dict" if path is None else str(source),
        kinds=dict(Counter(labels)),
        layout=_layout_of(parts),
        families=tuple(_families_of(parts)),
        base=settings.get("", {}).get("base_model_name_or_path") or (None if path is None else _base_in(path)),
        ranks=tuple(sorted({rank for module in parts.modules.values() if (rank := _rank(module))})),
        alphas=tuple(sorted(alpha for alpha in alphas if alpha is not None)),
        parameters=sum(t.numel() for module in parts.modules.values() for t in module.tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        bytes=None if path is None else path.stat().st_size,
        not_understood=tuple(parts.rest),
        carried=None if base is None or reason else _carried(source, base, weight_name),
        obstacle=reason,
    )


def block_norms(pairs: Mapping[str, LowRank]) -> dict[str, dict[str, float]]:
    """{block, or "-": {pair: ||s B A||_F}} of one component's pairs, those of a block taken together."""
    norms: dict[str, dict[str, float]] = {}
    for key, part in pairs.items():
        path, pair = split_place(key)
        block = block_index(path)
        values = norms.setdefault("-" if block is None else str(block), {})
        values[pair] = math.hypot(values.get(pair, 0.0), part.norm())
    return norms


def lora_norms(source: Any) -> dict[str, dict[str, float]]:
    """{block, or "-": {kind: ||dW||_F}} of a LoRA's file, its modules of a block taken together."""
    tensors, settings = open_lora(source)
    norms: dict[str, dict[str, float]] = {}
    for module in sort_lora(tensors, source).modules.values():
        if not needs_weight(module):
            block = block_index(module.name)
            values = norms.setdefault("-" if block is None else str(block), {})
            norm = change_of(module, settings_of(module.name, settings), None).norm()
            values[module.label] = math.hypot(values.get(module.label, 0.0), norm)
    return norms


def is_lora(keys: Iterable[str]) -> bool:
    """Whether some keys are those of a LoRA, of any kind but ours."""
    keys = list(keys)
    return not any(".serial_lora." in key for key in keys) and any("." in split_key(key)[1] for key in keys)


def _carried(source: Any, base: Any, weight_name: str | None) -> Carried:
    models = components_of(base)
    lora = read_lora(source, models, weight_name, base if is_pipeline(base) else None)
    pairs: dict[str, dict[str, int]] = {}
    left = []
    for component, parts in lora.parts.items():
        slots = slots_with_parts(models[component], parts, None)
        if slots:
            pairs[component] = dict(Counter(slot.pair.name for slot in slots))
        carried = {slot.called(p) for slot in slots for p in slot.projections}
        left += [f"{component}.{path}" for path in parts if path not in carried]
    names = [[module.name for module in modules] for modules in (lora.elsewhere, lora.unknown)]
    return Carried(pairs, tuple(left), tuple(names[0]), tuple(names[1]))


def _layout_of(parts: Parts) -> str:
    counts = Counter(
        next((layout for prefix, layout in _LAYOUTS.items() if re.match(prefix, name)), "none, or the original code's")
        for name in parts.modules
    )
    return counts.most_common(1)[0][0]


def _families_of(parts: Parts) -> list[str]:
    """The models whose pairs feed, or whose original code names, the most of a file's modules; close ones too."""
    names = [name for name in parts.modules if not is_of_another_component(name, DENOISERS)]
    spelled = [{s.replace(".", "_") for s in (name, *stripped(name), _plain(name))} for name in names]
    scores = {
        model: sum(any(pattern.fullmatch(s) for s in spellings) for spellings in spelled)
        for model, pattern in _patterns().items()
    }
    best = max(scores.values(), default=0)
    close = [model for model, score in scores.items() if best and score >= 0.8 * best]
    return sorted(close, key=lambda model: -scores[model])


def _plain(name: str) -> str:
    return name.replace(".processor.", ".")


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """{model: what its modules' names match}, dots being underscores: our own paths of its pairs, and the original."""
    patterns = {}
    for name, record in ARCHITECTURES.items():
        here = [
            f"{site}.{projection}" if site else projection
            for site, pairs in record.sites.items()
            for pair in pairs
            for projection in pair.projections
        ]
        original = ORIGINALS.get(name)
        there = [] if original is None else [*original.names, *original.aliases]
        names = {re.escape(n.replace(".", "_").replace("{}", "*")).replace(r"\*", r"\w+?") for n in (*here, *there)}
        patterns[name] = re.compile("|".join(sorted(names)))
    return patterns


def _rank(module: Module) -> int | None:
    part = next((p for p in ("down", "w1_b", "w2_b") if p in module.tensors), None)
    return None if part is None else module.tensors[part].shape[0]


def _alpha(module: Module, settings: Mapping[str, Any]) -> float | None:
    return module.alpha if module.alpha is not None else settings.get("lora_alpha", settings.get("alpha"))


def _base_in(path: Any) -> str | None:
    """What a file's header says of its base, in the fields that trainers use."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    found: Sequence[str] = [header[name] for name in _BASE_FIELDS if header.get(name)]
    if not found and "serial_lora_export" in header:
        components = json.loads(header["serial_lora_export"]).get("components", {})
        bases = [part.get("base", {}) for part in components.values()]
        found = [f"{base.get('class')} {base.get('name') or ''}".strip() for base in bases if base.get("class")]
    return ", ".join(dict.fromkeys(found))[:200] or None


def models_of(report: LoraReport) -> str:
    """The families of a report in words."""
    shown = ", ".join(report.families[:4]) + (", ..." if len(report.families) > 4 else "")
    return shown or "none that is known"
