"""State for one call: it nests, survives exceptions and threads, and changes nothing in the model."""

from __future__ import annotations

import statistics
import threading
import time

import pytest
import torch

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of, traces
from tests.test_lifecycle import FAMILIES, loaded
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_zero_and_disabled_equal_the_base_to_the_bit(name):
    tiny, model = loaded(name, 2)
    base = output_of(tiny.build(), tiny)
    before = traces(model)
    with sl.serial_lora_scale(model, 0):
        assert torch.equal(output_of(model, tiny), base)
        assert traces(model) == before
    with sl.disable_serial_lora(model):
        assert torch.equal(output_of(model, tiny), base)
    assert not torch.equal(output_of(model, tiny), base)


def test_scales_nest_by_multiplication_and_survive_exceptions():
    tiny, model = loaded("SD3Transformer2DModel", 2)
    live = output_of(model, tiny)
    sl.set_serial_lora(model, ["a0", "a1"], 0.25)
    quarter = output_of(model, tiny)
    sl.set_serial_lora(model, ["a0", "a1"])
    with pytest.raises(RuntimeError, match="on purpose"), sl.serial_lora_scale(model, 0.5):
        with sl.serial_lora_scale(model, 0.5):
            assert torch.allclose(output_of(model, tiny), quarter, atol=1e-6)
        with sl.disable_serial_lora(model), pytest.raises(TypeError):
            model(nonsense=1)
        raise RuntimeError("on purpose")
    assert torch.equal(output_of(model, tiny), live)


