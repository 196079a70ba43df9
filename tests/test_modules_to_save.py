"""Modules that train whole beside the pairs: each adapter has its own copy, and the base keeps its own to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import slora_diffusers as sl
from slora_diffusers.core.parts import parts_of
from tests.adapters import output_of, traces
from tests.faults import check_faults, same, state_of
from tests.tiny.models import TINY

DIT = TINY["DiTTransformer2DModel"]
SAVED = ("proj_out_2", "proj_out_1")
CONFIG = sl.SerialLoraConfig(rank=2, modules_to_save=SAVED)


def trained(name="a", seed=1, model=None, config=CONFIG):
    model = DIT.build() if model is None else model
    sl.add_serial_lora(model, config, name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sl.serial_lora_parameters(model, name):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.requires_grad_(False)
    return model


def reference(model, name):
    """A base whose modules are the adapter's own by load_state_dict, with its pairs alone in front."""
    state = sl.serial_lora_state_dict(model, name)
    pairs = {key: tensor for key, tensor in state.items() if ".modules_to_save." not in key}
    other = DIT.build()
    for path in SAVED:
        prefix = f"transformer.{path}.modules_to_save."
        whole = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        assert whole, path
        other.get_submodule(path).load_state_dict(whole)
    sl.load_serial_lora(other, pairs, config=sl.SerialLoraConfig(rank=2))
    return output_of(other, DIT)


@pytest.fixture
def base():
    return output_of(DIT.build(), DIT)


def test_a_new_adapter_is_the_base_and_a_trained_one_its_own_modules(base):
    model = DIT.build()
    report = sl.add_serial_lora(model, CONFIG, "a")
    assert torch.equal(output_of(model, DIT), base)
    whole = sum(p.numel() for path in SAVED for p in model.get_submodule(path).parameters())
    parameters = sl.serial_lora_parameters(model)
    assert sum(p.numel() for p in parameters) == report.parameters and report.parameters > whole
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    model = trained()
    assert torch.allclose(output_of(model, DIT), reference(model, "a"), atol=1e-6)
    assert sl.serial_lora_status(model).adapters["a"]["modules"] == sorted(SAVED)


def test_gradients_reach_the_copies_and_leave_the_base():
    model = trained()
    for parameter in sl.serial_lora_parameters(model):
        parameter.requires_grad_(True)
    model.train()
    model(**DIT.arguments())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sl.serial_lora_parameters(model))
    assert all(model.get_submodule(path).weight.grad is None for path in SAVED)


def test_disabled_inactive_weightless_or_unloaded_it_is_the_base_to_the_bit(base):
    model = trained()
    before = DIT.build()
    with sl.disable_serial_lora(model):
        assert torch.equal(output_of(model, DIT), base)
    sl.set_serial_lora(model, "a", 0.0)
    assert torch.equal(output_of(model, DIT), base)
    sl.set_serial_lora(model, [])
    assert torch.equal(output_of(model, DIT), base)
    sl.set_serial_lora(model, "a")
    sl.delete_serial_lora(model, "a")
    assert torch.equal(output_of(model, DIT), base)
    assert traces(model)["types"] == traces(before)["types"] and traces(model)["keys"] == traces(before)["keys"]
    model = trained()
    sl.unload_serial_lora(model)
    assert torch.equal(output_of(model, DIT), base) and traces(model)["attributes"] == traces(before)["attributes"]


def test_a_weight_scales_the_pairs_and_not_the_modules(base):
    model = trained()
    one = output_of(model, DIT)
    sl.set_serial_lora(model, "a", {r".*attn.*": 0.0})  # the pairs off, the modules on
    only = output_of(model, DIT)
    other = DIT.build()
    for path in SAVED:
        other.get_submodule(path).load_state_dict(parts_of(model)[path].copy_of("a").state_dict())
    assert torch.allclose(only, output_of(other, DIT), atol=1e-6)
    sl.set_serial_lora(model, "a", {"proj_out_.": 0.0})  # the other way round
    assert not torch.allclose(output_of(model, DIT), only) and not torch.allclose(output_of(model, DIT), base)
    sl.set_serial_lora(model, "a")
    assert torch.equal(output_of(model, DIT), one)


