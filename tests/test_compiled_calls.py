"""Reserved capacity: scales and adapters per sample are values of what a graph reads, and nothing is compiled again."""

from __future__ import annotations

import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

import slora_diffusers as sl
from slora_diffusers.core.reserved import Reserved
from tests.adapters import add_random_adapter, output_of
from tests.graphs import graphs
from tests.test_lifecycle import FAMILIES
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline

DIT = TINY["DiTTransformer2DModel"]
ONE_FAST = [
    "whole",
    *(pytest.param(how, marks=pytest.mark.slow) for how in ("in place", "repeated blocks", "a function")),
]
ADAPTERS = {"a": {"rank": 2, "alpha": 1}, "b": {"rank": 4, "layers": [0]}, "c": {"rank": 3}, "d": {"rank": 1}}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def states_of(tiny, adapters=ADAPTERS):
    """{name: a random adapter for the tiny model}."""
    states = {}
    for i, (name, config) in enumerate(adapters.items()):
        model = tiny.build()
        add_random_adapter(model, name, seed=i + 1, **config)
        states[name] = sl.serial_lora_state_dict(model)
    return states


def twins(tiny, capacity=(4, 4), **reserve):
    """A model with room reserved and an eager one without, with the same adapters."""
    reserved, plain = tiny.build(), tiny.build()
    sl.reserve_serial_lora(reserved, capacity=capacity, **reserve)
    for name, state in states_of(tiny).items():
        for model in (reserved, plain):
            sl.load_serial_lora(model, state, name)
            sl.set_serial_lora(model, [])
    return reserved, plain


