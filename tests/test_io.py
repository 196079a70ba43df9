"""Loading is all or nothing, says what is wrong, and gives the very adapter that was saved."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import slora_diffusers as sl
from slora_diffusers.files.storage import AdapterTensors
from tests.adapters import add_random_adapter, output_of, traces
from tests.reference import FAMILIES, output64, terms_of, wrap
from tests.tiny.models import TINY

DIT = "DiTTransformer2DModel"
SITE = "transformer.transformer_blocks.1.attn1.serial_lora.hidden_states"


def trained(name=DIT, seed=1, **config):
    """A model with a random adapter, and the adapter's state dict."""
    model = TINY[name].build()
    add_random_adapter(model, seed=seed, **config)
    return model, sl.serial_lora_state_dict(model)


def changed(state, **entries):
    """A copy of a state dict with entries replaced, or dropped where None."""
    names = {f"{SITE}.lora_{k.replace('_', '.', 1)}" if len(k) < 9 else k: v for k, v in entries.items()}
    tensors = {k: v for k, v in {**state, **names}.items() if v is not None}
    return AdapterTensors(tensors, copy.deepcopy(state.metadata))


def write(path, state):
    tensors = {key: tensor.clone() for key, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt", "serial_lora": json.dumps(state.metadata)})
    return path


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["folder", "file", "state dict"])
def test_a_saved_adapter_gives_the_same_output_in_a_fresh_model(name, way, tmp_path):
    tiny = TINY[name]
    model, state = trained(name, rslora=True, rank_pattern={r".*\.0\..*": 2})
    wanted = output_of(model, tiny)
    file = sl.save_serial_lora(model, tmp_path)
    fresh = tiny.build()
    base = output_of(fresh, tiny)
    report = sl.load_serial_lora(fresh, {"folder": tmp_path, "file": file, "state dict": state}[way])
    assert torch.equal(output_of(fresh, tiny), wanted) and not torch.equal(wanted, base)
    assert report.adapter_name == "default" and report.pairs == len(state) // 2
    assert report.parameters == sum(t.numel() for t in state.values())
    assert not (report.missing or report.unexpected or report.mismatched)
    assert not any(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": r".*\.attn2"},
        {"exclude": [r".*\.attn2", r".*\.2\..*"]},
        {"layers": 1},
        {"inputs": "encoder_hidden_states"},
        {"inputs": ("attention_output", "feed_forward", "encoder_feed_forward")},
        {"rank_pattern": {r".*\.0\.attn\.serial_lora\.hidden_states": 2}, "alpha_pattern": {r".*\.attn2": 1.0}},
        {"init": "gaussian", "dropout": 0.5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_choice_of_sites_survives_the_file(settings, tmp_path):
    tiny = TINY["SD3Transformer2DModel"]
    model, state = trained("SD3Transformer2DModel", **settings)
    fresh = tiny.build()
    report = sl.load_serial_lora(fresh, sl.save_serial_lora(model, tmp_path))
    assert torch.equal(output_of(fresh, tiny), output_of(model, tiny))
    assert set(sl.serial_lora_state_dict(fresh)) == set(state) and report.pairs == len(state) // 2
    assert sl.serial_lora_state_dict(fresh).metadata["components"] == state.metadata["components"]


@pytest.mark.parametrize("weight", [1.0, 0.25, -2.0, 0.0])
def test_the_weight_is_the_one_in_the_equation(weight):
    tiny = TINY[DIT]
    _, state = trained()
    model, reference = tiny.build(), tiny.build()
    sl.load_serial_lora(model, state, weight=weight)
    wrap(reference, terms_of((state, weight * 6 / 4)))
    assert torch.allclose(output_of(model, tiny).double(), output64(reference, tiny.arguments()), atol=1e-5)


def test_an_adapter_that_is_loaded_shares_no_memory_with_its_source():
    source, state = trained()
    model = TINY[DIT].build()
    sl.load_serial_lora(model, state)
    before = output_of(model, TINY[DIT])
    with torch.no_grad():
        for parameter in sl.serial_lora_parameters(source):
            parameter.add_(1)
    assert torch.equal(output_of(model, TINY[DIT]), before)


def test_low_precision_files_load_as_they_are_and_serve_any_model(tmp_path):
    tiny = TINY[DIT]
    model, _ = trained()
    wanted = output_of(model, tiny)
    sl.save_serial_lora(model, tmp_path, dtype=torch.float16)
    fresh = tiny.build()
    sl.load_serial_lora(fresh, tmp_path)
    assert {p.dtype for p in sl.serial_lora_parameters(fresh)} == {torch.float16}
    assert torch.allclose(output_of(fresh, tiny), wanted, atol=1e-2)


def bad_states():
    _, state = trained()
    A, B = state[f"{SITE}.lora_A.weight"], state[f"{SITE}.lora_B.weight"]
    nan, inf = A.clone(), B.clone()
    nan[-1, -1], inf[0, 0] = float("nan"), -float("inf")
    block = SITE.replace("blocks.1", "blocks.7")
    lora = {f"{SITE.partition('.serial')[0]}.to_q.lora_A.weight": A}
    return {
        "A missing": (changed(state, A_weight=None), r"1 missing.*blocks.1.attn1.*2 places|1 missing"),
        "B missing": (changed(state, B_weight=None), "1 missing"),
        "pair missing": (changed(state, A_weight=None, B_weight=None), "1 missing: transformer_blocks.1.attn1"),
        "unexpected site": (changed(state, **{f"{block}.lora_A.weight": A, f"{block}.lora_B.weight": B}),
                            "1 unexpected: transformer_blocks.7.attn1"),
        "unexpected pair": (changed(state, **{f"{SITE}s.lora_A.weight": A, f"{SITE}s.lora_B.weight": B}),
                            "1 unexpected: transformer_blocks.1.attn1.serial_lora.hidden_statess"),
        "unexpected key": (changed(state, **{f"{SITE}.lora_C.weight": A}), r"1 unexpected.*lora_C"),
        "rank": (changed(state, A_weight=A[:3].clone()), r"1 of a wrong shape.*\(3, 16\).*expected \(4, 16\)"),
        "both ranks": (changed(state, A_weight=A[:3].clone(), B_weight=B[:, :3].clone()),
                       r"\(3, 16\).*expected \(4, 16\)"),
        "width": (changed(state, A_weight=torch.ones(4, 8), B_weight=torch.ones(8, 4)), r"\(4, 8\).*expected"),
        "transposed": (changed(state, A_weight=B.clone(), B_weight=A.clone()), "1 of a wrong shape"),
        "scalar": (changed(state, A_weight=torch.tensor(1.0)), "1 of a wrong shape"),
        "NaN": (changed(state, A_weight=nan), "lora_A holds NaN or infinity"),
        "infinity": (changed(state, B_weight=inf), "lora_B holds NaN or infinity"),
        "integers": (changed(state, A_weight=torch.ones(4, 16, dtype=torch.int32)), "is torch.int32"),
        "no key": (AdapterTensors({}, state.metadata), "no key at all"),
        "a LoRA": (AdapterTensors(lora), "compress_lora"),
        "other component": (AdapterTensors({k.replace("transformer.", "unet.", 1): v for k, v in state.items()}
                                           | {"vae.x": A}, state.metadata), "no key of the component 'transformer'"),
        "version": (AdapterTensors(state, {**state.metadata, "format_version": 2}), "format version 2"),
    }  # fmt: skip


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "beside-another"])
@pytest.mark.parametrize("what", list(bad_states()))
def test_a_bad_source_raises_and_leaves_the_model_as_it_was(what, loaded, tmp_path):
    source, message = bad_states()[what]
    tiny = TINY[DIT]
    model = tiny.build()
    if loaded:
        add_random_adapter(model, "other", seed=9)
    before, output = traces(model), output_of(model, tiny)
    state = copy.deepcopy(model.state_dict())
    from_file = write(tmp_path / "a.safetensors", source) if source else source
    for given in (source, from_file):
        with pytest.raises(sl.SerialLoraError, match=message):
            sl.load_serial_lora(model, given)
    assert traces(model) == before
    assert torch.equal(output_of(model, tiny), output)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"strickt": True}, TypeError),
        ({"adapter_name": "other"}, sl.AdapterStateError),
        ({"adapter_name": "a.b"}, sl.AdapterStateError),
        ({"weight": float("nan")}, sl.AdapterStateError),
        ({"weight": "1"}, sl.AdapterStateError),
    ],
)
def test_a_bad_argument_raises_and_leaves_the_model_as_it_was(arguments, error):
    _, state = trained()
    model = TINY[DIT].build()
    add_random_adapter(model, "other")
    before = traces(model)
    with pytest.raises(error, match=next(iter(arguments)).partition("_")[0]):
        sl.load_serial_lora(model, state, **arguments)
    assert traces(model) == before


