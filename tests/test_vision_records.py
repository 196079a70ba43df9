"""Vision transformers and text encoders: live == fused == exported, where the exported is PEFT's arithmetic by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from slora_diffusers import (
    SerialLoraConfig,
    add_serial_lora,
    disable_serial_lora,
    export_lora,
    fuse_serial_lora,
    load_serial_lora,
    save_serial_lora,
    serial_lora_state_dict,
    unfuse_serial_lora,
    unload_serial_lora,
)
from slora_diffusers.core.sites import find_slots
from slora_diffusers.records.registry import ARCHITECTURES
from slora_diffusers.records.vision import RECORDS
from tests.tiny.vision import VISION, timm

RANK, ALPHA = 3, 2.1


def add_random_adapter(model: nn.Module, inputs: tuple[str, ...] | None) -> None:
    """An adapter whose B is not zero, of a size that changes the output visibly."""
    add_serial_lora(model, SerialLoraConfig(rank=RANK, alpha=ALPHA, inputs=inputs))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4


def fuse_by_hand(model: nn.Module, adapted: nn.Module) -> int:
    """W <- W + s (W B) A in float64, the LoRA of each projection, from the parameters' names alone."""
    count = 0
    for name, A in adapted.named_parameters():
        if ".lora_A_" not in f".{name}":
            continue
        path, _, rest = f".{name}".partition(".serial_lora.")
        pair = rest.partition(".")[0]
        B = adapted.get_parameter(name.replace("lora_A_", "lora_B_"))
        for weight in projections(model.get_submodule(path[1:]), pair):
            W = weight.data.double()
            weight.data = (W + ALPHA / RANK * (W @ B.double()) @ A.double()).float()
            count += 1
    return count


QKV = ("q_proj", "k_proj", "v_proj", "qkv", "q", "k", "v", "in_proj_weight")
READS = {
    "hidden_states": QKV,
    "attention_output": ("o_proj", "out_proj", "proj", "o"),
    "feed_forward": ("fc1", "lin1", "proj_in", "gate_proj", "up_proj", "wi", "wi_0", "wi_1", "fc1_g", "fc1_x"),
    "encoder_hidden_states": ("k", "v"),
    "reduced_states": ("k_proj", "v_proj"),
    "query": ("q_proj_weight",),
    "key": ("k_proj_weight",),
    "value": ("v_proj_weight",),
}


def projections(site: nn.Module, pair: str) -> list[nn.Parameter]:
    """The weights that a pair feeds, by what such modules are called; independent of the records."""
    found = []
    names = READS[pair]
    if pair == "hidden_states" and "serial_lora_queries" in site.__dict__:
        names = ("q", "q_proj")
    for name in names:
        target = getattr(site, name, None)
        if target is not None:
            found.append(target if isinstance(target, nn.Parameter) else target.weight)
    return found


def mark_queries(model: nn.Module) -> None:
    """Note the attentions whose keys and values read something else than their queries."""
    for name, module in model.named_modules():
        if name.endswith("EncDecAttention") or type(module).__name__ == "SegformerAttention":
            module.__dict__["serial_lora_queries"] = True


def error(got: Tensor, expected: Tensor, base: Tensor) -> float:
    """Size of the difference, relative to what the adapter changes."""
    return ((got - expected).norm() / (expected - base).norm()).item()


@pytest.mark.parametrize("every", [False, True], ids=["default", "all-pairs"])
@pytest.mark.parametrize("name", VISION)
def test_live_equals_fused_equals_the_lora_by_hand(name: str, every: bool):
    tiny = VISION[name]
    model = tiny.build()
    reference, state, base = copy.deepcopy(model), copy.deepcopy(model.state_dict()), tiny.run(model)
    mark_queries(reference)
    add_random_adapter(model, tuple(dict.fromkeys(s.pair.name for s in find_slots(model))) if every else None)
    assert fuse_by_hand(reference, model) > 0
    expected = tiny.run(reference)
    assert (expected - base).norm() > 0.01 * base.norm()

    assert error(tiny.run(model), expected, base) < 1e-3
    fuse_serial_lora(model)
    assert error(tiny.run(model), expected, base) < 1e-3
    unfuse_serial_lora(model)
    with disable_serial_lora(model):
        assert torch.equal(tiny.run(model), base)
    unload_serial_lora(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "CLIPModel", "timm/vit", "T5Model", "nn.MultiheadAttention"]
)
def test_saved_adapter_loads_into_another_copy_of_the_base(name: str, tmp_path):
    tiny = VISION[name]
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