def batch_of(tiny, n):
    """The tiny model's arguments with n rows, all different."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: torch.randn(n, *value.shape[1:], generator=generator) if torch.is_tensor(value)
        and value.is_floating_point() and value.ndim else value.repeat_interleave(n, 0)[:n]
        if torch.is_tensor(value) and value.ndim else value
        for key, value in tiny.arguments().items()
    }  # fmt: skip


def compiled(model, how):
    """The model compiled in one of the ways that there are, and what runs it."""
    if how == "whole":
        return torch.compile(model, backend="eager", fullgraph=True)
    if how == "in place":
        model.compile(backend="eager", fullgraph=True)
    elif how == "repeated blocks":
        model._repeated_blocks = [type(model.transformer_blocks[0]).__name__]  # diffusers names none for DiT
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    elif how == "a function":
        return torch.compile(lambda **arguments: model(**arguments), backend="eager", fullgraph=True)
    return model


def random_sample(rng):
    names = rng.sample(sorted(ADAPTERS), rng.choice([0, 1, 1, 2, 3]))
    return [(name, rng.uniform(-1, 1)) if rng.random() < 0.5 else name for name in names] or None


@pytest.mark.parametrize("how", ONE_FAST)
def test_any_mix_weight_and_scale_runs_the_one_graph_and_gives_the_eager_result(how):
    reserved, plain = twins(DIT)
    run, rng = compiled(reserved, how), random.Random(3)
    arguments = batch_of(DIT, 6)
    output_of(run, DIT, **arguments)
    first = graphs()
    assert first > 0
    for step in range(8):
        if step % 4 == 3:
            chosen = rng.sample(sorted(ADAPTERS), 2)
            for model in (reserved, plain):
                sl.set_serial_lora(model, chosen, [0.5, -1.0])
        names = [random_sample(rng) for _ in range(rng.choice([1, 2, 3, 6]))]  # once, or several times over
        scale = rng.choice([1.0, 0.5, 0.0])
        got, wanted = [], []
        for model, runner, results in ((reserved, run, got), (plain, plain, wanted)):
            with sl.serial_lora_batch(model, names):
                results.append(output_of(runner, DIT, **arguments))
            with sl.serial_lora_scale(model, scale), sl.serial_lora_batch(model, names):
                results.append(output_of(runner, DIT, **arguments))
            with sl.serial_lora_scale(model, 0.5), sl.serial_lora_scale(model, -0.5):
                results.append(output_of(runner, DIT, **arguments))
            with sl.disable_serial_lora(model):
                results.append(output_of(runner, DIT, **arguments))
            results.append(output_of(runner, DIT, **arguments))
        for one, other in zip(got, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        assert graphs() == first
    assert not counters["graph_break"]


@pytest.mark.parametrize("room", [True, False], ids=["reserved", "not reserved"])
def test_alike_blocks_share_their_graphs(room):
    from diffusers import PixArtTransformer2DModel

    def compiles(adapt):
        torch._dynamo.reset()
        counters.clear()
        tiny = TINY["PixArtTransformer2DModel"]
        model = PixArtTransformer2DModel.from_config({**tiny.build().config, "num_layers": 12})
        adapt(model)
        output_of(compiled(model, "repeated blocks"), tiny)
        return graphs()

    def adapt(model):
        return sl.reserve_serial_lora(model, (4, 1)) if room else add_random_adapter(model)

    assert compiles(adapt) == compiles(lambda model: None) < 12


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_serves_a_batch_compiled_as_it_does_eager(name):
    tiny = TINY[name]
    reserved, plain = twins(tiny)
    run = torch.compile(reserved, backend="eager", fullgraph=True)
    base = output_of(run, tiny)
    names = ["a", {"b": 0.5, "c": 2.0}]
    try:
        with sl.serial_lora_batch(plain, names):
            wanted = output_of(plain, tiny)
    except sl.SerialLoraError:  # it has a batch of one, or folds other axes into it
        with sl.serial_lora_batch(reserved, names), pytest.raises(sl.SerialLoraError):
            output_of(run, tiny)
    else:
        with sl.serial_lora_batch(reserved, names):
            assert torch.allclose(output_of(run, tiny), wanted, atol=1e-5)
    with sl.serial_lora_scale(reserved, 0.5), sl.serial_lora_scale(plain, 0.5):
        sl.set_serial_lora(plain, "a")
        sl.set_serial_lora(reserved, "a")
        assert torch.allclose(output_of(run, tiny), output_of(plain, tiny), atol=1e-5)
    sl.set_serial_lora(reserved, [])
    assert torch.allclose(output_of(run, tiny), base, atol=1e-6)


@pytest.mark.parametrize("given", ["the pipeline", "the bare model"])
@pytest.mark.parametrize("how", ["whole", "in place", "repeated blocks"])
@pytest.mark.parametrize("images", [1, 2])
def test_guidance_and_images_per_prompt_in_a_compiled_pipeline_are_as_eager(how, images, given):
    pipes = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 16,
            "guidance_scale": 3.0, "num_images_per_prompt": images}  # fmt: skip
    for i, adapter in enumerate("ab"):
        add_random_adapter(pipes[1].transformer, adapter, seed=i, std=0.5)
    states = [sl.serial_lora_state_dict(pipes[1].transformer, adapter) for adapter in "ab"]
    sl.reserve_serial_lora(pipes[0], capacity=(4, 2))
    for adapter, state in zip("ab", states, strict=True):
        sl.load_serial_lora(pipes[0].transformer, state, adapter)
    bare = pipes[0].transformer
    if how == "whole":
        pipes[0].transformer = torch.compile(bare, backend="eager", fullgraph=True)
    else:
        compiled(bare, how)

    def draw(pipe, target):
        with sl.serial_lora_batch(target, ["a", ("b", 0.5)]):
            generator = torch.Generator().manual_seed(0)
            return pipe(prompt=["a cat", "a dog"], generator=generator, **call).images

    got = draw(pipes[0], pipes[0] if given == "the pipeline" else bare)
    assert torch.allclose(got, draw(pipes[1], pipes[1]), atol=1e-4)
    assert not counters["graph_break"]


def test_a_scale_among_a_compiled_pipelines_arguments_is_followed():
    pipes = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    add_random_adapter(pipes[1].transformer, "a", std=0.5)
    sl.reserve_serial_lora(pipes[0], capacity=(4, 1))
    pipes[0].transformer = torch.compile(pipes[0].transformer, backend="eager", fullgraph=True)
    sl.load_serial_lora(pipes[0], sl.serial_lora_state_dict(pipes[1]), "a")
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "max_sequence_length": 16}
    for scale in (1.0, 0.25, 0.0):
        got, wanted = (
            pipe("a cat", generator=torch.Generator().manual_seed(0), joint_attention_kwargs={"scale": scale}, **call)
            for pipe in pipes
        )
        assert torch.allclose(got.images, wanted.images, atol=1e-4)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the batch's size, remembered
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_follows_scales_mixes_and_changes(strict):
    reserved, plain = twins(DIT)
    arguments = batch_of(DIT, 4)
    with torch.no_grad():
        run = torch.export.export(reserved, (), arguments, strict=strict).module()

    def both(block):
        results = []
        for model, runner in ((reserved, run), (plain, plain)):
            with block(model):
                results.append(output_of(runner, DIT, **arguments))
        return results

    for names in (["a", None, ("b", 0.5), {"c": 1.0, "d": -0.5}], ["d", "a"], [None]):
        got, wanted = both(lambda model, names=names: sl.serial_lora_batch(model, names))
        assert torch.allclose(got, wanted, atol=1e-5)
    for chosen in (["a"], ["b", "c"], []):
        for model in (reserved, plain):
            sl.set_serial_lora(model, chosen)
        for scale in (1.0, 0.5, 0.0):
            got, wanted = both(lambda model, scale=scale: sl.serial_lora_scale(model, scale))
            assert torch.allclose(got, wanted, atol=1e-5)
    with sl.serial_lora_batch(reserved, ["a", "b", "c"]):  # which four rows do not hold
        assert output_of(run, DIT, **arguments).isnan().all()
    with sl.serial_lora_batch(reserved, ["a", "b"]), torch.no_grad():
        assert not output_of(run, DIT, **arguments).isnan().any()


@pytest.mark.slow  # a C++ compiler at work
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies its own tree specs
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the batch's size, remembered
def test_what_aotinductor_made_follows_scales_mixes_and_changes_once_it_knows_the_operands(tmp_path):
    """As docs/adapters.md has it."""
    reserved, plain = twins(DIT)
    arguments = batch_of(DIT, 4)
    with torch.no_grad():
        program = torch.export.export(reserved, (), arguments)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    operands = {name: buffer for name, buffer in reserved.named_buffers() if ".reserved." in name}
    run.load_constants(operands, check_full_update=False, user_managed=True)
    for names in (["a", None, ("b", 0.5), {"c": 1.0, "d": -0.5}], ["d", "a"], [None]):
        with sl.serial_lora_batch(reserved, names), sl.serial_lora_batch(plain, names):
            assert torch.allclose(output_of(run, DIT, **arguments), output_of(plain, DIT, **arguments), atol=1e-4), (
                names
            )
    for chosen, scale in ((["a"], 1.0), (["b", "c"], 0.5), ([], 1.0)):
        for model in (reserved, plain):
            sl.set_serial_lora(model, chosen)
        with sl.serial_lora_scale(reserved, scale), sl.serial_lora_scale(plain, scale):
            assert torch.allclose(output_of(run, DIT, **arguments), output_of(plain, DIT, **arguments), atol=1e-4), (
                chosen
            )


def test_what_finds_no_room_is_refused_compiled_and_served_eager():
    reserved, plain = twins(DIT, capacity=(4, 2), samples=3)
    arguments = batch_of(DIT, 4)
    for names in (["a", "b", "c"], ["a", "b", "a", "b"]):
        run = torch.compile(reserved, backend="eager", fullgraph=True)
        with sl.serial_lora_batch(plain, names[:4]) if len(names) == 4 else sl.disable_serial_lora(plain):
            wanted = output_of(plain, DIT, **arguments)
        if len(names) == 4:
            with sl.serial_lora_batch(reserved, names):
                assert torch.allclose(output_of(reserved, DIT, **arguments), wanted, atol=1e-5)
        before = output_of(run, DIT, **arguments)
        with pytest.raises(sl.SerialLoraError, match=r"reserve more|samples="), sl.serial_lora_batch(reserved, names):
            output_of(run, DIT, **arguments)
        assert torch.equal(output_of(run, DIT, **arguments), before)
        torch._dynamo.reset()
    for samples in (0, -1, True, 1.5, "4"):
        with pytest.raises(sl.SerialLoraError, match="samples must be"):
            sl.reserve_serial_lora(DIT.build(), capacity=(4, 2), samples=samples)


@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks", "every graph"])
def test_reserved_operands_that_a_graph_would_have_as_constants_are_refused(how):
    """Inductor's freezing; it is refused before anything is compiled."""
    reserved, plain = twins(DIT)
    arguments = batch_of(DIT, 2)
    options: Any = {} if how == "every graph" else {"freezing": True}
    run = torch.compile(reserved, options=options) if how in ("wrapper", "every graph") else reserved
    for module in {"in place": [reserved], "blocks": reserved.transformer_blocks}.get(how, []):
        module.compile(options=options)
    with inductor.patch(freezing=how == "every graph"):
        for _ in range(2):
            with pytest.raises(sl.SerialLoraError, match="freezing"), sl.serial_lora_batch(run, ["a", "b"]):
                output_of(run, DIT, **arguments)
    for module in reserved.modules():
        vars(module).pop("_compiled_call_impl", None)
    del run
    gc.collect()
    with sl.serial_lora_batch(reserved, ["a", "b"]), sl.serial_lora_batch(plain, ["a", "b"]):
        wanted = output_of(plain, DIT, **arguments)
        assert torch.allclose(output_of(reserved, DIT, **arguments), wanted, atol=1e-5)


