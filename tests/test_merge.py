"""Merged adapters are the weighted sum of what went in, exactly or to a rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import slora_diffusers as sl
from slora_diffusers.convert.merge import merge_files, scaled_pairs
from slora_diffusers.files.format import AdapterFile
from slora_diffusers.files.save import adapter_file
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline

SD3 = TINY["SD3Transformer2DModel"]


def products(model, name):
    """{pair: s B A} in float64, from the file's tensors and config."""
    (pairs,) = scaled_pairs(adapter_file(model, name)).values()
    return {key: part.B.double() @ part.A.double() for key, part in pairs.items()}


@pytest.fixture
def model():
    model = SD3.build()
    add_random_adapter(model, "a", seed=1)
    add_random_adapter(model, "b", seed=2, rank=3, alpha=2, rslora=True)
    sl.set_serial_lora(model, [])
    return model


def test_the_sum_is_exact_and_of_the_summed_rank(model):
    report = sl.merge_serial_lora(model, ["a", "b"], [0.7, -0.4], "c")
    assert report.ranks == (7,)
    assert report.relative_error == 0
    a, b, c = (products(model, name) for name in "abc")
    for key in a:
        torch.testing.assert_close(c[key], 0.7 * a[key] - 0.4 * b[key], atol=1e-6, rtol=1e-6)
    sl.set_serial_lora(model, ["a", "b"], [0.7, -0.4])
    wanted = output_of(model, SD3)
    sl.set_serial_lora(model, "c")
    torch.testing.assert_close(output_of(model, SD3), wanted, atol=1e-5, rtol=1e-5)


def test_truncation_is_the_best_of_its_rank_and_tells_its_error(model):
    report = sl.merge_serial_lora(model, ["a", "b"], None, "c", rank=3)
    assert report.ranks == (3,)
    a, b, c = (products(model, name) for name in "abc")
    lost = whole = 0.0
    for key in a:
        sigma = torch.linalg.svdvals(a[key] + b[key])
        best = float(sigma[3:].square().sum().sqrt())
        assert float(torch.linalg.norm(a[key] + b[key] - c[key])) == pytest.approx(best, rel=1e-4)
        assert report.errors[f"transformer.{key}"] == pytest.approx(best / float(torch.linalg.norm(sigma)), rel=1e-4)
        lost, whole = lost + best**2, whole + float(sigma.square().sum())
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_the_result_is_an_ordinary_adapter_that_saves_and_loads(model, tmp_path):
    sl.merge_serial_lora(model, ["a", "b"], [0.5, 0.5], "c", rank=4)
    sl.set_serial_lora(model, "c")
    path = sl.save_serial_lora(model, tmp_path, "c")
    again = SD3.build()
    sl.load_serial_lora(again, path)
    assert torch.equal(output_of(again, SD3), output_of(model, SD3))


def test_the_result_is_not_active_beside_its_parts(model):
    sl.set_serial_lora(model, "a")
    before = output_of(model, SD3)
    sl.merge_serial_lora(model, ["a", "b"], None, "c")
    assert torch.equal(output_of(model, SD3), before)
    assert sl.serial_lora_status(model).active == ["a"]


def test_weights_by_site_count(model):
    sl.merge_serial_lora(model, ["a", "b"], [{r".*\.0\.attn": 0.25}, 1.0], "c")
    a, b, c = (products(model, name) for name in "abc")
    for key in a:
        weight = 0.25 if key.startswith("transformer_blocks.0.attn.") else 1.0
        torch.testing.assert_close(c[key], weight * a[key] + b[key], atol=1e-6, rtol=1e-6)


def test_adapters_of_different_places_merge():
    model = SD3.build()
    add_random_adapter(model, "a", seed=1, inputs=["hidden_states"], layers=0)
    add_random_adapter(model, "b", seed=2, inputs=["encoder_hidden_states", "feed_forward"], layers=1, rank=2)
    sl.set_serial_lora(model, ["a", "b"], [1.0, 0.5])
    wanted = output_of(model, SD3)
    sl.merge_serial_lora(model, ["a", "b"], [1.0, 0.5], "c")
    sl.set_serial_lora(model, "c")
    torch.testing.assert_close(output_of(model, SD3), wanted, atol=1e-5, rtol=1e-5)


def test_a_pipeline_merges_in_every_component():
    pipe = tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "a", seed=1)
    add_random_adapter(pipe.text_encoder, "a", seed=2)
    add_random_adapter(pipe.transformer, "b", seed=3)
    report = sl.merge_serial_lora(pipe, ["a", "b"], None, "c")
    assert report.ranks == (4, 8)
    assert set(products(pipe.text_encoder, "c")) == set(products(pipe.text_encoder, "a"))
    for key, M in products(pipe.text_encoder, "c").items():
        torch.testing.assert_close(M, products(pipe.text_encoder, "a")[key])


def test_files_merge_without_their_base_to_the_same(model, tmp_path):
    states = [adapter_file(model, name) for name in "ab"]
    merged, report = merge_files(states, [0.7, -0.4], rank=5)
    sl.load_serial_lora(model, merged, "file")
    sl.merge_serial_lora(model, ["a", "b"], [0.7, -0.4], "live", rank=5)
    one, other = products(model, "file"), products(model, "live")
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=1e-5)
    assert report.ranks == (5,)


def test_files_of_different_places_need_their_base():
    model = SD3.build()
    add_random_adapter(model, "a", layers=0)
    add_random_adapter(model, "b", layers=1)
    states = [adapter_file(model, name) for name in "ab"]
    with pytest.raises(sl.SerialLoraError, match="merge them with their base"):
        merge_files(states, [1.0, 1.0])


def test_files_of_other_weights_are_warned_of_and_those_of_another_model_refused():
    one, other = SD3.build(), SD3.build()
    for parameter in other.parameters():
        parameter.data.mul_(1.05)
    files = []
    for model in (one, other):
        add_random_adapter(model, "a")
        files.append(adapter_file(model, "a"))
    with pytest.warns(UserWarning, match="trained on different weights, of SD3Transformer2DModel"):
        merge_files(files, [1.0, 1.0])
    merge_files([files[0], files[0]], [1.0, 1.0])
    part = files[1].components["transformer"]
    elsewhere = replace(part, base=replace(part.base, kind="FluxTransformer2DModel"))
    with pytest.raises(sl.SerialLoraError, match="different models, SD3Transformer2DModel and FluxTransformer2DModel"):
        merge_files([files[0], AdapterFile({"transformer": elsewhere})], [1.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["a", "x"]}, r"Unknown adapter \['x'\]; there are \['a', 'b'\]"),
        ({"names": []}, "names must be some of"),
        ({"new_name": "a"}, "The name 'a' is taken"),
        ({"weights": [1.0]}, "need as many weights"),
        ({"rank": -1}, "rank must be a whole number"),
    ],
)
def test_bad_input_changes_nothing(model, arguments, message):
    with pytest.raises(sl.SerialLoraError, match=message):
        sl.merge_serial_lora(model, **{"names": ["a", "b"], "weights": None, "new_name": "c", **arguments})
    assert list(sl.serial_lora_status(model).adapters) == ["a", "b"]


def test_fused_adapters_are_not_merged(model):
    sl.set_serial_lora(model, "a")
    sl.fuse_serial_lora(model)
    with pytest.raises(sl.SerialLoraError, match="unfuse_serial_lora"):
        sl.merge_serial_lora(model, ["a", "b"], None, "c")
