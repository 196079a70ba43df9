"""Weights and layers of others: PEFT's verbs, new checkpoints and replaced layers beside an adapter."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig
from torch import nn

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

SD3 = TINY["SD3Transformer2DModel"]


def with_lora(model, targets=("to_q", "to_out.0")):
    model.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), "lora")
    return model


def run(model):
    return output_of(model, SD3)


def weights(model):
    return {k: t.clone() for k, t in model.state_dict().items() if "serial_lora" not in k}


OTHERS = {
    "PEFT fuses": lambda model: (with_lora(model), model.fuse_lora()),
    "PEFT fuses and unloads": lambda model: (with_lora(model), model.fuse_lora(), model.unload_lora()),
    "a new checkpoint": lambda model: model.load_state_dict(
        {k: t + 1e-3 for k, t in model.state_dict().items() if "serial_lora" not in k}, strict=False
    ),
    "a new checkpoint, assigned": lambda model: model.load_state_dict(
        {k: t + 1e-3 for k, t in model.state_dict().items() if "serial_lora" not in k}, strict=False, assign=True
    ),
    "one element": lambda model: model.transformer_blocks[1].attn.to_k.weight.data[3, 5].add_(0.01),
    "rows change places": lambda model: model.transformer_blocks[0].attn.to_q.weight.data.copy_(
        model.transformer_blocks[0].attn.to_q.weight.data.flip(0)
    ),
    "a new layer": lambda model: setattr(
        model.transformer_blocks[0].attn, "to_q", copy.deepcopy(model.transformer_blocks[0].attn.to_q)
    ),
    "rounded, then changed": lambda model: (
        model.bfloat16(),
        model.transformer_blocks[0].attn.to_v.weight.data.mul_(1.1),
        model.float(),
    ),
}


@pytest.mark.parametrize("other", list(OTHERS))
def test_unfuse_never_writes_over_weights_of_others(other):
    model = SD3.build()
    add_random_adapter(model)
    sl.fuse_serial_lora(model)
    with torch.no_grad():
        OTHERS[other](model)
    before, output = weights(model), run(model)
    with pytest.raises(sl.SerialLoraError, match=r"no longer the one that fuse_serial_lora\(\) wrote"):
        sl.unfuse_serial_lora(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(model).items())
    assert torch.equal(run(model), output)
    sl.unload_serial_lora(model)  # the remedy: what is there stays
    assert torch.equal(run(model), output)


def test_what_comes_and_goes_again_does_not_hinder_an_unfuse():
    model = SD3.build()
    base = weights(model)
    add_random_adapter(model)
    live = run(model)
    sl.fuse_serial_lora(model)
    with_lora(model)
    model.delete_adapters("lora")
    with suppress(AttributeError):
        model.unload_lora()
    sl.unfuse_serial_lora(model)
    assert all(torch.equal(tensor, base[key]) for key, tensor in weights(model).items())
    assert torch.equal(run(model), live)


@pytest.mark.parametrize(
    "trip", [(torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.bfloat16, torch.float32)]
)
def test_a_trip_through_other_dtypes_is_nobody_elses_change(trip):
    model = SD3.build()
    add_random_adapter(model)
    sl.fuse_serial_lora(model)
    base = SD3.build()
    for dtype in trip:
        model.to(dtype)
    base.to(trip[-1])
    sl.unfuse_serial_lora(model)
    for key, tensor in base.state_dict().items():
        if "attn.to_q.weight" in key:
            assert torch.equal(model.state_dict()[key], tensor)


class Doubled(nn.Linear):
    """A layer that takes another's place, as quantizers put theirs."""

    @classmethod
    def of(cls, linear):
        new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        return new