def test_an_error_says_what_the_adapter_was_made_for_and_what_to_do():
    _, state = trained("SD3Transformer2DModel")
    with pytest.raises(sl.SerialLoraError, match=r"does not fit DiT.*SD3Transformer2DModel.*4 places|strict=False"):
        sl.load_serial_lora(TINY[DIT].build(), state)


def test_strict_false_loads_what_fits_and_reports_the_rest():
    tiny = TINY[DIT]
    _, state = trained()
    A, B = state[f"{SITE}.lora_A.weight"], state[f"{SITE}.lora_B.weight"]
    odd = {f"{SITE}.lora_C.weight": A, f"{SITE.replace('blocks.1', 'blocks.7')}.lora_A.weight": A}
    partial = changed(state, A_weight=A[:2].clone(), B_weight=B[:, :2].clone(), **odd)
    model, reference = tiny.build(), tiny.build()
    report = sl.load_serial_lora(model, partial, strict=False)
    assert report.pairs == 1 and report.sites == 1
    assert [("blocks.7" in key) or ("lora_C" in key) for key in report.unexpected] == [True, True]
    assert len(report.mismatched) == 1 and "blocks.1" in report.mismatched[0]
    assert "1 mismatched" in str(report) and "2 unexpected" in str(report)
    first = {k: v for k, v in state.items() if "blocks.0" in k}
    wrap(reference, terms_of((first, 6 / 4)))
    assert torch.allclose(output_of(model, tiny).double(), output64(reference, tiny.arguments()), atol=1e-5)


