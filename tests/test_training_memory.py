"""The benchmark of training memory counts on fake tensors what really is saved."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import training_memory
from benchmarks.tracing import PeakBytes, saved_bytes
from slora_diffusers.training.precision import trainable

TINY = {
    "sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 4096,
    "caption_projection_dim": 32, "pooled_projection_dim": 2048, "pos_embed_max_size": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(training_memory.MODELS, "SD3-medium", ("SD3Transformer2DModel", TINY))


def real(adapter, checkpointing=False):
    """The tiny model with numbers in it."""
    model: Any = training_memory.build(adapter, 4).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.02)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


@pytest.mark.parametrize("adapter", ["serial", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_save_as_many_bytes_as_real_ones(adapter, checkpointing):
    counted = training_memory.activation_bytes(adapter, 4, 128, 2, checkpointing)
    model = real(adapter, checkpointing)
    inputs = training_memory.arguments(model, 128, 2)
    found = saved_bytes(lambda: training_memory.loss_of(model, inputs), [*model.parameters(), *model.buffers()])
    # A real autocast keeps its casts of the adapter's weights, which belong to no activation.
    casts = 2 * sum(parameter.numel() for _, parameter in trainable([model]))
    assert abs(found - counted) <= casts
    assert counted > 50_000


@pytest.mark.parametrize("adapter", ["serial", "lora"])
@pytest.mark.parametrize("way", training_memory.WAYS)
def test_fake_tensors_peak_where_real_ones_do(adapter, way):
    settings = training_memory.WAYS[way]
    model = real(adapter)
    casts = 2 * sum(parameter.numel() for _, parameter in trainable([model]))
    measured = training_memory.peak_bytes(model, 128, 2, **settings)
    fake = training_memory.build(adapter, 4)
    with FakeTensorMode():
        training_memory.to_fake_cpu(fake)
        counted = training_memory.peak_bytes(fake, 128, 2, **settings)
    assert abs(measured - counted) <= 0.01 * measured + 2 * casts


def test_the_most_bytes_at_a_time_are_those_of_what_is_alive():
    held, elsewhere = torch.zeros(1000), torch.zeros(10_000)
    with PeakBytes([held, held[:10]], [elsewhere]) as peak:
        assert (peak.now, peak.peak) == (4000, 4000)
        a = held + 1
        b = a.view(10, 100).t()
        del a
        assert peak.now == 8000  # a view keeps its storage
        c = elsewhere[:500] * 2
        del b
        assert (peak.now, peak.peak) == (6000, 10_000)
        c.add_(1)
        assert (peak.now, peak.peak) == (6000, 10_000)
    del c


def test_every_way_saves_what_it_is_for():
    peaks = {}
    for way, settings in training_memory.WAYS.items():
        model = training_memory.build("serial", 4)
        with FakeTensorMode():
            training_memory.to_fake_cpu(model)
            peaks[way] = training_memory.peak_bytes(model, 256, 1, **settings)
    blocks = training_memory.build("serial", 4).transformer_blocks
    weights = sum(2 * p.numel() for p in blocks.parameters() if not p.requires_grad)
    assert peaks["--gradient_checkpointing"] < peaks["bf16"]
    assert peaks["and --quantize fp8"] < peaks["--gradient_checkpointing"]
    assert peaks["and --offload blocks"] < peaks["--gradient_checkpointing"] - 0.4 * weights  # one of two is there
    assert peaks["--offload blocks alone"] < peaks["bf16"] - 0.9 * weights


def test_optimizer_states_of_adamw_are_two_numbers_per_parameter():
    shapes = [torch.Size((16, 32)), torch.Size((32, 16))]
    states = training_memory.optimizer_bytes("adamw", shapes)
    assert states == 2 * 4 * 1024 + 2 * 4  # and a step count each


def test_the_table_has_a_row_for_everything_measured():
    one = {"parameters": 10, "activations": 4_000_000, "activations_checkpointed": 1_000_000}
    serial = {**one, "optimizer": {"adamw": 1, "adamw8bit": "missing", "schedulefree": 1, "prodigy": 1}}
    text = training_memory.table({"serial": serial, "lora": {**serial, "activations": 5_000_000}})
    assert "| saved activations | 4.0 | 5.0 | 0.80 |" in text and "| states of adamw8bit | not installed" in text


def test_the_table_of_peaks_names_every_model_and_way():
    text = training_memory.peaks_table()
    for name in training_memory.MODELS:
        assert name in text
    for way in ("`--gradient_checkpointing`", "`--quantize fp8`", "`--offload blocks`", "`--quantize nf4` (counted)"):
        assert way in text
    assert text.count("\n") == 1 + 6 + 2 + 1
