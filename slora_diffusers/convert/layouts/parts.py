"""Sort a file's keys by module: what each module's change is made of, and the keys that nobody understands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterFileError

_ADAPTER = r"(?:\.(?!weight|bias)[\w-]+)?"  # PEFT's name of the adapter, in files that were saved by hand
_SUFFIXES = {
    "lora.down": rf"(?:\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down){_ADAPTER}(?:\.weight)?",
    "lora.up": rf"(?:\.lora_B|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up){_ADAPTER}(?:\.weight)?",
    "lora.mid": r"\.lora_mid(?:\.weight)?",
    "dora": rf"(?:\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?|\.dora_scale)",
    "loha.w1_a": rf"\.hada_w1_a{_ADAPTER}",
    "loha.w1_b": rf"\.hada_w1_b{_ADAPTER}",
    "loha.w2_a": rf"\.hada_w2_a{_ADAPTER}",
    "loha.w2_b": rf"\.hada_w2_b{_ADAPTER}",
    "loha.t1": rf"\.hada_t1{_ADAPTER}",
    "loha.t2": rf"\.hada_t2{_ADAPTER}",
    **{f"lokr.{part}": rf"\.lokr_{part}{_ADAPTER}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "oft.blocks": r"\.oft_blocks",
    "oft.rescale": r"\.rescale",
    "oft.R": rf"\.oft_R{_ADAPTER}\.weight",
    "diff.diff": r"\.diff",
    "alpha": r"\.alpha",
    "scalar": r"\.scalar",
}
_PATTERN = re.compile(
    "(?P<module>.+?)(?:" + "|".join(f"(?P<p{i}>{suffix})" for i, suffix in enumerate(_SUFFIXES.values())) + ")",
)
_XLABS = re.compile(r"(?P<module>.+\.processor\.(?:qkv|proj)_lora\d?)\.(?P<part>down|up)\.weight")
_NO_CHANGE = re.compile(r".+\.(?:diff|diff_b|lora_[AB]\.bias|lora_(?:up|down)\.bias|w_norm|b_norm)")
_BESIDE = re.compile(r"(?:.*\.)?(?:bias|diff_b|b_norm)")
"""What may follow a module's name and changes it by itself, so that the module is understood without it."""
_PARTS = tuple(_SUFFIXES)
_NEEDED = {
    "lora": [{"down", "up"}],
    "loha": [{"w1_a", "w1_b", "w2_a", "w2_b"}],
    "lokr": [{first, second} for first in ("w1", "w1_a") for second in ("w2", "w2_a")],
    "oft": [{"blocks"}, {"R"}],
    "diff": [{"diff"}],
}
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "diff": "full difference"}


@dataclass
class Module:
    """What a file holds for one of its modules.

    Args:
        name: The module, as the file calls it.
        kind: A key of `KINDS`.
        tensors: {part: tensor}, such as "down" and "up"; "dora" for DoRA's magnitudes.
        keys: {part: key in the file}, "alpha" among them.
        alpha: Its alpha, if the file says one.
    """

    name: str
    kind: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    alpha: float | None = None

    @property
    def label(self) -> str:
        """Its kind in words."""
        return "DoRA" if "dora" in self.tensors and self.kind == "lora" else KINDS[self.kind]


@dataclass
class Parts:
    """A file's modules, and its keys that are not part of one."""

    modules: dict[str, Module] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def sort_keys(tensors: Mapping[str, Any]) -> Parts:
    """Group the tensors of a file by module. Biases and differences that are all zero change nothing, and are dropped.

    Raises:
        AdapterFileError: If a module's alpha is not one number.
    """
    found: dict[str, dict[str, tuple[str, Any]]] = {}
    parts = Parts()
    for key, tensor in tensors.items():
        name, part = split_key(key)
        if _NO_CHANGE.fullmatch(key) and isinstance(tensor, Tensor) and not tensor.float().any():
            continue
        if not name or part in found.get(name, {}):
            parts.rest.append(key)
        else:
            found.setdefault(name, {})[part] = key, tensor
    for name, held in found.items():
        module = _module(name, held)
        if module is None:
            parts.rest += [key for key, _ in held.values()]
        else:
            parts.modules[name] = module
    for name in {owner for key in parts.rest if (owner := _owner(key, parts.modules)) is not None}:
        parts.rest += parts.modules.pop(name).keys.values()
    return parts


def _owner(key: str, modules: Mapping[str, Module]) -> str | None:
    """The module of which a key that is not understood is a part, without which the module would be another."""
    name = key
    while name := name.rpartition(".")[0]:
        if name in modules:
            return None if _BESIDE.fullmatch(key[len(name) + 1 :]) else name
    return None


def split_key(key: str) -> tuple[str, str]:
    """(module, part) of a key, such as ("blocks.0.attn.to_q", "lora.up"); ("", "") if it is none that is known."""
    if match := _XLABS.fullmatch(key):
        return match["module"], f"lora.{match['part']}"
    if match := _PATTERN.fullmatch(key):
        return match["module"], next(part for i, part in enumerate(_PARTS) if match[f"p{i}"] is not None)
    return "", ""


def _module(name: str, held: Mapping[str, tuple[str, Any]]) -> Module | None:
    """A module whose parts make a whole of one kind, or None."""
    kinds = {part.partition(".")[0] for part in held if "." in part}
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    own = {part.partition(".")[2]: both for part, both in held.items() if "." in part}
    if not any(needed <= set(own) for needed in _NEEDED[kind]) or not _paired(kind, own):
        return None
    alpha = _number(held["alpha"][1], held["alpha"][0]) if "alpha" in held else None
    own |= {part: held[part] for part in ("dora", "scalar") if part in held}
    keys = {part: key for part, (key, _) in own.items()} | {part: held[part][0] for part in ("alpha",) if part in held}
    return Module(name, kind, {part: tensor for part, (_, tensor) in own.items()}, keys, alpha)


def _paired(kind: str, own: Mapping[str, Any]) -> bool:
    """Whether factors that come in two are both there."""
    if kind == "lokr":
        return all((f"{w}_a" in own) == (f"{w}_b" in own) and (f"{w}_a" in own) != (w in own) for w in ("w1", "w2"))
    return kind != "loha" or ("t1" in own) == ("t2" in own)


def _number(value: Any, key: str) -> float:
    """An alpha of any shape as the one number that it holds."""
    numbers = torch.as_tensor(value).double().flatten()
    if not numbers.numel() or not torch.isfinite(numbers).all() or (numbers != numbers[0]).any():
        raise AdapterFileError(f"{key} is to be one finite number, and is {numbers.tolist()[:4]}: the file is damaged.")
    return numbers[0].item()