def test_strict_false_names_the_missing_pairs():
    _, state = trained()
    report = sl.load_serial_lora(TINY[DIT].build(), changed(state, B_weight=None), strict=False)
    assert report.missing == ("transformer_blocks.1.attn1.serial_lora.hidden_states",) and report.pairs == 1


def test_strict_false_still_refuses_a_source_of_which_nothing_fits():
    _, state = trained()
    model = TINY["FluxTransformer2DModel"].build()
    before = traces(model)
    with pytest.raises(sl.SerialLoraError, match="nothing was loaded"):
        sl.load_serial_lora(model, state, strict=False)
    assert traces(model) == before


def test_strict_false_loads_into_a_smaller_model_whatever_the_patterns_say():
    _, state = trained("SD3Transformer2DModel", targets=[r".*\.0\.attn", r".*\.2\.attn"])
    small = copy.copy(TINY["SD3Transformer2DModel"])
    small.config = {**small.config, "num_layers": 2}
    with pytest.warns(UserWarning, match="weights differ"):  # a base of fewer layers is another base
        report = sl.load_serial_lora(small.build(), state, strict=False)
    assert report.sites == 1 and len(report.unexpected) == 2


def test_another_base_is_warned_of_by_both_names_and_a_cast_of_the_same_is_not():
    _, state = trained()
    other = TINY[DIT].build(seed=5)
    other.register_to_config(_name_or_path="someone/other-dit")
    state.metadata["components"]["transformer"]["base"]["name"] = "someone/first-dit"
    with pytest.warns(UserWarning, match=r"DiTTransformer2DModel someone/first-dit.*someone/other-dit.*differ"):
        sl.load_serial_lora(other, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            sl.load_serial_lora(TINY[DIT].build().to(dtype), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_of_a_low_precision_base_knows_the_full_one(dtype):
    model = TINY[DIT].build().to(dtype)
    add_random_adapter(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.load_serial_lora(TINY[DIT].build(), sl.serial_lora_state_dict(model))


@pytest.mark.parametrize("layer", ["first", "last"])
def test_a_little_training_of_an_adapted_weight_makes_another_base(layer):
    """The fingerprint samples every adapted projection of a small model: one that was trained is seen."""
    _, state = trained()
    model = TINY[DIT].build()
    block = model.transformer_blocks[0 if layer == "first" else -1]
    with torch.no_grad():
        block.attn1.to_v.weight.mul_(1.05)
    with pytest.warns(UserWarning, match="weights differ"):
        sl.load_serial_lora(model, state)


def test_a_bare_state_dict_is_loaded_with_a_warning_about_its_scale():
    tiny = TINY[DIT]
    model, state = trained(alpha=4)  # s = 1
    wanted = output_of(model, tiny)
    fresh = tiny.build()
    with pytest.warns(UserWarning, match=r"carries no config.*alpha = rank"):
        sl.load_serial_lora(fresh, dict(state))
    assert torch.equal(output_of(fresh, tiny), wanted)


def test_a_bare_state_dict_may_hold_pairs_of_different_ranks():
    tiny = TINY["SD3Transformer2DModel"]
    ranks = {r".*\.0\.attn\.serial_lora\.encoder_hidden_states": 2, r".*\.attn2": 3}
    model, state = trained("SD3Transformer2DModel", alpha=None, rank=5, rank_pattern=ranks)
    fresh = tiny.build()
    with pytest.warns(UserWarning, match="carries no config"):
        sl.load_serial_lora(fresh, dict(state))
    assert torch.equal(output_of(fresh, tiny), output_of(model, tiny))


def test_a_config_that_is_passed_takes_the_place_of_the_files():
    tiny = TINY[DIT]
    _, state = trained()
    model, reference = tiny.build(), tiny.build()
    sl.load_serial_lora(model, state, config=sl.SerialLoraConfig(rank=4, alpha=1))
    wrap(reference, terms_of((state, 1 / 4)))
    assert torch.allclose(output_of(model, tiny).double(), output64(reference, tiny.arguments()), atol=1e-5)


def test_a_setting_of_a_newer_version_is_warned_of():
    _, state = trained()
    state.metadata["components"]["transformer"]["config"]["dora"] = True
    with pytest.warns(UserWarning, match="does not know dora"):
        sl.load_serial_lora(TINY[DIT].build(), state)


def test_names_are_the_first_that_are_free():
    _, state = trained()
    model = TINY[DIT].build()
    names = [sl.load_serial_lora(model, state).adapter_name for _ in range(3)]
    assert names == ["default", "default_1", "default_2"]
    sl.delete_serial_lora(model, "default_1")
    assert sl.load_serial_lora(model, state).adapter_name == "default_1"


def test_which_adapter_to_save_is_asked_where_it_is_not_clear(tmp_path):
    model, state = trained()
    add_random_adapter(model, "second", seed=2)
    with pytest.raises(sl.AdapterStateError, match=r"adapter_name is one of \['default', 'second'\]"):
        sl.save_serial_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(sl.AdapterStateError, match=r"Unknown adapter \['third'\]"):
        sl.save_serial_lora(model, tmp_path, "third")
    sl.set_serial_lora(model, "default")
    saved = load_file(sl.save_serial_lora(model, tmp_path))  # the only active one
    assert all(torch.equal(saved[k], state[k]) for k in state)


def test_a_state_dict_of_a_pipelines_component_loads_into_that_model():
    _, state = trained()
    renamed = AdapterTensors({k.replace("transformer.", "transformer_2.", 1): v for k, v in state.items()})
    renamed.metadata = {"components": {"transformer_2": state.metadata["components"]["transformer"]}}
    model = TINY[DIT].build()
    assert sl.load_serial_lora(model, renamed).pairs == 2
