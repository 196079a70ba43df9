"""Threads: a forward has one state, a generation has one state or the verb is refused, and every save is whole."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline

DIT = TINY["DiTTransformer2DModel"]


def while_running(call, change, seconds=2.0, enough=10, patience=60.0):
    """What a call gives again and again in one thread, while another changes things; longer on a busy machine."""
    results, errors, stop = [], [], threading.Event()
    started = time.monotonic()

    def work():
        while not stop.is_set():
            results.append(call())

    def vary():
        try:
            while not stop.is_set():
                change()
        except Exception as error:
            errors.append(error)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work), pool.submit(vary)]
        time.sleep(seconds)
        while len(results) < enough and not errors and time.monotonic() < started + patience:
            time.sleep(0.1)
        stop.set()
        for future in futures:
            future.result()
    return results, errors


def is_one_of(result, states):
    return any(torch.allclose(result, state, atol=1e-5) for state in states)


@pytest.mark.parametrize("change", ["set", "fuse", "load", "first load"])
def test_a_forward_sees_one_state_whatever_another_thread_changes(change):
    model = DIT.build()
    other = DIT.build()
    add_random_adapter(other, "b", seed=2)
    state = sl.serial_lora_state_dict(other)
    base = output_of(model, DIT)
    if change == "first load":
        states = [base, output_of(other, DIT)]
    else:
        add_random_adapter(model, "a", seed=1)
        states = [base, output_of(model, DIT)]
        sl.load_serial_lora(model, state, "b")
        states.append(output_of(model, DIT))
        sl.delete_serial_lora(model, "b")

    def vary():
        if change == "set":
            sl.set_serial_lora(model, [])
            sl.set_serial_lora(model, "a")
        elif change == "fuse":
            sl.fuse_serial_lora(model)
            sl.unfuse_serial_lora(model)
        elif change == "load":
            sl.load_serial_lora(model, state, "b")
            sl.delete_serial_lora(model, "b")
        else:
            sl.load_serial_lora(model, state, "b")
            sl.unload_serial_lora(model)

    results, errors = while_running(lambda: output_of(model, DIT), vary)
    assert not errors
    wrong = [i for i, result in enumerate(results) if not is_one_of(result, states)]
    assert not wrong, f"{len(wrong)} of {len(results)} forwards are of neither state"
    assert len(results) >= 10


def test_a_change_during_anothers_generation_is_refused_and_changes_nothing():
    pipe = tiny_sd3_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for i, name in enumerate("ab"):
        add_random_adapter(pipe.transformer, name, seed=i, std=0.5)
    pipe.set_serial_lora("a")
    reached, go_on, own = threading.Event(), threading.Event(), []

    def wait(pipe, step, timestep, values):
        if step == 0:
            with pipe.serial_lora_scale(1.0):  # a context of its own thread is free
                own.append(pipe.serial_lora_status()["transformer"].active)
            reached.set()
            assert go_on.wait(60)
        return {}

    def draw(callback=None):
        call = {"callback_on_step_end": callback} if callback else {}
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", height=32, width=32, num_inference_steps=2, max_sequence_length=16, output_type="latent",
                    generator=generator, **call).images  # fmt: skip

    wanted = draw()
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(draw, wait)
        assert reached.wait(60)
        for verb in (
            lambda: pipe.set_serial_lora("b"),
            lambda: sl.set_serial_lora(pipe.transformer, "b"),
            pipe.fuse_serial_lora,
            pipe.unload_serial_lora,
            lambda: pipe.delete_serial_lora("b"),
            lambda: pipe.load_serial_lora(sl.serial_lora_state_dict(pipe, "a"), adapter_name="c"),
        ):
            with pytest.raises(sl.SerialLoraError, match="Another thread is generating"):
                verb()
        with pipe.disable_serial_lora():
            pass
        go_on.set()
        assert torch.equal(generation.result(), wanted)
    assert own == [["a"]]
    pipe.set_serial_lora("b")
    assert not torch.allclose(draw(), wanted, atol=1e-3)


def test_a_callback_may_change_adapters_of_its_own_generation():
    pipe = tiny_sd3_pipeline()
    pipe.set_progress_bar_config(disable=True)
    add_random_adapter(pipe.transformer, "a", std=0.5)

    def off(pipe, step, timestep, values):
        pipe.set_serial_lora([])
        return {}

    pipe("a cat", height=32, width=32, num_inference_steps=2, max_sequence_length=16, output_type="latent",
         callback_on_step_end=off)  # fmt: skip
    assert pipe.serial_lora_status()["transformer"].active == []


def test_threads_that_save_into_one_folder_lose_no_file(tmp_path):
    model = DIT.build()
    for i in range(4):
        add_random_adapter(model, f"a{i}", seed=i)

    def save(number):
        name = f"a{number % 4}"
        return number, sl.save_serial_lora(model, tmp_path, name, weight_name=f"{name}_{number % 8}.safetensors")

    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(save, range(160)))
    assert all(path.is_file() for _, path in saved)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for _, path in saved}
    for number, path in saved:
        wanted = sl.serial_lora_state_dict(model, f"a{number % 4}")
        fresh = DIT.build()
        sl.load_serial_lora(fresh, path)
        read = sl.serial_lora_state_dict(fresh)
        assert all(torch.equal(read[key], wanted[key]) for key in wanted)


def test_verbs_of_many_threads_come_one_after_another():
    model = DIT.build()
    other = DIT.build()
    add_random_adapter(other)
    state = sl.serial_lora_state_dict(other)

    def come_and_go(number):
        for _ in range(3):
            sl.load_serial_lora(model, state, f"t{number}")
            sl.set_serial_lora(model, f"t{number}", 0.5)
            sl.delete_serial_lora(model, f"t{number}")

    add_random_adapter(model, "stays")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(come_and_go, range(6)))
    assert list(sl.serial_lora_status(model).adapters) == ["stays"]


@pytest.mark.parametrize("verb", ["add", "load"])
def test_first_adapters_of_many_threads_are_all_there(verb):
    model, other = DIT.build(), DIT.build()
    add_random_adapter(other)
    state, together = sl.serial_lora_state_dict(other), threading.Barrier(6)

    def come(number):
        together.wait()
        if verb == "add":
            sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2), f"t{number}")
        else:
            sl.load_serial_lora(model, state, f"t{number}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(come, range(6)))
    status = sl.serial_lora_status(model)
    assert sorted(status.adapters) == sorted(status.active) == [f"t{number}" for number in range(6)]
    assert all(adapter["pairs"] == len(DIT.build().transformer_blocks) for adapter in status.adapters.values())


def test_of_threads_that_load_under_one_name_one_succeeds():
    model, other = DIT.build(), DIT.build()
    add_random_adapter(other)
    state, together, refused = sl.serial_lora_state_dict(other), threading.Barrier(4), []

    def come(_):
        together.wait()
        try:
            sl.load_serial_lora(model, state, "one")
        except sl.SerialLoraError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come, range(4)))
    assert len(refused) == 3 and all("'one' is taken" in message for message in refused)
    assert torch.equal(output_of(model, DIT), output_of(other, DIT))


def test_a_forward_that_waited_while_its_hooks_came_and_went_is_the_bases():
    """PyTorch takes a forward's hooks from one list, at its start, and whether one takes kwargs from another, later."""
    model = DIT.build()
    wanted = output_of(model, DIT)

    def come_and_go(module, args):
        module._forward_pre_hooks_with_kwargs.clear()

    model.register_forward_pre_hook(come_and_go)
    add_random_adapter(model, "a", std=0.5)
    sl.set_serial_lora(model, [])
    assert torch.equal(output_of(model, DIT), wanted)