def test_the_file_holds_them_and_loads_swaps_and_trains_on(tmp_path, base):
    model = trained()
    expected = output_of(model, DIT)
    sl.save_serial_lora(model, tmp_path / "a")
    other = DIT.build()
    sl.load_serial_lora(other, tmp_path / "a", "a")
    assert torch.equal(output_of(other, DIT), expected)
    state = sl.serial_lora_state_dict(model)
    assert sl.serial_lora_state_dict(other).metadata["components"]["transformer"]["config"]["modules_to_save"]
    assert {k: t.shape for k, t in sl.serial_lora_state_dict(other).items()} == {k: t.shape for k, t in state.items()}
    second = trained(seed=2)
    sl.save_serial_lora(second, tmp_path / "b")
    sl.load_serial_lora(other, tmp_path / "b", "a", hotswap=True)
    assert torch.equal(output_of(other, DIT), output_of(second, DIT))
    plain = DIT.build()
    sl.add_serial_lora(plain, sl.SerialLoraConfig(rank=2), "p")
    sl.save_serial_lora(plain, tmp_path / "p")
    sl.load_serial_lora(other, tmp_path / "p", "a", hotswap=True)
    assert torch.equal(output_of(other, DIT), base) and not parts_of(other)
    again = DIT.build()
    sl.load_serial_lora(again, tmp_path / "a", is_trainable=True)
    assert all(p.requires_grad for p in sl.serial_lora_parameters(again))
    assert sum(p.requires_grad for p in again.parameters()) == len(sl.serial_lora_parameters(again))


def test_two_adapters_with_one_module_take_turns(base):
    model = trained("a")
    one = output_of(model, DIT)
    state = sl.serial_lora_state_dict(trained("b", seed=2))
    before = state_of(model, lambda: output_of(model, DIT))
    with pytest.raises(sl.SerialLoraError, match=r"all bring a module of their own .* activate=False"):
        sl.load_serial_lora(model, state, "b")
    with pytest.raises(sl.SerialLoraError, match="all bring a module"):
        sl.add_serial_lora(model, CONFIG, "b")
    assert same(before, state_of(model, lambda: output_of(model, DIT)))
    sl.load_serial_lora(model, state, "b", activate=False)
    assert torch.equal(output_of(model, DIT), one)
    with pytest.raises(sl.SerialLoraError, match="all bring a module"):
        sl.set_serial_lora(model, ["a", "b"])
    with pytest.raises(sl.SerialLoraError, match="all bring a module"):
        sl.fuse_serial_lora(model, ["a", "b"])
    sl.set_serial_lora(model, "b")
    assert torch.allclose(output_of(model, DIT), output_of(trained("b", seed=2), DIT), atol=1e-6)
    sl.set_serial_lora(model, ["a", "b"], [1.0, 0.0])
    assert torch.allclose(output_of(model, DIT), one, atol=1e-6)


def test_a_batch_of_one_module_is_served_and_one_of_several_refused():
    model = trained("a")
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2), "p")
    expected = output_of(model, DIT)
    rows = len(DIT.arguments()["hidden_states"])
    with sl.serial_lora_batch(model, [["a", "p"]] * rows):
        assert torch.allclose(output_of(model, DIT), expected, atol=1e-5)
    with sl.serial_lora_batch(model, ["p"] * rows):
        base = output_of(DIT.build(), DIT)
        assert torch.allclose(output_of(model, DIT), base, atol=1e-5)
    with pytest.raises(sl.SerialLoraError, match="run it once per adapter"):
        sl.serial_lora_batch(model, ["a", None])


