"""The LoRA that equals an adapter, fused by hand: what a pair feeds is told by the names of modules, not by records."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slora_diffusers import (
    SerialLoraConfig,
    add_serial_lora,
    disable_serial_lora,
    fuse_serial_lora,
    unfuse_serial_lora,
    unload_serial_lora,
)
from slora_diffusers.core.sites import find_slots

RANK, ALPHA = 3, 2.1
CROSS = ("EncDecAttention", "crossattention", "crossattention.self", "encoder_attn", "cross_attn")
"""Ends of the paths of attentions whose keys and values read something else than their queries."""
QUERIES = ("q", "q_proj", "query", "q_attn")
READS = {
    "hidden_states": (
        *("q_proj", "k_proj", "v_proj", "qkv", "q", "k", "v", "in_proj_weight", "query", "key", "value"),
        *("q_lin", "k_lin", "v_lin", "qkv_proj", "query_key_value", "Wqkv", "c_attn"),
    ),
    "attention_output": ("o_proj", "out_proj", "proj", "o", "dense", "output.dense", "c_proj", "out_lin", "Wo"),
    "feed_forward": (
        *("fc1", "lin1", "proj_in", "gate_proj", "up_proj", "wi", "wi_0", "wi_1", "fc1_g", "fc1_x", "gate_up_proj"),
        *("fc_in", "c_fc", "linear_fc1", "dense_h_to_4h", "Wi", "dense", "weights_in"),
    ),
    "encoder_hidden_states": ("k", "v", "k_proj", "v_proj", "key", "value", "c_attn"),
    "reduced_states": ("k_proj", "v_proj", "key", "value"),
    "query": ("q_proj_weight",),
    "key": ("k_proj_weight",),
    "value": ("v_proj_weight",),
}


def add_random_adapter(model: nn.Module, inputs: tuple[str, ...] | None) -> None:
    """An adapter whose B is not zero, of a size that changes the output visibly."""
    add_serial_lora(model, SerialLoraConfig(rank=RANK, alpha=ALPHA, inputs=inputs))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4


def all_pairs(model: nn.Module) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot.pair.name for slot in find_slots(model)))


def fuse_by_hand(model: nn.Module, adapted: nn.Module) -> int:
    """W <- W + s (W B) A in float64, the LoRA of each projection; returns how many weights that changed."""
    count = 0
    for name, A in adapted.named_parameters():
        if ".lora_A_" not in f".{name}":
            continue
        path, _, rest = f".{name}".partition(".serial_lora.")
        B = adapted.get_parameter(name.replace("lora_A_", "lora_B_"))
        for weight in matrices(model, path[1:], rest.partition(".")[0]):  # (out, d)
            W = weight.double()
            weight.copy_((W + ALPHA / RANK * (W @ B.double()) @ A.double()).float())
            count += 1
    return count


def matrices(model: nn.Module, path: str, pair: str) -> Iterator[Tensor]:
    """The weights (out, d) that a pair of a site feeds, as views that can be written."""
    site = model.get_submodule(path)
    names = READS[pair]
    if pair == "hidden_states" and (path.endswith(CROSS) or type(site).__name__.startswith("Segformer")):
        names = QUERIES
    for name in names:
        try:
            target = operator.attrgetter(name)(site)
        except AttributeError:
            continue
        if isinstance(target, nn.Parameter):
            yield target.data
        elif target is not None:  # GPT-2's Conv1D stores (d, out)
            yield target.weight.data.T if type(target).__name__ == "Conv1D" else target.weight.data


def error(got: Tensor, expected: Tensor, base: Tensor) -> float:
    """Size of the difference, relative to what the adapter changes."""
    return ((got - expected).norm() / (expected - base).norm()).item()


def check_live_fused_and_by_hand(tiny: Any, inputs: Callable[[nn.Module], tuple[str, ...] | None]) -> None:
    """Assert that a tiny model gives the same live, fused and with the LoRA by hand, and is the base again without.

    Args:
        tiny: Builds the model, and runs it.
        inputs: Names of the model's pairs to adapt; None takes those that the record takes.
    """
    model = tiny.build()
    reference, state, base = copy.deepcopy(model), copy.deepcopy(model.state_dict()), tiny.run(model)
    add_random_adapter(model, inputs(model))
    assert fuse_by_hand(reference, model) > 0
    expected = tiny.run(reference)
    assert (expected - base).norm() > 0.01 * base.norm()

    assert error(tiny.run(model), expected, base) < 1e-3
    fuse_serial_lora(model)
    assert error(tiny.run(model), expected, base) < 1e-3
    unfuse_serial_lora(model)
    with disable_serial_lora(model):
        assert torch.equal(tiny.run(model), base)
    unload_serial_lora(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())
