"""Pipelines of several transformers, and the options of a load: component, weights, activate, hotswap, is_trainable."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.modular_pipelines import ComponentSpec, ModularPipeline, ModularPipelineBlocks
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.loader import VERBS
from tests.adapters import add_random_adapter, output_of, traces
from tests.tiny.models import TINY

NAME = "WanTransformer3DModel"
TINY_WAN = TINY[NAME]


def pipeline() -> WanPipeline:
    """Wan 2.2: one transformer for much noise, another for little."""
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    both = {"transformer": TINY_WAN.build(0), "transformer_2": TINY_WAN.build(1)}
    return WanPipeline(**nothing, **both, scheduler=FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.9)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = TINY_WAN.build()
    add_random_adapter(model)
    return sl.save_serial_lora(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    model = TINY_WAN.build()
    add_random_adapter(model, seed=5, rank=2, layers=0)
    return sl.save_serial_lora(model, tmp_path_factory.mktemp("other"))


def expected(seed: int, path, weight: float = 1.0) -> torch.Tensor:
    """The output of one bare transformer with the adapter in `path`."""
    model = TINY_WAN.build(seed)
    sl.load_serial_lora(model, path, weight=weight)
    return output_of(model, TINY_WAN)


def outputs(pipe) -> list[torch.Tensor]:
    return [output_of(pipe.transformer, TINY_WAN), output_of(pipe.transformer_2, TINY_WAN)]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:The adapter was trained on")
class TestComponents:
    def test_a_file_goes_into_the_component_that_is_named(self, file):
        pipe = pipeline()
        report = pipe.load_serial_lora(file, "a", component="transformer_2")
        assert list(report) == ["transformer_2"]
        assert same(outputs(pipe), [output_of(TINY_WAN.build(0), TINY_WAN), expected(1, file)])

    def test_the_same_name_in_both_has_a_weight_of_its_own_in_each(self, file):
        pipe = pipeline()
        pipe.load_serial_lora(file, "a", weight=1.0)
        pipe.load_serial_lora(file, "a", weight={"transformer_2": 0.5}, component="transformer_2")
        assert same(outputs(pipe), [expected(0, file), expected(1, file, 0.5)])
        pipe.set_serial_lora("a", {"transformer": -1.0, "transformer_2": 2.0})
        assert same(outputs(pipe), [expected(0, file, -1.0), expected(1, file, 2.0)])
        pipe.set_serial_lora("a", {"transformer_2": 0.25})
        assert same(outputs(pipe), [expected(0, file), expected(1, file, 0.25)])
        status = pipe.serial_lora_status()
        assert [status[c].weights["a"] for c in ("transformer", "transformer_2")] == [1.0, 0.25]

    def test_saved_and_loaded_again_each_part_finds_its_transformer(self, file, tmp_path):
        pipe, again = pipeline(), pipeline()
        pipe.load_serial_lora(file, "a")
        pipe.load_serial_lora(file, "a", component="transformer_2")
        path = pipe.save_serial_lora(tmp_path)
        again.load_serial_lora(path)
        assert same(outputs(again), outputs(pipe))
        one = TINY_WAN.build(0)
        sl.load_serial_lora(one, path, component="transformer_2")
        assert torch.equal(output_of(one, TINY_WAN), expected(0, file))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"component": "transformer_3"}, r"component must be one of \['transformer', 'transformer_2'\]"),
            ({"weight": {"transformer": 1.0, "vae": 1.0}}, r"Weights of components name \['vae'\]"),
            ({"weight": {"transformer": float("nan")}}, "weight must be a finite number"),
            ({"weight": {r".*attn1": 0.5}}, "weight must be a finite number"),
            ({"hotswap": True}, "there is none yet"),
        ],
    )
    def test_what_cannot_be_is_refused_and_changes_nothing(self, file, arguments, message):
        pipe = pipeline()
        before = [traces(pipe.transformer), traces(pipe.transformer_2)]
        with pytest.raises(sl.SerialLoraError, match=message):
            pipe.load_serial_lora(file, "a", **arguments)
        assert [traces(pipe.transformer), traces(pipe.transformer_2)] == before

    def test_weights_of_components_and_of_sites_do_not_mix(self, file):
        pipe = pipeline()
        pipe.load_serial_lora(file, "a")
        with pytest.raises(sl.AdapterStateError, match="Patterns of sites go below a component"):
            pipe.set_serial_lora("a", {"transformer": 1.0, r".*attn1": 0.5})
        pipe.set_serial_lora("a", {"transformer": {r".*attn1": 0.0, r".*": 0.0}})
        assert same(outputs(pipe), outputs(pipeline()))

    def test_a_merge_weighs_each_component_as_asked(self, file, other):
        pipe = pipeline()
        for component in ("transformer", "transformer_2"):
            pipe.load_serial_lora(file, "a", component=component)
            pipe.load_serial_lora(other, "b", component=component)
        chosen = [{"transformer": 0.5, "transformer_2": 2.0}, 1.0]
        pipe.set_serial_lora(["a", "b"], chosen)
        wanted = outputs(pipe)
        sl.merge_serial_lora(pipe, ["a", "b"], chosen, "both")
        pipe.set_serial_lora("both")
        for given, output in zip(outputs(pipe), wanted, strict=True):
            torch.testing.assert_close(given, output, rtol=1e-4, atol=1e-4)


class TestOptionsOfALoad:
    def test_an_adapter_that_is_not_activated_changes_no_output_until_it_is_set(self, file):
        model = TINY_WAN.build()
        sl.load_serial_lora(model, file, "a", activate=False)
        assert torch.equal(output_of(model, TINY_WAN), output_of(TINY_WAN.build(), TINY_WAN))
        assert sl.serial_lora_status(model).active == []
        sl.set_serial_lora(model, "a")
        assert torch.equal(output_of(model, TINY_WAN), expected(0, file))

    def test_hotswap_replaces_the_adapter_of_that_name(self, file, other):
        model = TINY_WAN.build()
        sl.load_serial_lora(model, file, "a")
        sl.load_serial_lora(model, other, "a", hotswap=True)
        assert torch.equal(output_of(model, TINY_WAN), expected(0, other))
        fresh = TINY_WAN.build()
        sl.load_serial_lora(fresh, other, "a")
        assert list(model.state_dict()) == list(fresh.state_dict())  # no empty pair is left at the other sites
        sl.load_serial_lora(model, file, hotswap=True)  # the only one
        assert torch.equal(output_of(model, TINY_WAN), expected(0, file))
        sl.unload_serial_lora(model)
        assert traces(model) == traces(TINY_WAN.build())

    @pytest.mark.filterwarnings("ignore:The adapter was trained on")
    def test_hotswap_in_a_pipeline_leaves_no_part_of_the_old_one(self, file, other):
        pipe = pipeline()
        pipe.load_serial_lora(file, "a")
        pipe.load_serial_lora(file, "a", component="transformer_2")
        pipe.load_serial_lora(other, "a", hotswap=True)
        assert same(outputs(pipe), [expected(0, other), output_of(TINY_WAN.build(1), TINY_WAN)])

    def test_hotswap_that_does_not_fit_keeps_the_old_one(self, file, tmp_path):
        model, dit = TINY_WAN.build(), TINY["DiTTransformer2DModel"].build()
        sl.load_serial_lora(model, file, "a")
        add_random_adapter(dit)
        before = traces(model)
        with pytest.raises(sl.SerialLoraError, match="does not fit"):
            sl.load_serial_lora(model, sl.save_serial_lora(dit, tmp_path), "a", hotswap=True)
        assert traces(model) == before and torch.equal(output_of(model, TINY_WAN), expected(0, file))
        sl.fuse_serial_lora(model)
        with pytest.raises(sl.AdapterStateError, match="Cannot replace an adapter while"):
            sl.load_serial_lora(model, file, "a", hotswap=True)

    def test_hotswap_with_reserved_capacity_needs_no_room_beside_the_old_one(self, file):
        model = TINY_WAN.build()
        sl.reserve_serial_lora(model, (4, 1))
        sl.load_serial_lora(model, file, "a")
        with pytest.raises(sl.AdapterStateError, match="exceeds the reserved capacity"):
            sl.load_serial_lora(model, file, "b")
        sl.load_serial_lora(model, file, "a", hotswap=True, weight=0.5)
        torch.testing.assert_close(output_of(model, TINY_WAN), expected(0, file, 0.5))

    def test_training_goes_on_where_it_stopped(self, file):
        model = TINY_WAN.build().requires_grad_(True)
        sl.load_serial_lora(model, file, "a", is_trainable=True)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all(".serial_lora." in name for name in trained)
        assert {p.dtype for p in sl.serial_lora_parameters(model)} == {torch.float32}
        model(**TINY_WAN.arguments())[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in sl.serial_lora_parameters(model, "a"))
        reserved = TINY_WAN.build()
        sl.reserve_serial_lora(reserved, (4, 2))
        with pytest.raises(sl.AdapterStateError, match="do not train"):
            sl.load_serial_lora(reserved, file, is_trainable=True)

    def test_idle_adapters_move_and_active_ones_stay(self, file, other):
        model = TINY_WAN.build()
        sl.load_serial_lora(model, file, "a")
        sl.load_serial_lora(model, other, "b", activate=False)
        with pytest.raises(sl.AdapterStateError, match="are active"):
            sl.move_serial_lora(model, ["a", "b"], "cpu")
        with pytest.raises(sl.AdapterStateError, match="Unknown adapter"):
            sl.move_serial_lora(model, "c", "cpu")
        for device, message in (("meta", "keeps no numbers"), ("nowhere", "cannot be moved to 'nowhere'")):
            with pytest.raises(sl.AdapterStateError, match=message):
                sl.move_serial_lora(model, "b", device)
        sl.move_serial_lora(model, "b", "cpu")
        assert torch.equal(output_of(model, TINY_WAN), expected(0, file))
        sl.set_serial_lora(model, "b")
        assert torch.equal(output_of(model, TINY_WAN), expected(0, other))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
    def test_an_adapter_that_idles_on_the_cpu_is_right_when_it_is_set(self, file, other):
        model = TINY_WAN.build().to("cuda")
        given = {key: value.to("cuda") for key, value in TINY_WAN.arguments().items()}
        sl.load_serial_lora(model, file, "a")
        with torch.no_grad():
            wanted = model(**given)[0]
        sl.load_serial_lora(model, other, "b")
        sl.set_serial_lora(model, "b")
        sl.move_serial_lora(model, "a", "cpu")
        assert {p.device.type for p in sl.serial_lora_parameters(model, "a")} == {"cpu"}
        sl.set_serial_lora(model, "a")
        with torch.no_grad():
            torch.testing.assert_close(model(**given)[0], wanted)


class Denoise(ModularPipelineBlocks):
    """One step of a pipeline that is put together from blocks."""

    @property
    def expected_components(self):
        return [ComponentSpec("transformer", WanTransformer3DModel)]


def test_a_modular_pipeline_has_the_verbs(file, tmp_path):
    pipe = Denoise().init_pipeline()
    pipe.update_components(transformer=TINY_WAN.build())
    assert all(hasattr(ModularPipeline, verb) for verb in VERBS)
    pipe.load_serial_lora(file, "a")
    assert torch.equal(output_of(pipe.transformer, TINY_WAN), expected(0, file))
    assert load_file(pipe.save_serial_lora(tmp_path)).keys() == load_file(file).keys()
    pipe.fuse_serial_lora()
    pipe.unfuse_serial_lora()
    with pipe.disable_serial_lora():
        assert torch.equal(output_of(pipe.transformer, TINY_WAN), output_of(TINY_WAN.build(), TINY_WAN))
    pipe.unload_serial_lora()
    assert traces(pipe.transformer) == traces(TINY_WAN.build())
