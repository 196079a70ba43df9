"""How a file is damaged: anywhere in its bytes, its structure, its tensors or its JSON.

Everything that is drawn comes from a `random.Random`, so that an input is known by its number.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CATASTROPHES = (
    r"([\w.]+)+!",
    r"(a|a|[a-z_]|\w)*\W\W",
    r"(.*)*\1!",
    r"(\w*\w*\w*\w*\w*\w*\w*\w*)*!",
    r"(?=(.+)+!)",
    r"((a{1,99}){1,99}){1,99}",
    ".*" * 30 + "!",
    "(" * 200 + ")" * 200,
    "(?:" * 5000,
    "[",
    "(?P<a>x)(?P<a>y)",
    r"\d+(?<=a*)",
    "x" * 100_000,
)
TEXTS = (
    "",
    " ",
    "transformer",
    "model",
    "head",
    "\x00",
    "a\nb\x1b[31m",
    "ü" * 5000,
    "\U0001f600",
    "..",
    "\ud800",
    "nan",
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 7, 2**31, 2**63, 10**30, 10**400, -(10**400), True, False),
    *(0.5, -0.0, 1e-320, 1e300, float("nan"), float("inf"), float("-inf")),
)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
    *(torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64),
)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def any_value(r: Random) -> Any:
    """A JSON value that somebody did not think of."""
    makers: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: r.choice(NUMBERS),
        lambda: r.choice(NUMBERS),
        lambda: r.choice(TEXTS),
        lambda: r.choice(CATASTROPHES),
        lambda: [r.choice(CATASTROPHES)],
        lambda: {r.choice(CATASTROPHES): r.choice((2, 4, 1.0))},
        lambda: [],
        lambda: {},
        lambda: [r.choice(NUMBERS) for _ in range(3)],
        lambda: {r.choice(TEXTS): r.choice(NUMBERS)},
        lambda: _nested(r.choice((2, 50, 200))),
        lambda: list(range(r.choice((10, 100_000)))),
        lambda: {f"blocks.{i}.attn": 4 for i in range(r.choice((10, 100_000)))},
        lambda: [{}],
        lambda: {"class": None},
    )
    return r.choice(makers)()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node in a tree of dicts and lists."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def damage_tree(r: Random, value: Any, draw: Callable[[Random], Any] = any_value) -> Any:
    """A copy of a tree with one node replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    path = r.choice(places(value))
    if not path:
        return draw(r) if r.random() < 0.3 else damage_tree(r, value, draw) if places(value)[1:] else draw(r)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = r.randrange(6)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[r.choice((*TEXTS, "transformer.x", *CATASTROPHES[:3]))] = parent.pop(path[-1])
    elif how == 2 and isinstance(parent, dict):
        parent[r.choice(("unknown", *TEXTS))] = draw(r)
    else:
        parent[path[-1]] = draw(r)
    return value


def damage_json(r: Random, value: Any) -> str:
    """JSON of a tree, damaged in what it holds or in how it is written."""
    how = r.randrange(10)
    if how < 8:
        return json.dumps(damage_tree(r, value))
    text = json.dumps(value)
    cut = r.randrange(len(text))
    return r.choice(
        (
            text[:cut],
            text[:cut] + r.choice('{}[]",:0') + text[cut:],
            "[" * 100_000,
            '{"a":' * 50_000,
            text[:-1] + ', "format_version": 2}',  # the same key twice
            text.replace("1", "9" * 5000, 1),
            text.replace("1", "1e999", 1),
            "\ufeff" + text,
            text + text,
            "",
        )
    )


def damage_bytes(r: Random, data: bytes) -> bytes:
    """Bytes cut, changed, inserted or repeated."""
    cut = r.randrange(len(data) + 1)
    some = bytes(r.randrange(256) for _ in range(r.choice((1, 2, 8, 64))))
    flipped = bytearray(data)
    for _ in range(r.choice((1, 3, 20))):
        flipped[r.randrange(len(flipped))] ^= 1 << r.randrange(8)
    return r.choice((data[:cut], data[cut:], data[:cut] + some + data[cut:], bytes(flipped), data + data, some, b""))


