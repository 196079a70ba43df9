"""Hot swap: with capacity reserved before compiling, no change of adapters recompiles or breaks a graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.graphs import graphs
from tests.test_lifecycle import FAMILIES
from tests.tiny.models import TINY

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def saved(tmp_path, tiny, name, seed, **config):
    """A folder with a random adapter for the tiny model."""
    model = tiny.build()
    add_random_adapter(model, name, seed=seed, **config)
    sl.save_serial_lora(model, tmp_path / name, name)
    return tmp_path / name, output_of(model, tiny)


@pytest.mark.parametrize("name", FAMILIES)
def test_swapping_adapters_of_other_rank_alpha_and_sites_never_recompiles(name, tmp_path):
    tiny = TINY[name]
    base = output_of(tiny.build(), tiny)
    a, output_a = saved(tmp_path, tiny, "a", 1, rank=2, alpha=1)
    b, output_b = saved(tmp_path, tiny, "b", 2, rank=4, alpha=8, layers=[0])
    model = tiny.build()
    sl.reserve_serial_lora(model, capacity=(4, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(output_of(compiled, tiny), base, atol=1e-5)
    first = graphs()
    assert first > 0

    sl.load_serial_lora(model, a, "a")
    assert torch.allclose(output_of(compiled, tiny), output_a, atol=1e-5)
    sl.set_serial_lora(model, [])
    assert torch.allclose(output_of(compiled, tiny), base, atol=1e-5)
    sl.load_serial_lora(compiled, b, "b")
    assert torch.allclose(output_of(compiled, tiny), output_b, atol=1e-5)
    sl.set_serial_lora(model, ["a", "b"], [0.5, -0.25])
    both = output_of(compiled, tiny)
    sl.delete_serial_lora(model, "a")
    sl.set_serial_lora(model, "b")
    assert torch.allclose(output_of(compiled, tiny), output_b, atol=1e-5)
    assert graphs() == first
    assert not counters["graph_break"]

    plain = tiny.build()
    sl.load_serial_lora(plain, a, "a")
    sl.load_serial_lora(plain, b, "b")
    sl.set_serial_lora(plain, ["a", "b"], [0.5, -0.25])
    assert torch.allclose(both, output_of(plain, tiny), atol=1e-5)


def test_the_saved_config_is_the_swapped_adapters(tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, _ = saved(tmp_path, tiny, "a", 1, rank=2, alpha=1)
    b, output_b = saved(tmp_path, tiny, "b", 2, rank=4, alpha=8, layers=[0])
    model = tiny.build()
    sl.reserve_serial_lora(model, capacity=(4, 1))
    sl.load_serial_lora(model, a, "a")
    sl.delete_serial_lora(model, "a")
    sl.load_serial_lora(model, b, "b")
    sl.save_serial_lora(model, tmp_path / "again")
    plain = tiny.build()
    sl.load_serial_lora(plain, tmp_path / "again")
    assert torch.allclose(output_of(plain, tiny), output_b, atol=1e-5)
    assert sl.serial_lora_state_dict(plain).metadata["components"]["transformer"]["config"]["layers"] == [0]


def test_more_than_the_capacity_is_refused_before_anything_changes(tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, _ = saved(tmp_path, tiny, "a", 1, rank=4)
    b, _ = saved(tmp_path, tiny, "b", 2, rank=5)
    c, _ = saved(tmp_path, tiny, "c", 3, rank=1, inputs=("feed_forward",))
    model = tiny.build()
    sl.reserve_serial_lora(model, capacity=(4, 2))
    sl.load_serial_lora(model, a, "a")
    before = output_of(model, tiny)
    for path in (b, c):
        with pytest.raises(sl.SerialLoraError, match="capacity"):
            sl.load_serial_lora(model, path)
    assert sl.serial_lora_status(model).active == ["a"]
    assert torch.equal(output_of(model, tiny), before)
    with pytest.raises(sl.SerialLoraError, match="capacity"):
        sl.reserve_serial_lora(tiny.build(), capacity=(0, 1))


def test_reserved_capacity_fuses_and_unloads_without_a_trace(tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, output_a = saved(tmp_path, tiny, "a", 1, rank=4)
    model = tiny.build()
    keys, base = list(model.state_dict()), output_of(model, tiny)
    sl.reserve_serial_lora(model, capacity=(4, 2))
    assert torch.allclose(output_of(model, tiny), base, atol=1e-6)
    sl.load_serial_lora(model, a)
    for change in (sl.fuse_serial_lora, sl.unfuse_serial_lora):
        change(model)
        assert torch.allclose(output_of(model, tiny), output_a, atol=1e-5)
    sl.unload_serial_lora(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(output_of(model, tiny), base)


def test_reserved_capacity_refuses_training():
    model = TINY["DiTTransformer2DModel"].build()
    sl.reserve_serial_lora(model, capacity=(4, 2))
    with pytest.raises(sl.SerialLoraError, match="do not train"):
        sl.add_serial_lora(model, sl.SerialLoraConfig())


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_without_capacity_a_compiled_model_follows_every_change(how, tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, output_a = saved(tmp_path, tiny, "a", 1, rank=2, inputs=("hidden_states", "attention_output"))
    model = tiny.build()
    base = output_of(model, tiny)
    if how == "whole":
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        run = model
        for block in model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(output_of(run, tiny), base, atol=1e-5)
    sl.load_serial_lora(model, a, "a")
    assert torch.allclose(output_of(run, tiny), output_a, atol=1e-5)
    sl.set_serial_lora(model, [])
    assert torch.allclose(output_of(run, tiny), base, atol=1e-5)
    sl.set_serial_lora(model, "a")
    sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(run, tiny), output_a, atol=1e-5)
    sl.unfuse_serial_lora(model)
    assert torch.allclose(output_of(run, tiny), output_a, atol=1e-5)
    sl.unload_serial_lora(model)
    assert torch.allclose(output_of(run, tiny), base, atol=1e-5)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_scale_on_a_compiled_model_is_true_or_refused(fullgraph):
    tiny = TINY["DiTTransformer2DModel"]
    model = tiny.build()
    add_random_adapter(model)
    with sl.serial_lora_scale(model, 0.5):
        half = output_of(model, tiny)
    live = output_of(model, tiny)
    run = torch.compile(model, backend="eager", fullgraph=fullgraph)
    assert torch.allclose(output_of(run, tiny), live, atol=1e-5)
    with sl.serial_lora_scale(model, 0.5):
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                output_of(run, tiny)
        else:
            assert torch.allclose(output_of(run, tiny), half, atol=1e-5)
    assert torch.allclose(output_of(run, tiny), live, atol=1e-5)


@pytest.mark.slow
def test_inductor_gives_the_eager_output(tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, output_a = saved(tmp_path, tiny, "a", 1, rank=2)
    model = tiny.build()
    sl.reserve_serial_lora(model, capacity=(4, 2))
    compiled = torch.compile(model, fullgraph=True)
    output_of(compiled, tiny)
    sl.load_serial_lora(model, a, "a")
    assert torch.allclose(output_of(compiled, tiny), output_a, atol=1e-4)


def compiled_graphs_of(tiny):
    """A compiled model of its own, and what counts the graphs that a run of it compiles."""
    model = tiny.build()
    run = torch.compile(model, backend="eager", fullgraph=True)
    output_of(run, tiny)

    def compiles():
        before = graphs()
        output_of(run, tiny)
        return graphs() - before

    return compiles


@pytest.mark.parametrize("verb", ["load", "fuse", "unload"])
@pytest.mark.parametrize("neighbour", ["DiTTransformer2DModel", "SD3Transformer2DModel"], ids=["same-class", "other"])
def test_a_change_of_an_eager_model_leaves_the_graphs_of_others_alone(neighbour, verb, tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, output_a = saved(tmp_path, tiny, "a", 1)
    model = tiny.build()
    compiles = compiled_graphs_of(TINY[neighbour])

    def scaled(x):
        return x * 2

    torch.compile(scaled, backend="eager")(torch.ones(2))  # a function that runs no model
    assert compiles() == 0
    sl.load_serial_lora(model, a, "a")
    if verb == "fuse":
        sl.fuse_serial_lora(model)
    if verb != "unload":
        assert torch.allclose(output_of(model, tiny), output_a, atol=1e-5)
    sl.unload_serial_lora(model)
    assert compiles() == 0


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "DiTTransformer2DModel"])
@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["itself", "deepcopy", "pickle"])  # fmt: skip
def test_a_graph_of_one_model_never_serves_another_with_other_adapters(name, how, tmp_path):
    """torch.compile guards on no hook: the graph of a base once served the next model of its class, pairs and all."""
    torch.compiler.reset()
    tiny = TINY[name]
    first = tiny.build()
    base = output_of(first, tiny)
    first.compile(backend="eager")
    assert torch.allclose(output_of(first, tiny), base, atol=1e-5)
    adapted = tiny.build()
    for adapter, inputs in (("a", None), ("b", ("hidden_states", "attention_output")), ("c", ("feed_forward",))):
        add_random_adapter(adapted, adapter, inputs=inputs)
        expected = output_of(adapted, tiny)
        one = how(adapted)
        one.compile(backend="eager")
        assert torch.allclose(output_of(one, tiny), expected, atol=1e-5), adapter
        assert not torch.allclose(expected, base, atol=1e-2)
    assert torch.allclose(output_of(first, tiny), base, atol=1e-5)
    sl.unload_serial_lora(adapted)
    assert torch.equal(output_of(how(adapted), tiny), base)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a block", "the forward", "a function around", "an argument"])
def test_a_change_reaches_a_model_however_it_was_compiled(how, tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    a, output_a = saved(tmp_path, tiny, "a", 1)
    model = tiny.build()
    base = output_of(model, tiny)
    run = model
    if how == "wrapped":
        run = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a block":
        model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend="eager")
    elif how == "the forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "a function around":
        run = torch.compile(lambda **arguments: model(**arguments), backend="eager")
    else:
        given = torch.compile(lambda module, arguments: module(**arguments), backend="eager")
        run = lambda **arguments: given(model, arguments)  # noqa: E731
    assert torch.allclose(output_of(run, tiny), base, atol=1e-5)
    sl.load_serial_lora(model, a, "a")
    assert torch.allclose(output_of(run, tiny), output_a, atol=1e-5)
    sl.unload_serial_lora(model)
    assert torch.allclose(output_of(run, tiny), base, atol=1e-5)


@pytest.mark.parametrize("verb", ["set", "load", "fuse", "unload", "hotswap"])
def test_a_change_reaches_a_model_that_runs_in_the_graph_of_another(verb, tmp_path):
    tiny = TINY["DiTTransformer2DModel"]
    (file, _), (other, _) = saved(tmp_path, tiny, "a", 1), saved(tmp_path, tiny, "b", 2)
    models, runs = [tiny.build(), tiny.build()], []
    for model in models:  # the second is compiled when a graph of its class is there, and makes none of its own
        sl.load_serial_lora(model, file, "a")
        runs.append(torch.compile(model.forward, backend="eager"))
        assert torch.allclose(output_of(runs[-1], tiny), output_of(model, tiny), atol=1e-5)
    changed = models[1]
    if verb == "set":
        sl.set_serial_lora(changed, "a", 0.3)
    elif verb == "fuse":
        sl.fuse_serial_lora(changed)
    elif verb == "unload":
        sl.unload_serial_lora(changed)
    else:
        sl.load_serial_lora(changed, other, "a" if verb == "hotswap" else "b", hotswap=verb == "hotswap")
    for run, model in zip(runs, models, strict=True):
        assert torch.allclose(output_of(run, tiny), output_of(model, tiny), atol=1e-5)