REPLACEMENTS = {
    "the Linear": lambda model: [block.attn.to_out.__setitem__(0, Doubled.of(block.attn.to_out[0]))
                                 for block in model.transformer_blocks],
    "the list around it": lambda model: [setattr(block.attn, "to_out", nn.ModuleList([Doubled.of(block.attn.to_out[0]),
                                                                                      block.attn.to_out[1]]))
                                         for block in model.transformer_blocks],
    "the MLP's first layer": lambda model: [setattr(block.ff.net[0], "proj", Doubled.of(block.ff.net[0].proj))
                                            for block in model.transformer_blocks],
    "PEFT comes and goes": lambda model: (with_lora(model), model.fuse_lora(), model.unfuse_lora(),
                                          model.delete_adapters("lora"), model.unload_lora()),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REPLACEMENTS))
def test_a_pair_before_one_linear_outlives_its_replacement(what):
    model = SD3.build()
    add_random_adapter(model, inputs=("attention_output", "feed_forward", "hidden_states"))
    live, base = run(model), run(SD3.build())
    assert not torch.allclose(live, base, atol=1e-3)
    REPLACEMENTS[what](model)
    assert torch.allclose(run(model), live, atol=1e-5)
    sl.set_serial_lora(model, "default", 0.5)
    half = run(model)
    sl.fuse_serial_lora(model)
    assert torch.allclose(run(model), half, atol=1e-5)
    sl.unfuse_serial_lora(model)
    assert torch.allclose(run(model), half, atol=1e-5)
    sl.unload_serial_lora(model)
    assert torch.allclose(run(model), base, atol=1e-5)


def test_a_lora_of_peft_sits_beside_pairs_before_one_linear():
    """W x~ + b a x~, as with the pairs of the attention's own inputs."""
    model = SD3.build()
    add_random_adapter(model, inputs=("attention_output",))
    torch.manual_seed(1)
    with_lora(model, ["to_out.0"])
    both = run(model)
    order = SD3.build()
    torch.manual_seed(1)
    with_lora(order, ["to_out.0"])
    add_random_adapter(order, inputs=("attention_output",))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), order.named_parameters(), strict=True):
        if "lora_" in name and "serial" not in name:
            theirs.data.copy_(ours)
    assert torch.allclose(run(order), both, atol=1e-5)


def test_a_missing_linear_is_an_error_not_a_dropped_adapter():
    model = SD3.build()
    add_random_adapter(model, inputs=("feed_forward",))
    del model.transformer_blocks[0].ff.net[0].proj
    with pytest.raises(sl.SerialLoraError, match=r"'net.0.proj' any more"):
        run(model)


class Outer(nn.Module):
    """A model around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **arguments):
        return self.inner(**arguments)


@pytest.mark.parametrize("first", ["inner", "outer"])
@pytest.mark.parametrize("verb", ["add", "load", "reserve", "compress"])
def test_a_model_and_one_around_it_do_not_both_take_adapters(first, verb):
    """Each would count the other's pairs as its own, and unload them."""
    tiny = TINY["DiTTransformer2DModel"]
    model, fresh = tiny.build(), tiny.build()
    outer = Outer(model)
    one, other = (model, outer) if first == "inner" else (outer, model)
    add_random_adapter(fresh)
    state = sl.serial_lora_state_dict(fresh)
    add_random_adapter(one, "a")
    before = output_of(model, tiny)
    lora = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 16),
            "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(16, 1)}  # fmt: skip
    verbs = {
        "add": lambda: sl.add_serial_lora(other, sl.SerialLoraConfig(rank=2), "b"),
        "load": lambda: sl.load_serial_lora(other, state, "b"),
        "reserve": lambda: sl.reserve_serial_lora(other, (4, 2)),
        "compress": lambda: sl.compress_lora(other, lora, 1, adapter_name="b"),
    }
    with pytest.raises(sl.SerialLoraError):
        verbs[verb]()
    assert torch.equal(output_of(model, tiny), before) and sl.serial_lora_status(one).active == ["a"]
    assert not sl.serial_lora_status(other).adapters
    sl.unload_serial_lora(other)  # nothing of its own
    assert torch.equal(output_of(model, tiny), before)
    with pytest.raises(
        sl.SerialLoraError, match="has adapters of its own" if first == "inner" else "is part of a model"
    ):
        verbs["add"]()