def test_fused_is_live_and_unfused_is_before_to_the_bit():
    model = trained()
    live, before = output_of(model, DIT), state_of(model, lambda: output_of(model, DIT))
    sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(model, DIT), live, atol=1e-5)
    assert type(model.proj_out_2) is nn.Linear
    sl.unfuse_serial_lora(model)
    assert same(before, state_of(model, lambda: output_of(model, DIT)))
    sl.fuse_serial_lora(model)
    sl.unload_serial_lora(model)
    assert torch.allclose(output_of(model, DIT), live, atol=1e-5)


def test_unfuse_refuses_where_somebody_else_changed_the_module():
    model = trained()
    sl.fuse_serial_lora(model)
    with torch.no_grad():
        model.proj_out_2.weight.add_(1)
    with pytest.raises(sl.SerialLoraError, match="no longer the one"):
        sl.unfuse_serial_lora(model)


def test_a_merge_carries_the_modules_of_one_and_refuses_those_of_two(tmp_path):
    model = trained("a")
    expected = output_of(model, DIT)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2), "p")
    sl.merge_serial_lora(model, ["a", "p"], None, "m")
    sl.set_serial_lora(model, "m")
    assert torch.allclose(output_of(model, DIT), expected, atol=1e-5)
    sl.load_serial_lora(model, sl.serial_lora_state_dict(trained("b", 2)), "b", activate=False)
    with pytest.raises(sl.SerialLoraError, match="modules have no sum"):
        sl.merge_serial_lora(model, ["a", "b"], None, "n")


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_an_export_refuses_to_drop_them(format, tmp_path):
    with pytest.raises(sl.SerialLoraError, match="No LoRA can hold the modules"):
        sl.export_lora(trained(), tmp_path / "lora", format=format)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nothing_here", "no module of DiTTransformer2DModel has a path"),
        ("transformer_blocks", "is never called"),
        ("transformer_blocks.0", "pairs work inside it"),
        ("attn1", "pairs work inside it"),
        ("to_q", "pairs work inside it"),
        ("norm_out", "no parameters of floating point"),
        ("", "must name modules"),
    ],
)
def test_what_cannot_be_copied_is_refused_in_one_sentence(names, message):
    model = DIT.build()
    before = traces(model)
    with pytest.raises(sl.SerialLoraError, match=message):
        sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2, modules_to_save=names))
    assert traces(model) == before


def test_no_room_can_be_reserved_for_them():
    model = trained()
    with pytest.raises(sl.SerialLoraError, match="no room can be reserved"):
        sl.reserve_serial_lora(model, (4, 2))
    state = sl.serial_lora_state_dict(model)
    model = DIT.build()
    sl.reserve_serial_lora(model, (4, 2))
    with pytest.raises(sl.SerialLoraError, match="no room can be reserved"):
        sl.load_serial_lora(model, state)


@pytest.mark.parametrize("damage", ["shape", "missing", "unexpected", "nan"])
def test_a_file_whose_modules_do_not_fit_changes_nothing(damage):
    state = sl.serial_lora_state_dict(trained())
    key = "transformer.proj_out_2.modules_to_save.weight"
    if damage == "shape":
        state[key] = state[key][:-1]
    elif damage == "missing":
        del state[key], state["transformer.proj_out_2.modules_to_save.bias"]
    elif damage == "unexpected":
        state["transformer.nowhere.modules_to_save.weight"] = state[key]
    else:
        state[key] = state[key] * float("nan")
    model = DIT.build()
    before = traces(model)
    with pytest.raises(sl.SerialLoraError):
        sl.load_serial_lora(model, state)
    assert traces(model) == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(how, base):
    model = trained()
    expected = output_of(model, DIT)
    other = how(model)
    assert torch.equal(output_of(other, DIT), expected)
    for parameter in sl.serial_lora_parameters(other):
        parameter.data.zero_()
    assert torch.equal(output_of(model, DIT), expected)
    with sl.disable_serial_lora(other):
        assert torch.equal(output_of(other, DIT), base)


