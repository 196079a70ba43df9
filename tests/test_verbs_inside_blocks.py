"""Verbs inside scale, disable and batch blocks: the block goes on to hold, or the verb is refused; never in silence."""

from __future__ import annotations

import threading

import pytest
import torch

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of, traces
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline

DIT = TINY["DiTTransformer2DModel"]


def with_two():
    model = DIT.build()
    for i, name in enumerate("ab"):
        add_random_adapter(model, name, seed=i + 1)
    sl.set_serial_lora(model, "a")
    return model


BLOCKS = {
    "scale": lambda model: sl.serial_lora_scale(model, 0.5),
    "disable": sl.disable_serial_lora,
    "batch": lambda model: sl.serial_lora_batch(model, ["b", None]),
}


def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("block", list(BLOCKS))
def test_a_fuse_inside_a_block_is_refused(block):
    """Fused weights know no scale: the block's calls would have the adapter in full."""
    model = with_two()
    with BLOCKS[block](model):
        inside = output_of(model, DIT)
        with pytest.raises(sl.SerialLoraError, match="Cannot fuse inside"):
            sl.fuse_serial_lora(model)
        assert torch.equal(output_of(model, DIT), inside)
    sl.fuse_serial_lora(model)


@pytest.mark.parametrize("block", list(BLOCKS))
def test_a_fuse_by_another_thread_stops_the_calls_of_a_block(block):
    model = with_two()
    live = output_of(model, DIT)
    with BLOCKS[block](model):
        in_a_thread(lambda: sl.fuse_serial_lora(model))
        with pytest.raises(sl.SerialLoraError, match="fused while a block was open"):
            output_of(model, DIT)
        in_a_thread(lambda: sl.unfuse_serial_lora(model))
        output_of(model, DIT)
    assert torch.equal(output_of(model, DIT), live)


@pytest.mark.parametrize("remove", [lambda m: sl.delete_serial_lora(m, "b"), sl.unload_serial_lora])
def test_what_a_batch_names_cannot_go_away_inside_it(remove):
    model = with_two()
    with sl.serial_lora_batch(model, ["b", None]):
        inside = output_of(model, DIT)
        with pytest.raises(sl.SerialLoraError, match="Leave the block first"):
            remove(model)
        sl.delete_serial_lora(model, "a")  # which it does not name
        assert torch.equal(output_of(model, DIT), inside)
    remove(model)


def test_what_another_thread_takes_from_a_batch_is_missed():
    model = with_two()
    with sl.serial_lora_batch(model, ["b", "a"]):
        in_a_thread(lambda: sl.delete_serial_lora(model, "b"))
        with pytest.raises(sl.SerialLoraError, match=r"\['b'\] were removed while"):
            output_of(model, DIT)
        add_random_adapter(model, "b")
        output_of(model, DIT)
    with (
        pytest.raises(sl.SerialLoraError, match=r"'b'.* what ran since is the base's"),
        sl.serial_lora_batch(model, ["b", None]),
    ):
        in_a_thread(lambda: sl.unload_serial_lora(model))


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_a_block_holds_for_adapters_that_come_after_all_others_have_gone(factor):
    model, reference = with_two(), with_two()
    bare = traces(DIT.build())
    state = sl.serial_lora_state_dict(model, "b")
    sl.set_serial_lora(reference, "b", factor)
    with sl.serial_lora_scale(model, factor):
        sl.unload_serial_lora(model)
        assert {key: traces(model)[key] for key in ("keys", "types", "hooks")} == {
            key: bare[key] for key in ("keys", "types", "hooks")
        }
        sl.load_serial_lora(model, state, "b")
        assert torch.allclose(output_of(model, DIT), output_of(reference, DIT), atol=1e-6)
    sl.set_serial_lora(reference, "b")
    assert torch.allclose(output_of(model, DIT), output_of(reference, DIT), atol=1e-6)


def test_a_block_of_a_pipeline_holds_for_components_that_get_their_first_adapter_inside():
    pipe, other = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "a")
    add_random_adapter(other.text_encoder, "t", std=0.5)
    tokens = {"input_ids": torch.tensor([[0, 5, 6, 2]])}

    def read():
        with torch.no_grad():
            return pipe.text_encoder(**tokens)[0]

    base = read()
    with pipe.disable_serial_lora():
        sl.load_serial_lora(pipe.text_encoder, sl.serial_lora_state_dict(other.text_encoder), "t")
        assert torch.equal(read(), base)
    assert not torch.allclose(read(), base, atol=1e-3)
