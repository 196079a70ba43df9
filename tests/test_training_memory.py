"""The benchmark of training memory counts on fake tensors what really is saved."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import training_memory
from benchmarks.tracing import saved_bytes
from slora_diffusers.training.precision import trainable

TINY = {
    "sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 4096,
    "caption_projection_dim": 32, "pooled_projection_dim": 2048, "pos_embed_max_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("adapter", ["serial", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_save_as_many_bytes_as_real_ones(adapter, checkpointing):
    with patch.object(training_memory, "SD3_MEDIUM", TINY):
        counted = training_memory.activation_bytes(adapter, 4, 128, 2, checkpointing)
        model: Any = training_memory.build(adapter, 4).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.02)
    if checkpointing:
        model.enable_gradient_checkpointing()
    text = torch.zeros(2, training_memory.TEXT_TOKENS, 4096, dtype=torch.bfloat16)
    inputs = (torch.zeros(2, 16, 16, 16, dtype=torch.bfloat16), text, torch.zeros(2, 2048, dtype=torch.bfloat16))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs, torch.ones(2)).sample.float().square().mean()

    real = saved_bytes(loss, [*model.parameters(), *model.buffers()])
    # A real autocast keeps its casts of the adapter's weights, which belong to no activation.
    casts = 2 * sum(parameter.numel() for _, parameter in trainable([model]))
    assert abs(real - counted) <= casts
    assert counted > 50_000


def test_optimizer_states_of_adamw_are_two_numbers_per_parameter():
    shapes = [torch.Size((16, 32)), torch.Size((32, 16))]
    states = training_memory.optimizer_bytes("adamw", shapes)
    assert states == 2 * 4 * 1024 + 2 * 4  # and a step count each


def test_the_table_has_a_row_for_everything_measured():
    one = {"parameters": 10, "activations": 4_000_000, "activations_checkpointed": 1_000_000}
    serial = {**one, "optimizer": {"adamw": 1, "adamw8bit": "missing", "schedulefree": 1, "prodigy": 1}}
    text = training_memory.table({"serial": serial, "lora": {**serial, "activations": 5_000_000}})
    assert "| saved activations | 4.0 | 5.0 | 0.80 |" in text and "| states of adamw8bit | not installed" in text


def test_the_documented_table_is_the_one_that_was_measured():
    results = json.loads((training_memory.RESULTS / "training_memory.json").read_text())
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    assert training_memory.table(results) in page