@pytest.mark.parametrize("how", ["whole", "in place", "repeated blocks"])
def test_a_batch_that_does_not_hold_the_samples_is_refused(how):
    reserved, _ = twins(DIT)
    run = compiled(reserved, how)
    arguments = batch_of(DIT, 4)
    output_of(run, DIT, **arguments)
    with sl.serial_lora_batch(reserved, ["a", "b", "c"]), pytest.raises(sl.SerialLoraError, match="batch of 4"):
        output_of(run, DIT, **arguments)


@pytest.mark.parametrize("how", ONE_FAST[:3])
def test_threads_with_mixes_of_their_own_do_not_see_each_others(how):
    reserved, plain = twins(DIT)
    run = compiled(reserved, how)
    arguments = batch_of(DIT, 2)
    sl.set_serial_lora(reserved, "a", 0.5)
    sl.set_serial_lora(plain, "a", 0.5)
    output_of(run, DIT, **arguments)
    mixes = [["a", "b"], ["b", None], [("c", 0.5), "d"], None]

    def under(model, mix):
        return sl.serial_lora_scale(model, 1.0) if mix is None else sl.serial_lora_batch(model, mix)

    wanted = []
    for mix in mixes:
        with under(plain, mix):
            wanted.append(output_of(plain, DIT, **arguments))
    barrier = threading.Barrier(len(mixes))

    def serve(mix, right):
        barrier.wait(60)
        for _ in range(8):
            with under(reserved, mix):
                for _ in range(2):
                    assert torch.allclose(output_of(run, DIT, **arguments), right, atol=1e-5)

    with ThreadPoolExecutor(len(mixes)) as pool:
        for future in [pool.submit(serve, *pair) for pair in zip(mixes, wanted, strict=True)]:
            future.result()


