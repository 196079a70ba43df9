"""Several adapters on one model: their sum, their weights per site, and how they go without a trace."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch.utils.flop_counter import FlopCounterMode

import slora_diffusers as sl
from slora_diffusers.core.state import pairs_of
from tests.adapters import add_random_adapter, output_of, traces
from tests.ops import count_ops
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_sd3_pipeline

FAMILIES = ["DiTTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel"]


def loaded(name, count, **config):
    """A tiny model with `count` random adapters a0, a1, ... of ranks 2, 3, ..."""
    tiny = TINY[name]
    model = tiny.build()
    for i in range(count):
        add_random_adapter(model, f"a{i}", seed=i, rank=2 + i, **config)
    return tiny, model


def fused_by_hand(tiny, weights, paths=None):
    """The model whose every projection is W + sum_i w_i s_i W B_i A_i, in float64, from the adapters' state dicts."""
    _, source = loaded(tiny.class_name, len(weights))
    model = tiny.build().double()
    delta: dict[tuple[str, str], Any] = {}
    for name, weight in weights.items():
        state = sl.serial_lora_state_dict(source, name)
        rank = next(iter(state.values())).shape[0]
        for key in [key for key in state if key.endswith("lora_A.weight")]:
            path, _, pair = key.removeprefix("transformer.").removesuffix(".lora_A.weight").partition(".serial_lora.")
            w: Any = weight(path) if callable(weight) else weight
            BA = state[key.replace("lora_A", "lora_B")].double() @ state[key].double()
            delta[path, pair] = delta.get((path, pair), 0) + w * 6 / rank * BA
    for (path, pair), M in delta.items():
        site = model.get_submodule(path)
        crossing = not hasattr(site, "add_q_proj") or site.add_q_proj is None
        context = ("to_k", "to_v") if crossing else ("add_q_proj", "add_k_proj", "add_v_proj")
        reads_text = (path, "encoder_hidden_states") in delta and crossing
        image = ("to_q",) if reads_text else ("to_q", "to_k", "to_v")
        for projection in context if pair == "encoder_hidden_states" else image:
            W = getattr(site, projection).weight
            W.data = W.data + W.data @ M
    return model


@torch.no_grad()
def output64(model, tiny):
    arguments = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
                 for k, v in tiny.arguments().items()}  # fmt: skip
    return model(**arguments)[0].flatten()


@pytest.mark.parametrize("name", FAMILIES)
def test_weighted_adapters_add_up_as_the_formula_says(name):
    tiny, model = loaded(name, 3)
    weights = {"a0": 0.5, "a1": -1.25, "a2": 2.0}
    sl.set_serial_lora(model, list(weights), list(weights.values()))
    wanted = output64(fused_by_hand(tiny, weights), tiny)
    assert torch.allclose(output64(model.double(), tiny), wanted, atol=1e-10)


def test_the_order_of_adapters_does_not_change_a_bit():
    tiny, model = loaded("SD3Transformer2DModel", 3)
    sl.set_serial_lora(model, ["a0", "a1", "a2"], [0.5, 0.7, 0.9])
    one = output_of(model, tiny)
    sl.set_serial_lora(model, ["a2", "a0", "a1"], [0.9, 0.5, 0.7])
    assert torch.equal(output_of(model, tiny), one)


@pytest.mark.parametrize("name", FAMILIES)
def test_four_active_adapters_cost_what_one_of_the_summed_rank_costs(name):
    """The same operations on the same shapes: counted operations and multiply-adds are equal."""
    tiny, four = loaded(name, 4)  # ranks 2, 3, 4, 5
    one = tiny.build()
    add_random_adapter(one, rank=2 + 3 + 4 + 5)
    output_of(four, tiny)  # the first forward stacks the adapters, once
    assert count_ops(lambda: output_of(four, tiny)) == count_ops(lambda: output_of(one, tiny))
    flops = []
    for model in (four, one):
        with FlopCounterMode(display=False) as counter:
            output_of(model, tiny)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_a_loaded_adapter_is_active_beside_the_others(tmp_path):
    tiny, model = loaded("DiTTransformer2DModel", 2)
    both = output_of(model, tiny)
    for name in ("a0", "a1"):
        sl.save_serial_lora(model, tmp_path / name, name)
    sl.unload_serial_lora(model)
    sl.load_serial_lora(model, tmp_path / "a0", "first")
    sl.load_serial_lora(model, tmp_path / "a1")
    assert sl.serial_lora_status(model).active == ["first", "default"]
    assert torch.allclose(output_of(model, tiny), both, atol=1e-4)  # summed in another order


