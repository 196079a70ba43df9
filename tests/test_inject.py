"""Adapters in a model: the paper's equation for every core record, gradients, dtypes, and what a forward computes."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import slora_diffusers as sl
from slora_diffusers.core.calls import CallState
from slora_diffusers.core.hooks import SerialLoraAttnProcessor, attach
from slora_diffusers.core.layer import SerialLoraPair
from tests.adapters import add_random_adapter, output_of, traces
from tests.ops import count_casts, count_ops
from tests.reference import FAMILIES, OPTIONAL, output64, pair_names, places, terms_of, width, wrap
from tests.tiny.models import TINY

SCALE = 6 / 4  # of add_random_adapter's alpha and rank


def base_hash(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "serial_lora" not in name:
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def loss_of(model, tiny, seed=0):
    return model(**tiny.arguments(seed))[0].float().square().mean()


@pytest.mark.parametrize(
    ("dtype", "optional"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_step_zero_equals_the_base_to_the_bit(name, dtype, optional):
    """Every pair gives its input to the bit (test_layer), but as a contiguous tensor.

    Hence no optional pairs in low precision here: SD3's `to_add_out` reads a slice, and torch's CPU product of a slice
    and of its contiguous copy differ in the last bit of bf16.
    """
    tiny = TINY[name]
    model = tiny.build().to(dtype)
    arguments = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tiny.arguments().items()
    }
    base = output_of(model, tiny, **arguments)
    sl.add_serial_lora(model, sl.SerialLoraConfig(inputs=pair_names(model, optional)))
    assert torch.equal(output_of(model, tiny, **arguments), base)


@pytest.mark.parametrize("optional", [False, True], ids=["default", "all-pairs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_live_equals_the_equation_in_float64(name, optional):
    tiny = TINY[name]
    model, reference = tiny.build(), tiny.build()
    base = output64(tiny.build(), tiny.arguments())
    add_random_adapter(model, inputs=pair_names(model, optional))
    terms = terms_of((sl.serial_lora_state_dict(model), SCALE))
    assert set(terms) == set(places(reference, optional))
    wrap(reference, terms)
    wanted = output64(reference, tiny.arguments())
    assert (wanted - base).norm() > 0.05 * base.norm()
    assert (output_of(model, tiny).double() - wanted).norm() < 1e-4 * (wanted - base).norm()
    assert (output64(model, tiny.arguments()) - wanted).norm() < 1e-9 * (wanted - base).norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_live_equals_the_equation_in_training_too(name):
    """Gradients of A and B, and of the input, are those of the equation in float64."""
    tiny = TINY[name]
    model, reference = tiny.build().double(), tiny.build().double()
    add_random_adapter(model)
    model.double()
    for parameter in sl.serial_lora_parameters(model):
        parameter.requires_grad_(True)
    state = {key: tensor.clone().requires_grad_() for key, tensor in sl.serial_lora_state_dict(model).items()}
    arguments = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tiny.arguments().items()
    }
    wrap(reference, terms_of((state, SCALE)))
    model(**arguments)[0].square().sum().backward()
    reference(**arguments)[0].square().sum().backward()
    got = dict(zip(state, (p.grad for p in sl.serial_lora_parameters(model)), strict=True))
    for key, tensor in state.items():
        # What the last block's text attention reads reaches no output: both sides agree on a zero there.
        assert torch.allclose(got[key], tensor.grad, rtol=1e-6, atol=1e-9), key


@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_the_pairs_and_not_one_bit_of_the_base(name):
    tiny = TINY[name]
    model = tiny.build().requires_grad_(True)  # as from_pretrained gives it
    before, base = base_hash(model), output_of(model, tiny)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in sl.serial_lora_parameters(model)}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = loss_of(model, tiny)
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert base_hash(model) == before
    model.eval()
    assert not torch.equal(output_of(model, tiny), base)
    with sl.disable_serial_lora(model):
        assert torch.equal(output_of(model, tiny), base)
    sl.unload_serial_lora(model)
    assert torch.equal(output_of(model, tiny), base) and base_hash(model) == before


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_pairs_stay_fp32_in_training_under_any_mixed_precision(base, autocast):
    tiny = TINY["DiTTransformer2DModel"]
    model = tiny.build().to(base)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2))
    parameters = sl.serial_lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    arguments = tiny.arguments()
    arguments["hidden_states"] = arguments["hidden_states"].to(base)
    for _ in range(3):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**arguments)[0].float().square().mean()
        loss.backward()
        assert {p.grad.dtype for p in parameters} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert {p.dtype for p in parameters} == {torch.float32}
    assert all(p.isfinite().all() for p in parameters) and any(p.any() for p in parameters[1::2])
    assert all(t.dtype == torch.float32 for t in sl.serial_lora_state_dict(model).values())


def attention_inputs(width=64):
    return torch.randn(2, 16, width)


def small_dit() -> Any:
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=4,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_an_attention_computes_two_products_more_and_pefts_lora_sixteen(mode):
    base, serial, peft = small_dit(), small_dit(), small_dit()
    add_random_adapter(serial)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), peft)
    for parameter in sl.serial_lora_parameters(serial):
        parameter.requires_grad_(mode == "training")
    x = attention_inputs()
    with torch.set_grad_enabled(mode == "training"):
        counts = [count_ops(lambda m=m: m.transformer_blocks[0].attn1(x)) for m in (base, serial, peft)]
    assert counts[1] - counts[0] == {"mm": 1, "addmm": 1}
    assert counts[0] - counts[1] == {}
    assert (counts[2] - counts[0]).total() >= 16


def test_a_cross_attention_computes_two_products_for_each_input():
    tiny = TINY["PixArtTransformer2DModel"]
    base, serial = tiny.build(), tiny.build()
    add_random_adapter(serial)
    x, text = torch.randn(2, 16, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain, adapted = (
            count_ops(lambda m=m: m.transformer_blocks[0].attn2(x, encoder_hidden_states=text)) for m in (base, serial)
        )
    assert adapted - plain == {"mm": 2, "addmm": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inference_in_low_precision_casts_once_over_all_steps(dtype):
    tiny = TINY["DiTTransformer2DModel"]
    base, model = tiny.build().to(dtype), tiny.build().to(dtype)
    add_random_adapter(model)
    arguments = {**tiny.arguments(), "hidden_states": tiny.arguments()["hidden_states"].to(dtype)}
    each = count_casts(lambda: base(**arguments))
    first = count_casts(lambda: model(**arguments))
    assert first == each + 2 * len(places(base))  # A and B of every pair
    assert count_casts(lambda: [model(**arguments) for _ in range(5)]) == 5 * each


def test_q_k_and_v_read_one_transformed_tensor():
    model = small_dit()
    add_random_adapter(model)
    seen = []
    attention = model.transformer_blocks[0].attn1
    for projection in (attention.to_q, attention.to_k, attention.to_v):
        projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention(attention_inputs())
    assert len(seen) == 3 and seen[0] is seen[1] is seen[2]


class Heard(nn.Module):
    def forward(self, query, key, value):
        return query, key, value


def test_one_tensor_passed_as_several_inputs_stays_one():
    """As nn.MultiheadAttention asks with `query is key`, and because the product is then computed once."""
    pair, module = SerialLoraPair(8, CallState()), Heard()
    pair.add("a", torch.randn(2, 8), torch.randn(8, 2), 1.0, 0.0, trainable=False)
    pair.activate({"a": 1.0})
    attach(module, {"query": pair, "key": pair, "value": pair})
    x, y = torch.randn(3, 8), torch.randn(4, 8)
    query, key, value = module(x, x, value=x)
    assert query is key is value and torch.equal(query, pair(x))
    assert count_ops(lambda: module(x, x, x)) == {"mm": 1, "addmm": 1}
    query, key, value = module(x, key=y, value=y)
    assert key is value and torch.equal(query, pair(x)) and torch.equal(key, pair(y))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_counts_what_is_there(name):
    model = TINY[name].build()
    found = places(model)
    report = sl.add_serial_lora(model, sl.SerialLoraConfig(rank=3), "style")
    assert report.adapter_name == "style"
    assert report.pairs == len(found)
    assert report.sites == len({key.partition(".serial_lora.")[0] for key in found})
    assert report.parameters == sum(2 * 3 * width(site, row) for site, row in found.values())
    assert report.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    assert "style: " in str(report) and f"{report.parameters:,}" in str(report)


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_are_submodules_that_follow_the_model(name):
    model = TINY[name].build()
    add_random_adapter(model)
    keys = {k for k in model.state_dict() if "serial_lora" in k}
    assert keys == {f"{key}.lora_{part}_default" for key in places(model) for part in "AB"}
    model.train().to(torch.float64)
    pairs = [m for n, m in model.named_modules() if n in places(model)]
    assert len(pairs) == len(places(model)) and all(pair.training for pair in pairs)
    assert {p.dtype for p in sl.serial_lora_parameters(model)} == {torch.float64}


def test_every_site_has_one_hook_and_nothing_else_changes():
    tiny = TINY["SD3Transformer2DModel"]
    model = tiny.build()
    before = traces(model)
    add_random_adapter(model, "a")
    add_random_adapter(model, "b")
    sites = {site for site, _ in places(model).values()}
    for module in model.modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, SerialLoraAttnProcessor)]
        assert len(hooks) == (module in sites)
    after = traces(model)
    kinds = {n: getattr(t, "serial_lora_kind", t) for n, t in after["types"].items() if "serial_lora" not in n}
    assert kinds == before["types"]
    assert all(t.__qualname__ == kinds[n].__qualname__ for n, t in after["types"].items() if n in kinds)


@pytest.mark.parametrize("settings", [{"rank": 3}, {"init": "gaussian"}, {"layers": 0}, {"inputs": "feed_forward"}])
def test_the_seed_decides_the_pairs(settings):
    states = []
    for _ in range(2):
        model = TINY["DiTTransformer2DModel"].build()
        torch.manual_seed(5)
        sl.add_serial_lora(model, sl.SerialLoraConfig(**settings))
        states.append(sl.serial_lora_state_dict(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_second_adapter_does_not_disturb_the_first():
    tiny = TINY["DiTTransformer2DModel"]
    model = tiny.build()
    add_random_adapter(model, "first")
    wanted = output_of(model, tiny)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2, targets=r".*\.0\.attn1"), "second")
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-6)  # B = 0: it adds nothing
    assert sl.serial_lora_status(model).adapters["second"]["sites"] == 1


@pytest.mark.parametrize("bad", ["", "a.b", "a b", "-a", 3, None])
def test_an_adapter_name_that_is_no_name_is_refused(bad):
    model = TINY["DiTTransformer2DModel"].build()
    before = traces(model)
    with pytest.raises(sl.AdapterStateError, match="adapter name"):
        sl.add_serial_lora(model, sl.SerialLoraConfig(), bad)
    assert traces(model) == before


def test_a_call_without_an_input_that_a_pair_reads_is_an_error():
    model = TINY["PixArtTransformer2DModel"].build()
    add_random_adapter(model)
    with pytest.raises(sl.AdapterStateError, match="without 'encoder_hidden_states'"):
        model.transformer_blocks[0].attn2(torch.randn(2, 16, 16))


def test_inputs_reach_their_pairs_by_position_and_by_keyword():
    model = TINY["PixArtTransformer2DModel"].build()
    add_random_adapter(model)
    x, text = torch.randn(2, 16, 16), torch.randn(2, 5, 16)
    site = model.transformer_blocks[0].attn2
    with torch.no_grad():
        wanted = site(hidden_states=x, encoder_hidden_states=text)
        assert torch.equal(site(x, text), wanted)
        assert torch.equal(site(x, encoder_hidden_states=text), wanted)


def test_gradient_checkpointing_gives_the_same_gradients():
    tiny = TINY["DiTTransformer2DModel"]
    model = tiny.build()
    add_random_adapter(model)
    twin = copy.deepcopy(model)
    twin.enable_gradient_checkpointing()
    for m in (model, twin):
        for parameter in sl.serial_lora_parameters(m):
            parameter.requires_grad_(True)
        m.train()
        torch.manual_seed(0)
        loss_of(m, tiny).backward()
    for one, other in zip(sl.serial_lora_parameters(model), sl.serial_lora_parameters(twin), strict=True):
        assert one.grad.any() and torch.allclose(one.grad, other.grad, atol=1e-6)


def test_optional_pairs_are_named_by_every_core_record():
    for name in FAMILIES:
        names = {row.name for _, row in places(TINY[name].build(), optional=True).values()}
        assert {"attention_output", "feed_forward"} <= names & set(OPTIONAL)


def test_a_model_on_the_meta_device_gets_pairs_there():
    with torch.device("meta"):
        model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, norm_num_groups=4)
    report = sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2))
    assert report.parameters == 2 * 2 * 16
    assert {p.device.type for p in sl.serial_lora_parameters(model)} == {"meta"}
    assert isinstance(model, nn.Module)