def test_two_threads_with_different_scales_do_not_mix():
    tiny, model = loaded("DiTTransformer2DModel", 2)
    wanted = {}
    for scale in (0.0, 0.5, 1.0, 2.0):
        with sl.serial_lora_scale(model, scale):
            wanted[scale] = output_of(model, tiny)
    wrong = []
    barrier = threading.Barrier(len(wanted))

    def run(scale):
        with sl.serial_lora_scale(model, scale):
            barrier.wait()
            for _ in range(10):
                if not torch.equal(output_of(model, tiny), wanted[scale]):
                    wrong.append(scale)

    threads = [threading.Thread(target=run, args=(scale,)) for scale in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_pipelines_own_scale_argument_works_and_ends_with_the_call():
    tiny, model = loaded("SD3Transformer2DModel", 1)
    live = output_of(model, tiny)
    with sl.serial_lora_scale(model, 0.5):
        half = output_of(model, tiny)
    assert torch.equal(output_of(model, tiny, joint_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(output_of(model, tiny), live)
    with pytest.raises(TypeError):
        model(**tiny.arguments(), joint_attention_kwargs={"scale": 0.5}, nonsense=1)
    assert torch.equal(output_of(model, tiny), live)  # the state ended with the failed call
    with pytest.raises(sl.SerialLoraError, match="finite number"):
        output_of(model, tiny, joint_attention_kwargs={"scale": "half"})


def test_cross_attention_kwargs_scale_a_transformer_that_has_them():
    tiny, model = loaded("PixArtTransformer2DModel", 1)
    with sl.serial_lora_scale(model, 0.5):
        half = output_of(model, tiny)
    assert torch.equal(output_of(model, tiny, cross_attention_kwargs={"scale": 0.5}), half)


def test_joint_attention_kwargs_of_a_pipeline_scale_the_adapter():
    pipe = tiny_sd3_pipeline()
    pipe.set_progress_bar_config(disable=True)
    add_random_adapter(pipe.transformer, std=0.5)

    def latents(**more):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red fox", num_inference_steps=2, output_type="latent", generator=generator, **more).images

    with pipe.serial_lora_scale(0.5):
        half = latents()
    assert torch.equal(latents(joint_attention_kwargs={"scale": 0.5}), half)
    assert not torch.equal(latents(), half)


@pytest.mark.parametrize("scale", [0.5, 0, 2])
def test_a_fused_adapter_refuses_a_scale(scale):
    tiny, model = loaded("SD3Transformer2DModel", 1)
    sl.fuse_serial_lora(model)
    fused = output_of(model, tiny)
    with pytest.raises(sl.SerialLoraError, match="unfuse_serial_lora"), sl.serial_lora_scale(model, scale):
        pass
    with pytest.raises(sl.SerialLoraError, match="fused"):
        output_of(model, tiny, joint_attention_kwargs={"scale": scale})
    with sl.serial_lora_scale(model, 1):
        assert torch.equal(output_of(model, tiny), fused)
    with pytest.raises(sl.SerialLoraError, match="fused"), sl.serial_lora_batch(model, ["a0", None]):
        pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", None, True])
def test_a_scale_is_a_finite_number(bad):
    _, model = loaded("DiTTransformer2DModel", 1)
    with pytest.raises(sl.SerialLoraError, match="finite number"), sl.serial_lora_scale(model, bad):
        pass


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_for_each_sample_equals_separate_runs(name, copies):
    tiny, model = loaded(name, 3)
    arguments, batch = tiny.arguments(), 2
    per_sample = [k for k, v in arguments.items() if torch.is_tensor(v) and len(v) == len(arguments["hidden_states"])]
    for key in per_sample:
        arguments[key] = torch.cat([arguments[key]] * 4)[: batch * copies]
    names = ["a2", None]

    @torch.no_grad()
    def run():
        return model(**arguments)[0]

    separate = []
    for adapter in names:
        sl.set_serial_lora(model, [] if adapter is None else adapter)
        separate.append(run())
    sl.set_serial_lora(model, "a1")  # what is active does not matter inside
    before = traces(model)
    with sl.serial_lora_batch(model, names):
        together = run()
    assert traces(model) == before
    for i in range(batch * copies):
        assert torch.allclose(together[i], separate[i % 2][i], atol=1e-5)


def test_a_batch_may_scale_and_nest():
    tiny, model = loaded("DiTTransformer2DModel", 2)
    sl.set_serial_lora(model, "a0", 0.5)
    half = output_of(model, tiny)
    sl.set_serial_lora(model, "a0")
    with sl.serial_lora_batch(model, ["a0", "a0"]), sl.serial_lora_scale(model, 0.5):
        assert torch.allclose(output_of(model, tiny), half, atol=1e-5)


@pytest.mark.parametrize("names", [[], "a0", ["a0", "nobody"]])
def test_a_bad_list_of_adapters_is_refused(names):
    _, model = loaded("DiTTransformer2DModel", 1)
    with pytest.raises(sl.SerialLoraError), sl.serial_lora_batch(model, names):
        pass


def test_a_batch_of_another_size_is_refused():
    tiny, model = loaded("DiTTransformer2DModel", 1)
    with pytest.raises(sl.SerialLoraError, match="3 adapter names"), sl.serial_lora_batch(model, ["a0", None, "a0"]):
        output_of(model, tiny)


def test_a_model_that_folds_frames_into_its_batch_is_refused():
    tiny = TINY["LatteTransformer3DModel"]
    model = tiny.build()
    add_random_adapter(model, "a0")
    batch = tiny.arguments()["hidden_states"].shape[0]
    with pytest.raises(sl.SerialLoraError, match="folds frames"), sl.serial_lora_batch(model, ["a0"] * batch):
        output_of(model, tiny)


@pytest.mark.slow
def test_a_batch_of_adapters_runs_at_nine_tenths_of_the_speed_of_one_at_least():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=8, attention_head_dim=72, num_layers=3, sample_size=32).eval()
    for i in range(4):
        add_random_adapter(model, f"a{i}", seed=i, rank=16)
    arguments = {
        "hidden_states": torch.randn(4, 4, 32, 32),
        "timestep": torch.ones(4),
        "class_labels": torch.ones(4).int(),
    }
    sl.set_serial_lora(model, "a0")
    times = {"one": [], "each": []}
    with torch.no_grad(), sl.serial_lora_batch(model, ["a0", "a1", "a2", "a3"]):
        for _ in range(12):
            start = time.perf_counter()
            model(**arguments)
            times["each"].append(time.perf_counter() - start)
            with sl.serial_lora_scale(model, 1.0):
                pass
            call = model._serial_lora.call
            outer = call.push(samples=None)
            start = time.perf_counter()
            model(**arguments)
            times["one"].append(time.perf_counter() - start)
            call.pop(outer)
    assert statistics.median(times["one"]) / statistics.median(times["each"]) > 0.9
