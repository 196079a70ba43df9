"""The paper's equation, worked out without the library: where the pairs of four families sit is written by hand here.

`wrap` replaces the forward of what reads an input by one that computes `x~ = x + s B A x` first, in whatever dtype the
model has (float64 in the tests): no hook, no record, no fused weight.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

QKV, KV, ADDED = ("to_q", "to_k", "to_v"), ("to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
Terms = list[tuple[float, Tensor, Tensor]]
"""(w s, A, B) of every adapter."""


@dataclass(frozen=True)
class Row:
    """One pair of a family: its site, its name, the arguments it transforms, and what the site projects them with."""

    site: str
    name: str
    projections: tuple[str, ...]
    reader: str = ""  # submodule of the site whose input is transformed; the site itself by default

    @property
    def optional(self) -> bool:
        return bool(self.reader)


def _block(path: str) -> str:
    return rf"transformer_blocks\.\d+\.{path}"


_SELF_OUT = (Row(_block("attn1"), "attention_output", ("to_out.0",), "to_out.0"),)
_FF = (Row(_block("ff"), "feed_forward", ("net.0.proj",), "net.0.proj"),)
_JOINT = (
    Row(_block("attn"), "hidden_states", QKV),
    Row(_block("attn"), "encoder_hidden_states", ADDED),
    Row(_block("attn"), "attention_output", ("to_out.0",), "to_out.0"),
    Row(_block("attn"), "encoder_attention_output", ("to_add_out",), "to_add_out"),
    *_FF,
    Row(_block("ff_context"), "encoder_feed_forward", ("net.0.proj",), "net.0.proj"),
)
ROWS: dict[str, tuple[Row, ...]] = {
    "DiTTransformer2DModel": (Row(_block("attn1"), "hidden_states", QKV), *_SELF_OUT, *_FF),
    "PixArtTransformer2DModel": (
        Row(_block("attn1"), "hidden_states", QKV),
        Row(_block("attn2"), "hidden_states", ("to_q",)),
        Row(_block("attn2"), "encoder_hidden_states", KV),
        *_SELF_OUT,
        Row(_block("attn2"), "attention_output", ("to_out.0",), "to_out.0"),
        *_FF,
    ),
    "SD3Transformer2DModel": (
        *_JOINT,
        Row(_block("attn2"), "hidden_states", QKV),
        Row(_block("attn2"), "attention_output", ("to_out.0",), "to_out.0"),
    ),
    "FluxTransformer2DModel": (
        *_JOINT,
        Row(r"single_transformer_blocks\.\d+\.attn", "hidden_states", QKV),
        Row(r"single_transformer_blocks\.\d+", "attention_output", ("proj_out",), "proj_out"),
        Row(r"single_transformer_blocks\.\d+", "feed_forward", ("proj_mlp",), "proj_mlp"),
    ),
}
FAMILIES = list(ROWS)
OPTIONAL = tuple(dict.fromkeys(row.name for rows in ROWS.values() for row in rows if row.optional))


def places(model: nn.Module, optional: bool = False) -> dict[str, tuple[nn.Module, Row]]:
    """{`<site>.serial_lora.<pair>`: (the site, its row)} of a model, in the order of its modules."""
    modules = dict(model.named_modules())
    return {
        f"{path}.serial_lora.{row.name}": (module, row)
        for path, module in modules.items()
        for row in ROWS[type(model).__name__]
        if re.fullmatch(row.site, path)
        and (optional or not row.optional)
        and all(isinstance(modules.get(f"{path}.{name}"), nn.Linear) for name in row.projections)
    }


def pair_names(model: nn.Module, optional: bool) -> list[str]:
    """The names of a model's pairs, for `SerialLoraConfig.inputs`."""
    return list(dict.fromkeys(row.name for _, row in places(model, optional).values()))


def width(site: nn.Module, row: Row) -> int:
    """d, what the row's projections read."""
    reader = site.get_submodule(row.projections[0])
    assert isinstance(reader, nn.Linear)
    return reader.in_features


def wrap(model: nn.Module, adapters: Mapping[str, Terms]) -> None:
    """Make every reader of the model compute `x~ = x + sum_i w_i s_i B_i A_i x` in front of its own forward."""
    found = places(model, optional=True)
    assert set(adapters) <= set(found)
    for key, terms in adapters.items():
        site, row = found[key]
        reader = site.get_submodule(row.reader)
        reader.forward = _transformed(reader.forward, row.name if not row.reader else "input", terms)


def fuse_by_hand(model: nn.Module, adapters: Mapping[str, Terms]) -> None:
    """W <- W (I + sum_i w_i s_i B_i A_i), rounded to W's dtype once."""
    found = places(model, optional=True)
    for key, terms in adapters.items():
        site, row = found[key]
        for name in row.projections:
            weight = site.get_parameter(f"{name}.weight")
            W = weight.data.double()
            weight.data = (W @ (torch.eye(W.shape[1]).double() + sum(s * B @ A for s, A, B in terms))).to(weight.dtype)


def terms_of(*states: tuple[Mapping[str, Tensor], float]) -> dict[str, Terms]:
    """{key: terms} in float64 from state dicts as the library writes them, each with its w s."""
    found: dict[str, Terms] = {}
    for state, scale in states:
        for name in (name for name in state if name.endswith(".lora_A.weight")):
            key = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            A, B = state[name].double(), state[name.replace("lora_A", "lora_B")].double()
            found.setdefault(key, []).append((scale, A, B))
    return found


@torch.no_grad()
def output64(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The model's output in float64, flat; the model is converted in place."""
    model.double()
    given = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    return model(**given)[0].flatten()


def _transformed(forward: Any, argument: str, terms: Terms) -> Any:
    signature = inspect.signature(forward)

    @functools.wraps(forward)  # keeps the signature for the next pair at the same site
    def with_equation(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        x = call.arguments[argument]
        x_tilde = x
        for scale, A, B in terms:
            x_tilde = x_tilde + scale * (x @ A.to(x).T @ B.to(x).T)
        call.arguments[argument] = x_tilde
        return forward(*call.args, **call.kwargs)

    return with_equation