def test_weights_per_site_use_patterns_anchored_at_both_ends():
    tiny = copy.copy(TINY["DiTTransformer2DModel"])
    tiny.config = {**tiny.config, "num_layers": 11}
    model = tiny.build()
    add_random_adapter(model, "a0", seed=0, rank=2)
    sl.set_serial_lora(model, "a0", {r"transformer_blocks\.1\..*": 0.0})
    gains = {key: pair.gains for key, pair in pairs_of(model).items()}
    off = [key for key, gain in gains.items() if not gain]
    assert off == ["transformer_blocks.1.attn1.serial_lora.hidden_states"]
    sl.set_serial_lora(model, "a0", {r".*\.attn1": 0.0})
    assert torch.equal(output_of(model, tiny), output_of(tiny.build(), tiny))


def test_unknown_names_and_sites_raise_and_change_nothing():
    tiny, model = loaded("DiTTransformer2DModel", 2)
    before = output_of(model, tiny)
    for call in (
        lambda: sl.set_serial_lora(model, "nobody"),
        lambda: sl.set_serial_lora(model, ["a0", "a1"], [1.0]),
        lambda: sl.set_serial_lora(model, ["a0", "a0"]),
        lambda: sl.set_serial_lora(model, "a0", {"transformer_blocks.1": 0.5}),
        lambda: sl.set_serial_lora(model, "a0", float("nan")),
        lambda: sl.set_serial_lora(model, "a0", {"(": 0.5}),
        lambda: sl.delete_serial_lora(model, ["a0", "nobody"]),
        lambda: sl.add_serial_lora(model, sl.SerialLoraConfig(), "a0"),
        lambda: sl.add_serial_lora(model, sl.SerialLoraConfig(), "with.dot"),
        lambda: sl.serial_lora_parameters(model, "nobody"),
        lambda: sl.fuse_serial_lora(model, "nobody"),
        lambda: sl.fuse_serial_lora(model, "a0"),  # a1 would stay live beside fused weights
        lambda: sl.unfuse_serial_lora(model),
    ):
        with pytest.raises(sl.SerialLoraError):
            call()
    assert torch.equal(output_of(model, tiny), before)
    assert sl.serial_lora_status(model).active == ["a0", "a1"]


