"""The gradient start changes the start and nothing else, whatever happens; what cannot be started says why."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

import slora_diffusers as sl
from slora_diffusers.adapters import initialise
from slora_diffusers.core.pair import ROW_NORM
from slora_diffusers.core.state import registry_of
from slora_diffusers.files.format import AdapterFile
from tests.adapters import add_random_adapter, output_of
from tests.gradients import (
    DIT,
    SD3,
    Around,
    adapted,
    backward_of,
    equal,
    in_training,
    rows_of,
    same_span,
    starts_of,
    state_of,
)
from tests.tiny.pipelines import tiny_sd3_pipeline
from tests.tiny.vision import VISION


def test_the_model_computes_what_it_computed_to_the_bit():
    model = adapted()
    before = output_of(model, DIT)
    sl.initialize_serial_lora(model, backward_of(model))
    assert output_of(model, DIT).equal(before) and output_of(DIT.build(), DIT).equal(before)


def test_all_but_the_starts_is_what_it_was():
    model = in_training(dropout=0.5)
    seen = []

    def backward():
        seen.append((torch.rand(1).item(), random.random(), np.random.rand()))
        backward_of(model)()

    before = state_of(model)
    sl.initialize_serial_lora(model, backward)
    after = state_of(model)
    assert len(seen) == 2 and seen[0] == seen[1], "every pass sees the same draws"
    starts = {name for name in after["values"] if "lora_A" in name}
    assert starts and not any(equal(after["values"][name], before["values"][name]) for name in starts)
    for state in (before, after):
        state["values"] = {name: value for name, value in state["values"].items() if name not in starts}
    assert after.pop("configs")["default"].init == "gradient" and before.pop("configs")["default"].init == "kaiming"
    for part in before:
        assert equal(after[part], before[part]), part


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [0, 1])
def test_whatever_backward_raises_the_model_is_as_before_and_a_retry_is_a_first_try(raised, at):
    model, fresh = in_training(), in_training()
    before, calls = state_of(model), []

    def backward():
        calls.append(None)
        backward_of(model)()
        torch.rand(3)
        if len(calls) == at + 1:
            raise raised("stop")

    with pytest.raises(raised, match="stop"):
        sl.initialize_serial_lora(model, backward)
    after = state_of(model)
    for part in before:
        assert equal(after[part], before[part]), part
    sl.initialize_serial_lora(model, backward_of(model))
    sl.initialize_serial_lora(fresh, backward_of(fresh))
    assert equal(rows_of(model), rows_of(fresh))


def test_a_start_that_cannot_be_written_leaves_the_others_as_they_were(monkeypatch):
    model = adapted()
    before, write, written = state_of(model), initialise.put, []

    def failing(parameter, value):
        write(parameter, value)
        if value.dtype == torch.float64 and len(value) == 4 and value.norm(dim=1).sub(ROW_NORM).abs().max() < 1e-6:
            written.append(parameter)
            if len(written) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(initialise, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        sl.initialize_serial_lora(model, backward_of(model))
    after = state_of(model)
    assert len(written) == 2 and all(equal(after[part], before[part]) for part in before)


def test_dropout_of_the_adapter_and_of_the_model_is_off():
    quiet = Around(adapted()).eval()
    assert equal(starts_of(in_training(dropout=0.9)), starts_of(quiet))


def test_gradient_checkpointing_gives_the_same_start():
    plain, saving = adapted(SD3).train(), adapted(SD3).train()
    saving.enable_gradient_checkpointing()
    ours, theirs = (starts_of(model, backward_of(model, SD3)) for model in (saving, plain))
    same_span(ours, theirs)


def test_checkpointing_of_a_transformers_model_stays_on_while_its_dropout_is_off():
    tiny = VISION["ViTModel"]
    model = adapted(tiny).train()
    model.gradient_checkpointing_enable()
    modes = []
    model.register_forward_hook(lambda module, args, output: modes.append([m.training for m in module.modules()]))
    sl.initialize_serial_lora(model, backward_of(model, tiny))
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers and all(sum(mode) == len(layers) for mode in modes)
    plain = adapted(tiny)
    sl.initialize_serial_lora(plain, backward_of(plain, tiny))
    same_span(rows_of(model), rows_of(plain))


def test_another_adapter_beside_it_is_read_and_left_alone():
    """The gradient is that of the model as it runs: at the other adapter's point, which stays."""
    model = DIT.build()
    add_random_adapter(model, "first")
    first = rows_of(model, "first")
    torch.manual_seed(0)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=4), "second")
    for parameter in sl.serial_lora_parameters(model, "first"):
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
    sl.initialize_serial_lora(model, backward_of(model), "second")
    assert equal(rows_of(model, "first"), first)
    assert all(p.grad.eq(1).all() for p in sl.serial_lora_parameters(model, "first"))
    fused = DIT.build()  # the same base with the first adapter in its weights
    add_random_adapter(fused, "first")
    sl.fuse_serial_lora(fused)
    sl.unload_serial_lora(fused)
    torch.manual_seed(0)
    sl.add_serial_lora(fused, sl.SerialLoraConfig(rank=4), "second")
    loaded = registry_of(model).configs
    assert (loaded["first"].init, loaded["second"].init) == ("kaiming", "gradient")
    assert output_of(fused, DIT).allclose(output_of(model, DIT), atol=1e-4)