@dataclass
class Tensors:
    """A safetensors file in memory: tensors under their keys, and texts in its header."""

    tensors: dict[str, Tensor]
    texts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Any) -> Tensors:
        """A file that is whole."""
        with safe_open(path, framework="pt") as file:
            return cls({key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118

    def to_bytes(self, change: Callable[[dict[str, Any]], None] = lambda header: None) -> bytes:
        """The file's bytes, written here, so that `change` can make a header that no library would write."""
        header: dict[str, Any] = {"__metadata__": dict(self.texts)} if self.texts else {}
        body = b""
        for key, tensor in self.tensors.items():
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            span = [len(body), len(body) + len(raw)]
            header[key] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
            body += raw
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body


_CODES = {
    **{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ"},
    **{torch.int8: "I8", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64"},
}


def damage_tensor(r: Random, tensor: Tensor) -> Tensor:
    """Another shape, dtype or content."""
    flat = tensor.flatten()
    wide = tensor.float()
    return r.choice(
        (
            lambda: tensor.mT.contiguous() if tensor.ndim > 1 else tensor[None],
            lambda: flat,
            lambda: tensor[None],
            lambda: tensor[:-1] if tensor.ndim else tensor,
            lambda: tensor[:0] if tensor.ndim else tensor,
            lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
            lambda: flat[:1].reshape(()) if len(flat) else tensor,
            lambda: torch.zeros(0),
            lambda: torch.zeros_like(tensor),
            lambda: torch.full_like(wide, float("nan")),
            lambda: torch.full_like(wide, r.choice((float("inf"), 3e38, -3e38, 1e-45))),
            lambda: wide.masked_fill(torch.rand_like(wide) < 0.1, float("-inf")),
            lambda: wide.to(r.choice(DTYPES)),
            lambda: wide.to(r.choice(DTYPES)),
        )
    )()


def damage_keys(r: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys dropped, renamed, added or exchanged."""
    keys = list(tensors)
    key, other = r.choice(keys), r.choice(keys)
    parts = key.split(".")
    at = r.randrange(len(parts))
    renamed = r.choice(
        (
            ".".join(parts[:at] + parts[at + 1 :]),
            ".".join([*parts[:at], r.choice(("0", "99", "", "serial_lora", "head", "lora_A", "x")), *parts[at:]]),
            ".".join([*parts[:at], r.choice(("0", "99", "", "attn9", "text_encoder", "x", "ü")), *parts[at + 1 :]]),
            key.replace("lora_A", "lora_B"),
            key[: r.randrange(len(key))],
            key + r.choice((".", "x", ".alpha", ".dora_scale", "\n")),
            r.choice(TEXTS[:-2]) + "a",
            "x" * 10_000,
        )
    )
    how = r.randrange(4)
    if how == 0:
        return {k: t for k, t in tensors.items() if k != key}
    if how == 1:
        return {renamed if k == key else k: t for k, t in tensors.items()}
    if how == 2:
        return {**tensors, renamed: tensors[key]}
    return {**tensors, key: tensors[other], other: tensors[key]}


def damage_layout(r: Random) -> Callable[[dict[str, Any]], None]:
    """A change of what a safetensors header says of its tensors."""

    def change(header: dict[str, Any]) -> None:
        key = r.choice([k for k in header if k != "__metadata__"] or list(header))
        entry = header[key]
        how = r.randrange(6)
        if how == 0:
            entry["dtype"] = r.choice(("F16", "F99", "", None, 3, "I32", "F4"))
        elif how == 1:
            entry["shape"] = r.choice(([2**62, 2**62], [0], [-1, 4], [], None, [1.5], [2**31] * 3, [1] * 100))
        elif how == 2:
            entry["data_offsets"] = r.choice(([0, 0], [8, 4], [0, 2**63], [-8, 8], [], None, [0]))
        elif how == 3:
            header[key] = any_value(r)
        elif how == 4:
            header["__metadata__"] = r.choice(({"serial_lora": 3}, {"serial_lora": {}}, [], None, "x", {"a": "b"}))
        else:
            header["x" * r.choice((1, 10_000))] = copy.deepcopy(entry)

    return change


def damage_file(r: Random, whole: Tensors) -> bytes:
    """A safetensors file with something wrong in it: mostly one thing, so that readers get far into it."""
    file = Tensors(dict(whole.tensors), dict(whole.texts))
    layout: Callable[[dict[str, Any]], None] = lambda header: None  # noqa: E731
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        how = r.choices(("text", "tensor", "keys", "layout", "bytes"), (8, 4, 4, 2, 1))[0]
        if how == "text" and file.texts:
            name = r.choice([k for k, v in file.texts.items() if v.startswith(("{", "["))] or list(file.texts))
            file.texts[name] = _damage_text(r, file.texts[name])
        elif how == "tensor" and file.tensors:
            key = r.choice(list(file.tensors))
            file.tensors[key] = damage_tensor(r, file.tensors[key])
        elif how == "keys" and file.tensors:
            file.tensors = damage_keys(r, file.tensors)
        elif how == "layout":
            layout = damage_layout(r)
        else:
            return damage_bytes(r, file.to_bytes(layout) if file.tensors else file.to_bytes())
    return file.to_bytes(layout if file.tensors else lambda header: None)


def _damage_text(r: Random, text: str) -> str:
    try:
        return damage_json(r, json.loads(text)).encode("utf-8", "replace").decode()
    except (ValueError, RecursionError):  # damaged before
        return text[: r.randrange(len(text) + 1)]