@pytest.mark.parametrize("how", ONE_FAST[:3])
def test_verbs_of_another_thread_never_change_a_compiled_batch_that_runs(how):
    reserved, plain = twins(DIT)
    run = compiled(reserved, how)
    arguments = batch_of(DIT, 2)
    output_of(run, DIT, **arguments)
    state, stop = states_of(DIT, {"e": {"rank": 2}})["e"], threading.Event()
    with sl.serial_lora_batch(plain, ["a", "b"]):
        wanted = output_of(plain, DIT, **arguments)

    def vary():
        while not stop.is_set():
            sl.load_serial_lora(reserved, state, "e")
            sl.set_serial_lora(reserved, ["e", "c"], [0.5, 2.0])
            sl.delete_serial_lora(reserved, "e")

    with ThreadPoolExecutor(1) as pool:
        changes = pool.submit(vary)
        try:
            for _ in range(15):
                with sl.serial_lora_batch(reserved, ["a", "b"]):
                    assert torch.allclose(output_of(run, DIT, **arguments), wanted, atol=1e-5)
        finally:
            stop.set()
        changes.result()


def test_adapters_stay_where_they_are_while_there_is_room_and_are_moved_when_not():
    torch.manual_seed(0)
    matrices = {name: (torch.randn(r, 5), torch.randn(5, r)) for name, r in {"a": 3, "b": 2, "c": 4, "d": 1}.items()}
    held, x = Reserved(8, 4, 5, torch.zeros(())), torch.randn(2, 6, 5)
    for mix in (
        [{"a": 1.0}, {"b": 2.0}],
        [{"b": 1.0}, {"d": 1.0}],
        [{"c": 1.0, "a": 0.5}, {"d": -1.0}],
        [{}, {"c": 3.0}],
    ):
        before = {name: place.columns for name, place in held.placed.items()}
        assert held.fill(mix, 1, matrices.__getitem__)
        if "c" not in held.placed:  # four more rows are not free between the others
            assert before.items() <= {name: place.columns for name, place in held.placed.items()}.items()
        wanted = x.double().clone()
        for x_b, row, sample in zip(x.double(), wanted, mix, strict=True):
            for name, gain in sample.items():
                A, B = (matrix.double() for matrix in matrices[name])
                row.add_(gain * x_b @ A.T @ B.T)
        assert torch.allclose(held(x, 2).double(), wanted, atol=1e-4)
    matrices["c"][0].mul_(2)  # in place: what was copied is not what it holds any more
    held.fill([{"c": 1.0}], 1, matrices.__getitem__)
    assert torch.equal(held.A[held.placed["c"].columns], matrices["c"][0])
    assert not held.fill([{"a": 1.0, "b": 1.0, "c": 1.0}], 1, matrices.__getitem__)
    assert held(x, 2).isnan().all()