def test_an_adapter_added_with_this_start_says_what_it_is_until_it_is(caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "diffusers.slora_diffusers"):
        model = adapted(init="gradient")
    assert "default starts as kaiming until initialize_serial_lora() is called" in caplog.text
    assert equal(rows_of(model), rows_of(adapted(init="kaiming")))

    def recorded():
        path = sl.save_serial_lora(model, tmp_path)
        return AdapterFile.read(path).components["transformer"].config.init

    assert recorded() == "kaiming"
    sl.initialize_serial_lora(model, backward_of(model))
    assert recorded() == "gradient"
    loaded = DIT.build()
    sl.load_serial_lora(loaded, tmp_path)
    assert registry_of(loaded).configs["default"].init == "gradient" and equal(rows_of(loaded), rows_of(model))


def test_a_pipeline_starts_its_components_and_names_them():
    pipe = tiny_sd3_pipeline()
    sl.add_serial_lora(pipe, sl.SerialLoraConfig(rank=4))
    usual = rows_of(pipe.transformer)

    def backward():
        x, text, pooled = torch.ones(2, 4, 16, 16), torch.ones(2, 8, 32), torch.ones(2, 32)
        pipe.transformer(x, text, pooled, torch.tensor([1.0, 500.0])).sample.square().sum().backward()

    report = sl.initialize_serial_lora(pipe, backward)
    now = rows_of(pipe.transformer)
    assert {f"transformer.{key}" for key in now if not equal(now[key], usual[key])} == set(report.energies) != set()
    assert registry_of(pipe.transformer).configs["default"].init == "gradient"
    assert all(p.grad is None for p in pipe.transformer.parameters())


def trained(model):
    for parameter in sl.serial_lora_parameters(model):
        torch.nn.init.ones_(parameter)


def fused(model):
    trained(model)
    sl.fuse_serial_lora(model)


CANNOT = {
    "trained already": (trained, {}),
    "fused": (fused, {}),
    "is not active": (lambda model: sl.set_serial_lora(model, []), {}),
    "Unknown adapter": (lambda model: None, {"adapter_name": "another"}),
    "passes must be a whole number of at least 1; got 0": (lambda model: None, {"passes": 0}),
    "passes must be a whole number of at least 1; got True": (lambda model: None, {"passes": True}),
    "passes must be a whole number of at least 1; got 1.5": (lambda model: None, {"passes": 1.5}),
    "its scale is 0": (lambda model: sl.set_serial_lora(model, "default", 0.0), {}),
    "capacity reserved": (lambda model: sl.reserve_serial_lora(model, (4, 1)), {}),
}


@pytest.mark.parametrize("message", CANNOT)
def test_what_cannot_be_started_is_one_sentence_and_nothing_changes(message):
    model = adapted()
    prepare, arguments = CANNOT[message]
    prepare(model)
    before = state_of(model)
    with pytest.raises(sl.SerialLoraError, match=message):
        sl.initialize_serial_lora(model, backward_of(model), **arguments)
    after = state_of(model)
    assert all(equal(after[part], before[part]) for part in before)


def test_a_model_without_an_adapter_says_so():
    with pytest.raises(sl.AdapterStateError, match="has no Serial LoRA adapter"):
        sl.initialize_serial_lora(DIT.build(), lambda: None)


@pytest.mark.parametrize("what", ["nothing", "a disabled adapter", "gradients that are dropped"])
def test_a_backward_that_reaches_no_pair_is_an_error(what):
    model = adapted()

    def backward():
        if what == "a disabled adapter":
            with sl.disable_serial_lora(model):
                output = model(**DIT.arguments()).sample
            assert not output.requires_grad
        elif what == "gradients that are dropped":
            backward_of(model)()
            model.zero_grad()

    before = state_of(model)
    with pytest.raises(sl.SerialLoraError, match=r"No pair .* saw a gradient.*new head of zeros"):
        sl.initialize_serial_lora(model, backward)
    after = state_of(model)
    assert all(equal(after[part], before[part]) for part in before)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(factor):
    model = adapted()
    before = state_of(model)
    with pytest.raises(sl.SerialLoraError, match=r"gradient at 'transformer_blocks.0.* is not finite"):
        sl.initialize_serial_lora(model, lambda: (model(**DIT.arguments()).sample.sum() * factor).backward())
    after = state_of(model)
    assert all(equal(after[part], before[part]) for part in before)


def test_it_runs_where_gradients_are_off():
    expected = starts_of(adapted())
    for off in (torch.no_grad, torch.inference_mode):
        model = adapted()
        with off():
            sl.initialize_serial_lora(model, backward_of(model))
        assert equal(rows_of(model), expected)
