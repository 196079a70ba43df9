"""Fused weights: exact, the base's own forward, all or nothing, and the very base back to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import slora_diffusers as sl
from slora_diffusers.core.hooks import SerialLoraAttnProcessor
from tests.adapters import add_random_adapter, output_of, traces
from tests.ops import count_ops
from tests.reference import FAMILIES, fuse_by_hand, output64, pair_names, places, terms_of, wrap
from tests.tiny.models import TINY

SCALE = 6 / 4  # of add_random_adapter's alpha and rank
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def base_state(model):
    return {k: t.clone() for k, t in model.state_dict().items() if "serial_lora" not in k}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a.view(torch.uint8), other[k].view(torch.uint8)) for k, a in one.items() if a.ndim
    )


def pair_hooks(model):
    return [h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, SerialLoraAttnProcessor)]


def adapted(name="DiTTransformer2DModel", dtype=torch.float32, adapters=("default",), **config):
    model = TINY[name].build().to(dtype)
    for i, adapter in enumerate(adapters):
        add_random_adapter(model, adapter, seed=i + 1, **config)
    return model


@pytest.mark.parametrize("optional", [False, True], ids=["default", "all-pairs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_live_equals_fused_equals_the_equation(name, optional):
    tiny = TINY[name]
    model, reference = tiny.build(), tiny.build()
    base = output64(tiny.build(), tiny.arguments())
    add_random_adapter(model, inputs=pair_names(model, optional))
    terms = terms_of((sl.serial_lora_state_dict(model), SCALE))
    wrap(reference, terms)
    wanted = output64(reference, tiny.arguments())
    live = output_of(model, tiny)
    sl.fuse_serial_lora(model)
    fused = output_of(model, tiny)
    size = (wanted - base).norm()
    assert size > 0.05 * base.norm()
    assert (live.double() - wanted).norm() < 1e-4 * size
    assert (fused.double() - wanted).norm() < 1e-4 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_weights_are_those_of_the_equation_rounded_once(name, dtype):
    model, reference = adapted(name, dtype), TINY[name].build().to(dtype)
    fuse_by_hand(reference, terms_of((sl.serial_lora_state_dict(model), SCALE)))
    sl.fuse_serial_lora(model)
    one_unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for key, wanted in reference.state_dict().items():
        got = model.state_dict()[key]
        assert got.dtype == wanted.dtype
        assert torch.allclose(got.double(), wanted.double(), rtol=one_unit, atol=one_unit), key


def test_biases_norms_and_everything_a_pair_does_not_feed_stay():
    model = adapted("SD3Transformer2DModel")
    before = base_state(model)
    fed = {f"{k.partition('.serial_lora.')[0]}.{p}.weight" for k, (_, row) in places(model).items()
           for p in row.projections}  # fmt: skip
    sl.fuse_serial_lora(model)
    changed = {k for k, t in base_state(model).items() if not torch.equal(t, before[k])}
    assert changed == fed


@pytest.mark.parametrize("scale", [0.5, -1.0, 2.0])
def test_a_fuse_scale_and_weights_multiply(scale):
    tiny = TINY["PixArtTransformer2DModel"]
    model, reference = adapted(tiny.class_name, adapters=("a", "b")), tiny.build()
    sl.set_serial_lora(model, ["a", "b"], [0.5, {r".*\.attn2": -2.0}])
    states = [sl.serial_lora_state_dict(model, name) for name in ("a", "b")]
    on_attn2 = {k: v for k, v in states[1].items() if ".attn2." in k}
    on_attn1 = {k: v for k, v in states[1].items() if ".attn1." in k}
    wrap(reference, terms_of(
        (states[0], scale * 0.5 * SCALE), (on_attn1, scale * SCALE), (on_attn2, scale * -2.0 * SCALE)
    ))  # fmt: skip
    sl.fuse_serial_lora(model, scale=scale)
    assert torch.allclose(output_of(model, tiny).double(), output64(reference, tiny.arguments()), atol=1e-4)
    assert sl.serial_lora_status(model).fused == ["a", "b"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_unfuse_restores_the_base_to_the_bit_after_ten_cycles(name, dtype):
    model = adapted(name, dtype, ("a", "b", "c"))
    before = base_state(model)
    tensors = {k: t.data_ptr() for k, t in model.named_parameters()}
    for cycle in range(10):
        chosen = [("a",), ("b", "c"), ("a", "b", "c")][cycle % 3]
        sl.set_serial_lora(model, chosen, [0.3 * cycle - 1.1 + i for i in range(len(chosen))])
        sl.fuse_serial_lora(model, scale=0.1 + cycle)
        assert not same_bits(base_state(model), before)
        sl.unfuse_serial_lora(model)
        assert same_bits(base_state(model), before)
    assert {k: t.data_ptr() for k, t in model.named_parameters()} == tensors  # the very tensors, not copies


@pytest.mark.parametrize("name", FAMILIES)
def test_live_is_as_it_was_after_a_cycle(name):
    tiny = TINY[name]
    model = adapted(name)
    before, live = traces(model), output_of(model, tiny)
    sl.fuse_serial_lora(model)
    sl.unfuse_serial_lora(model)
    assert torch.equal(output_of(model, tiny), live)
    assert traces(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_no_wrapper_is_left_in_the_path_when_fused(name):
    tiny = TINY[name]
    model, base = adapted(name), tiny.build()
    assert len(pair_hooks(model)) == len({id(site) for site, _ in places(model).values()})
    sl.fuse_serial_lora(model)
    assert not pair_hooks(model)
    for path in dict(base.named_modules()):
        if path:  # the model's own call keeps one hook, which refuses a scale that fused weights cannot have
            assert not model.get_submodule(path)._forward_pre_hooks and not model.get_submodule(path)._forward_hooks
    with torch.no_grad():
        assert count_ops(lambda: model(**tiny.arguments())) == count_ops(lambda: base(**tiny.arguments()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fuse_that_fails_at_the_last_layer_changes_nothing(name, bad):
    tiny = TINY[name]
    model = adapted(name)
    last = sl.serial_lora_parameters(model)[-1]
    with torch.no_grad():
        last[-1, -1] = bad
    before, state = traces(model), copy.deepcopy(model.state_dict())
    with pytest.raises(sl.AdapterStateError, match=r"not finite.*default.*Nothing was changed"):
        sl.fuse_serial_lora(model)
    assert traces(model) == before
    assert same_bits(model.state_dict(), state)
    assert sl.serial_lora_status(model).fused == []
    with torch.no_grad():
        last.zero_()
    sl.fuse_serial_lora(model)
    assert output_of(model, tiny).isfinite().all()


def test_a_weight_that_overflows_its_dtype_is_refused():
    model = adapted(dtype=torch.float16)
    before = base_state(model)
    with pytest.raises(sl.AdapterStateError, match=r"overflows torch.float16"):
        sl.fuse_serial_lora(model, scale=1e6)
    assert same_bits(base_state(model), before)


def test_what_fused_weights_forbid_says_so_and_changes_nothing():
    tiny = TINY["DiTTransformer2DModel"]
    model = adapted(adapters=("a", "b"))
    state = sl.serial_lora_state_dict(model, "a")
    sl.fuse_serial_lora(model)
    fused, before = output_of(model, tiny), traces(model)
    for call in (
        lambda: sl.fuse_serial_lora(model),
        lambda: sl.add_serial_lora(model, sl.SerialLoraConfig(), "c"),
        lambda: sl.load_serial_lora(model, state, "c"),
        lambda: sl.set_serial_lora(model, "a"),
        lambda: sl.delete_serial_lora(model, "a"),
        lambda: sl.serial_lora_scale(model, 0.5).__enter__(),
        lambda: sl.disable_serial_lora(model).__enter__(),
        lambda: sl.serial_lora_batch(model, ["a", "b"]).__enter__(),
    ):
        with pytest.raises(sl.AdapterStateError, match=r"[Ff]use"):
            call()
    assert torch.equal(output_of(model, tiny), fused)
    assert traces(model) == before


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_a_fuse_scale_that_is_no_number_is_refused(scale):
    model = adapted()
    before = base_state(model)
    with pytest.raises(sl.AdapterStateError, match="finite number"):
        sl.fuse_serial_lora(model, scale=scale)
    assert same_bits(base_state(model), before)


def test_a_fuse_without_an_active_adapter_is_an_error_not_a_state():
    model = adapted(adapters=("a", "b"))
    sl.set_serial_lora(model, [])
    with pytest.raises(sl.AdapterStateError, match=r"no adapter is active.*\['a', 'b'\]"):
        sl.fuse_serial_lora(model)
    with pytest.raises(sl.AdapterStateError, match="Nothing is fused"):
        sl.unfuse_serial_lora(model)
    sl.set_serial_lora(model, ["a"])  # not blocked


def test_an_inactive_adapter_can_be_fused_by_name():
    tiny = TINY["DiTTransformer2DModel"]
    model, reference = adapted(adapters=("a", "b")), tiny.build()
    sl.set_serial_lora(model, [])
    wrap(reference, terms_of((sl.serial_lora_state_dict(model, "b"), SCALE)))
    sl.fuse_serial_lora(model, "b")
    assert torch.allclose(output_of(model, tiny).double(), output64(reference, tiny.arguments()), atol=1e-4)
    assert sl.serial_lora_status(model).active == ["b"]
    sl.unfuse_serial_lora(model)
    assert sl.serial_lora_status(model).active == []
    assert torch.equal(output_of(model, tiny), output_of(tiny.build(), tiny))


def test_moving_a_fused_model_and_unfusing_gives_the_base_there():
    tiny = TINY["DiTTransformer2DModel"]
    model = adapted()
    sl.fuse_serial_lora(model)
    model.to(torch.bfloat16)
    sl.unfuse_serial_lora(model)
    sl.unload_serial_lora(model)
    assert same_bits(base_state(model), base_state(tiny.build().to(torch.bfloat16)))


def test_a_weight_that_is_not_an_ordinary_matrix_is_refused_by_name():
    model = adapted()
    projection = model.transformer_blocks[1].attn1.to_v
    projection.weight = torch.nn.Parameter(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
    before = base_state(model)
    message = r"transformer_blocks.1.attn1.to_v is stored as .*uint8.*unquantized"
    with pytest.raises(sl.AdapterStateError, match=message):
        sl.fuse_serial_lora(model)
    assert same_bits(base_state(model), before) and pair_hooks(model)


@pytest.mark.parametrize("merged", [False, True])
def test_a_lora_of_peft_on_the_same_weights_is_not_fused_wrongly(merged):
    """Live, it reads x~; beside fused weights it would read x. Merged into the base, it is part of the base."""
    tiny = TINY["SD3Transformer2DModel"]
    model = tiny.build()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), model)
    if merged:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
    add_random_adapter(model)
    live = output_of(model, tiny)
    if merged:
        sl.fuse_serial_lora(model)
    else:
        with pytest.raises(sl.AdapterStateError, match=r"transformer_blocks.0.attn.to_q carries a LoRA of PEFT"):
            sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(model, tiny), live, atol=1e-4)


def test_an_adapter_that_is_saved_while_fused_names_the_base_not_the_fused_weights(tmp_path):
    model = adapted()
    live = sl.serial_lora_state_dict(model).metadata
    sl.fuse_serial_lora(model)
    assert sl.serial_lora_state_dict(model).metadata == live
    sl.save_serial_lora(model, tmp_path)
    fresh = TINY["DiTTransformer2DModel"].build()
    sl.load_serial_lora(fresh, tmp_path)
    sl.fuse_serial_lora(fresh)
    assert same_bits(base_state(fresh), base_state(model))
