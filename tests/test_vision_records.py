"""Vision transformers and text encoders: live == fused == exported, where the exported is PEFT's arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from slora_diffusers import (
    export_lora,
    load_serial_lora,
    save_serial_lora,
    serial_lora_state_dict,
)
from slora_diffusers.records.registry import ARCHITECTURES
from slora_diffusers.records.vision import RECORDS
from tests.lora_by_hand import add_random_adapter, all_pairs, check_live_fused_and_by_hand, error
from tests.tiny.text import TEXT
from tests.tiny.vision import VISION, timm


@pytest.mark.parametrize("every", [False, True], ids=["default", "all-pairs"])
@pytest.mark.parametrize("name", VISION)
def test_live_equals_fused_equals_the_lora_by_hand(name: str, every: bool):
    check_live_fused_and_by_hand(VISION[name], all_pairs if every else lambda model: None)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "CLIPModel", "timm/vit", "T5Model", "nn.MultiheadAttention"]
)
def test_saved_adapter_loads_into_another_copy_of_the_base(name: str, tmp_path):
    tiny = (VISION | TEXT)[name]
    model, other = tiny.build(), tiny.build()
    add_random_adapter(model, None)
    save_serial_lora(model, tmp_path)
    load_serial_lora(other, tmp_path)
    assert torch.equal(tiny.run(other), tiny.run(model))


@pytest.mark.parametrize("name", ["Dinov2Model", "timm/eva02", "SamVisionModel", "SwinForImageClassification"])
def test_gradients_reach_the_pairs_and_nothing_else(name: str):
    tiny = VISION[name]
    model = tiny.build()
    add_random_adapter(model, None)
    model.train()
    output = model(**tiny.arguments())
    (output if isinstance(output, Tensor) else output[0]).float().pow(2).sum().backward()
    for key, parameter in model.named_parameters():
        trained = ".serial_lora." in key
        assert parameter.requires_grad == trained, key
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, key


def test_adapter_of_a_backbone_serves_the_model_with_a_head():
    backbone, classifier = VISION["Dinov2Model"].build(), VISION["Dinov2ForImageClassification"].build()
    add_random_adapter(backbone, None)
    classifier.dinov2.load_state_dict(VISION["Dinov2Model"].build().state_dict())
    load_serial_lora(classifier.dinov2, serial_lora_state_dict(backbone))
    arguments = VISION["Dinov2Model"].arguments()
    with torch.no_grad():
        expected = backbone(**arguments).last_hidden_state
        hidden = classifier.dinov2(**arguments).last_hidden_state
    assert torch.equal(hidden, expected)


def test_self_attention_keeps_q_k_v_one_tensor():
    """PyTorch takes its fast path only where query is key is value; a pair must not end that."""
    seen = []
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    add_random_adapter(attention, None)
    attention.register_forward_pre_hook(lambda m, args: seen.append(args[0] is args[1] is args[2]))
    x = torch.randn(1, 4, 16)
    attention(x, x, x)
    assert seen == [True]


def test_every_class_of_the_records_is_in_a_tiny_model():
    found = set()
    for tiny in VISION.values():
        found |= {c.__name__ for module in tiny.build().modules() for c in type(module).__mro__}
    assert {name for record in RECORDS for name in record.models} - found == set()
    assert all(ARCHITECTURES[name] in RECORDS for record in RECORDS for name in record.models)


def test_timm_imports_without_torchvision():
    assert timm().__version__


PAST_THE_LINEAR = ("timm/eva02", "timm/beit", "timm/swinv2")
"""Attentions that read `qkv.weight` without calling the Linear: a LoRA on it does nothing until it is merged."""


@pytest.mark.parametrize(
    "name",
    [name for name in VISION if not name.startswith("nn.") and "/" not in name.removeprefix("timm/")],
)
def test_stock_peft_reproduces_the_adapter_from_its_export(name: str, tmp_path):
    tiny = VISION[name]
    model = tiny.build()
    base = tiny.run(model)
    add_random_adapter(model, None)
    export_lora(model, tmp_path, format="peft")
    stock = PeftModel.from_pretrained(tiny.build(), tmp_path)
    if name in PAST_THE_LINEAR:
        assert torch.equal(tiny.run(stock), base)
        stock = stock.merge_and_unload()
    assert error(tiny.run(stock), tiny.run(model), base) < 1e-3