def test_a_base_in_bf16_keeps_its_dtype_around_copies_in_fp32():
    model = DIT.build().to(torch.bfloat16)
    trained(model=model)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in DIT.arguments().items()}
    assert model(**given)[0].dtype == torch.bfloat16
    assert {p.dtype for p in sl.serial_lora_parameters(model)} == {torch.float32}


def test_a_module_that_others_replace_goes_on_to_be_relayed():
    model = trained()
    expected = output_of(model, DIT)
    new = nn.Linear(model.proj_out_2.in_features, model.proj_out_2.out_features)
    model.proj_out_2 = new
    assert torch.equal(output_of(model, DIT), expected)


def test_compiled_models_follow_every_change(base):
    torch.compiler.reset()
    model = DIT.build()
    model.compile(backend="eager")
    assert torch.allclose(output_of(model, DIT), base, atol=1e-5)
    state = sl.serial_lora_state_dict(trained())
    sl.load_serial_lora(model, state, "a")
    expected = output_of(trained(), DIT)
    assert torch.allclose(output_of(model, DIT), expected, atol=1e-5)
    sl.set_serial_lora(model, [])
    assert torch.allclose(output_of(model, DIT), base, atol=1e-5)
    sl.set_serial_lora(model, "a")
    sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(model, DIT), expected, atol=1e-5)
    sl.unload_serial_lora(model)


def test_stock_save_pretrained_leaves_them_out(tmp_path, base):
    from diffusers import DiTTransformer2DModel

    model = trained()
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(DiTTransformer2DModel.from_pretrained(tmp_path).eval(), DIT), base)


VERBS = {
    "add": (DIT.build, lambda model: sl.add_serial_lora(model, CONFIG, "a")),
    "load": (DIT.build, lambda model: sl.load_serial_lora(model, STATE, "a")),
    "swap": (trained, lambda model: sl.load_serial_lora(model, STATE, "a", hotswap=True)),
    "set": (trained, lambda model: sl.set_serial_lora(model, "a", 0.0)),
    "fuse": (trained, sl.fuse_serial_lora),
    "delete": (trained, lambda model: sl.delete_serial_lora(model, "a")),
    "unload": (trained, sl.unload_serial_lora),
}
STATE = sl.serial_lora_state_dict(trained(seed=3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", list(VERBS))
def test_a_fault_at_any_line_leaves_the_model_before_or_after(verb):
    make, call = VERBS[verb]
    lines = lambda total: range(1, total + 1, max(1, total // 25))  # noqa: E731
    check_faults(make(), call, lambda model: state_of(model, lambda: output_of(model, DIT)), lines)


def test_counters_in_a_module_go_along_and_the_bases_stay(tmp_path):
    """A BatchNorm's statistics are the copy's: the base's do not move while the adapter trains."""

    def build():
        torch.manual_seed(0)
        model = DIT.build()
        model.norm_out = nn.BatchNorm1d(16)  # over the tokens
        return model.eval()

    model = build()
    base, statistics = output_of(model, DIT), copy.deepcopy(model.norm_out.state_dict())
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2, modules_to_save=["norm_out"]))
    model.train()
    for _ in range(3):
        output_of(model, DIT)
    model.eval()
    assert same(dict(model.norm_out.state_dict()), dict(statistics))
    with sl.disable_serial_lora(model):
        assert torch.equal(output_of(model, DIT), base)
    trained_output = output_of(model, DIT)
    assert not torch.allclose(trained_output, base, atol=1e-3)
    other = build()
    sl.load_serial_lora(other, sl.save_serial_lora(model, tmp_path, dtype=torch.float64))
    assert int(parts_of(other)["norm_out"].copy_of("default").num_batches_tracked) == 3
    assert torch.allclose(output_of(other, DIT), trained_output, atol=1e-5)
    sl.fuse_serial_lora(other)
    assert torch.allclose(output_of(other, DIT), trained_output, atol=1e-5) and other.norm_out.num_batches_tracked == 3
    sl.unfuse_serial_lora(other)
    assert other.norm_out.num_batches_tracked == 0