@pytest.mark.parametrize("how", ["unload", "delete all", "delete one by one"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_go_without_a_trace(name, how):
    tiny = TINY[name]
    model = tiny.build()
    before, base = traces(model), output_of(model, tiny)
    for i in range(3):
        add_random_adapter(model, f"a{i}", seed=i, inputs=None if i else ("hidden_states", "attention_output"))
    sl.fuse_serial_lora(model)
    sl.unfuse_serial_lora(model)
    with sl.serial_lora_scale(model, 0.5):
        output_of(model, tiny)
    held = [weakref.ref(p) for p in sl.serial_lora_parameters(model)]
    held += [weakref.ref(pair) for pair in pairs_of(model).values()]
    assert held
    if how == "unload":
        sl.unload_serial_lora(model)
    elif how == "delete all":
        sl.delete_serial_lora(model, ["a1", "a0", "a2"])
    else:
        for adapter in ("a1", "a0", "a2"):
            sl.delete_serial_lora(model, adapter)
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    assert traces(model) == before
    assert torch.equal(output_of(model, tiny), base)


def test_deleting_one_adapter_frees_it_and_keeps_the_others():
    tiny, model = loaded("SD3Transformer2DModel", 2)
    sl.set_serial_lora(model, "a1")
    wanted = output_of(model, tiny)
    sl.set_serial_lora(model, ["a0", "a1"])
    held = [weakref.ref(p) for p in sl.serial_lora_parameters(model, "a0")]
    sl.delete_serial_lora(model, "a0")
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    assert torch.equal(output_of(model, tiny), wanted)
    assert sl.serial_lora_status(model).active == ["a1"]


def test_unload_makes_a_fuse_permanent_as_in_diffusers():
    tiny, model = loaded("DiTTransformer2DModel", 1)
    sl.fuse_serial_lora(model)
    fused = output_of(model, tiny)
    sl.unload_serial_lora(model)
    assert torch.equal(output_of(model, tiny), fused)
    assert not any("serial_lora" in key for key in model.state_dict())


@pytest.mark.parametrize("state", ["live", "fused", "scaled"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(way, state):
    tiny, model = loaded("SD3Transformer2DModel", 2)
    if state == "fused":
        sl.fuse_serial_lora(model)
    if state == "scaled":
        sl.set_serial_lora(model, ["a0", "a1"], [0.25, {r".*\.0\.attn": 0.5}])
    wanted = output_of(model, tiny)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(output_of(twin, tiny), wanted)
    if state == "fused":
        with pytest.raises(sl.SerialLoraError), sl.serial_lora_scale(twin, 0.5):
            pass
        sl.unfuse_serial_lora(twin)
    sl.unload_serial_lora(twin)
    assert torch.equal(output_of(twin, tiny), output_of(tiny.build(), tiny))
    assert torch.equal(output_of(model, tiny), wanted)


def test_two_pipelines_that_share_a_transformer_share_its_adapters():
    pipe = tiny_sd3_pipeline()
    other = StableDiffusion3Pipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    add_random_adapter(pipe.transformer, "style")
    assert other.serial_lora_status()["transformer"].active == ["style"]
    other.fuse_serial_lora()
    with pytest.raises(sl.SerialLoraError, match="fused"):
        pipe.fuse_serial_lora()
    pipe.unfuse_serial_lora()
    other.unload_serial_lora()
    assert pipe.serial_lora_status() == {}


def test_status_reads_as_a_table():
    pipe = tiny_dit_pipeline()
    assert pipe.serial_lora_status() == {}
    assert "no Serial LoRA adapter" in str(sl.serial_lora_status(pipe.transformer))
    sl.add_serial_lora(pipe.transformer, sl.SerialLoraConfig(rank=2), "one")
    add_random_adapter(pipe.transformer, "two", rank=3)
    pipe.set_serial_lora(["two"], 0.5)
    text = str(pipe.serial_lora_status()["transformer"])
    for word in ("one", "two", "inactive", "active", "0.5", "float32", "cpu", "DiTTransformer2DModel"):
        assert word in text
    pipe.fuse_serial_lora()
    assert "fused" in str(sl.serial_lora_status(pipe.transformer))


def test_every_diffusion_pipeline_has_the_verbs():
    for verb in ("load_serial_lora", "save_serial_lora", "set_serial_lora", "serial_lora_scale", "disable_serial_lora",
                 "serial_lora_batch", "delete_serial_lora", "unload_serial_lora", "fuse_serial_lora",
                 "unfuse_serial_lora", "serial_lora_status"):  # fmt: skip
        assert callable(getattr(DiffusionPipeline, verb))


def test_loading_speaks_through_the_logger_of_diffusers(caplog):
    tiny, model = loaded("DiTTransformer2DModel", 1)
    state = sl.serial_lora_state_dict(model)
    other = tiny.build()
    diffusers_logger = logging.getLogger("diffusers")
    propagate, diffusers_logger.propagate = diffusers_logger.propagate, True
    try:
        with caplog.at_level("INFO", logger="diffusers"):
            sl.load_serial_lora(other, state, "style")
            state.pop(next(iter(state)))
            sl.load_serial_lora(other, state, "part", strict=False)
    finally:
        diffusers_logger.propagate = propagate
    levels = {record.levelname: record.getMessage() for record in caplog.records}
    assert "style" in levels["INFO"]
    assert "part" in levels["WARNING"]
    assert "1 missing" in levels["WARNING"]


def test_a_pipeline_saves_its_text_encoders_pairs_in_the_same_file_and_loads_them(tmp_path):
    pipe = tiny_sd3_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for i, component in enumerate(("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")):
        add_random_adapter(getattr(pipe, component), "style", seed=i)

    def image(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red fox", num_inference_steps=2, generator=generator, output_type="latent").images

    wanted = image(pipe)
    pipe.save_serial_lora(tmp_path)
    fresh = tiny_sd3_pipeline()
    fresh.set_progress_bar_config(disable=True)
    base = image(fresh)
    report = fresh.load_serial_lora(tmp_path, adapter_name="style")
    assert sorted(report) == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer"]
    assert torch.allclose(image(fresh), wanted, atol=1e-5)
    fresh.fuse_serial_lora()
    assert torch.allclose(image(fresh), wanted, atol=1e-4)
    fresh.unfuse_serial_lora()
    inner = fresh.text_encoder
    with sl.disable_serial_lora(inner):
        assert not torch.allclose(image(fresh), wanted, atol=1e-3)
    with fresh.disable_serial_lora():
        assert torch.equal(image(fresh), base)
    fresh.unload_serial_lora()
    assert torch.equal(image(fresh), base)


def test_a_load_that_fails_in_one_component_touches_none(tmp_path):
    pipe = tiny_sd3_pipeline()
    for i, component in enumerate(("transformer", "text_encoder")):
        add_random_adapter(getattr(pipe, component), "style", seed=i)
    tensors = {**sl.serial_lora_state_dict(pipe.transformer, "style"),
               **sl.serial_lora_state_dict(pipe.text_encoder, "style", "text_encoder")}  # fmt: skip
    broken = next(key for key in tensors if key.startswith("text_encoder"))
    tensors[broken] = tensors[broken][:, :3]
    fresh = tiny_sd3_pipeline()
    before = traces(fresh.transformer), traces(fresh.text_encoder)
    with pytest.warns(UserWarning, match="no config"), pytest.raises(sl.SerialLoraError, match="wrong shape"):
        fresh.load_serial_lora(tensors)
    assert (traces(fresh.transformer), traces(fresh.text_encoder)) == before
