"""Quantized bases train, load and run with their weights untouched; a fuse says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

TINY_SD3 = TINY["SD3Transformer2DModel"]


def replace_linears(model, make):
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "transformer_blocks" in name:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = make(linear).requires_grad_(False)
    return model


def nf4(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        quantized = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
        )
        quantized.load_state_dict(linear.state_dict())
        return quantized.to("cpu")

    return replace_linears(model, make)


def int8_bitsandbytes(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        quantized = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        quantized.load_state_dict(linear.state_dict())
        return quantized.to("cpu")

    return replace_linears(model, make)


def int8_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "transformer_blocks" in name,
    )
    return model


def gguf_q8(model):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(linear):
        width = linear.in_features
        if width % 32:  # Q8_0 stores blocks of 32
            return linear
        quantized = GGUFLinear(width, linear.out_features, linear.bias is not None, compute_dtype=torch.float32)
        data = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        quantized.weight = GGUFParameter(data, quant_type=kind)  # pyright: ignore[reportCallIssue] (its __new__)
        quantized.bias = linear.bias
        return quantized

    return replace_linears(model, make)


def stored_bytes(model):
    """Every stored number of the base, by name: of a quantized weight, its codes and scales."""
    found = {}
    for name, p in model.named_parameters():
        if "serial_lora" in name:
            continue
        parts = [getattr(p, part) for part in getattr(p, "tensor_data_names", [])] or [p.data]
        parts += [p.SCB] if getattr(p, "SCB", None) is not None else []
        found[name] = [part.detach().clone() for part in parts if isinstance(part, torch.Tensor)]
    return found


@pytest.mark.parametrize("quantize", [nf4, int8_bitsandbytes, int8_torchao, gguf_q8])
def test_a_quantized_base_trains_saves_and_loads_untouched(quantize, tmp_path):
    if quantize is gguf_q8:
        tiny = TINY["DiTTransformer2DModel"]
        tiny = type(tiny)({**tiny.config, "num_attention_heads": 4}, tiny.inputs, class_name=tiny.class_name)
    else:
        tiny = TINY_SD3
    model = quantize(tiny.build())
    base = output_of(model, tiny)
    stored = stored_bytes(model)
    site = model.transformer_blocks[0].get_submodule("attn1" if quantize is gguf_q8 else "attn")
    assert type(site.to_q.weight) is not nn.Parameter

    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=4))
    assert torch.equal(output_of(model, tiny), base)
    parameters = sl.serial_lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (model(**tiny.arguments())[0] - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype is torch.float32 for p in parameters)
    trained = output_of(model, tiny)

    sl.save_serial_lora(model, tmp_path)
    fresh = quantize(tiny.build())
    sl.load_serial_lora(fresh, tmp_path)
    assert torch.allclose(output_of(fresh, tiny), trained, atol=1e-4)
    with pytest.raises(sl.SerialLoraError, match="Keep the adapter live"):
        sl.fuse_serial_lora(fresh)
    assert torch.allclose(output_of(fresh, tiny), trained, atol=1e-4)
    sl.unload_serial_lora(model)
    for name, parts in stored_bytes(model).items():
        assert all(torch.equal(a, b) for a, b in zip(parts, stored[name], strict=True)), name
    assert torch.equal(output_of(model, tiny), base)


def test_an_adapter_of_the_full_base_loads_into_its_quantized_twin(tmp_path):
    full = TINY_SD3.build()
    add_random_adapter(full)
    sl.save_serial_lora(full, tmp_path)
    model = nf4(TINY_SD3.build())
    base = output_of(model, TINY_SD3)
    sl.load_serial_lora(model, tmp_path)
    change, wanted = (
        output_of(model, TINY_SD3) - base,
        output_of(full, TINY_SD3) - output_of(TINY_SD3.build(), TINY_SD3),
    )
    assert torch.nn.functional.cosine_similarity(change, wanted, dim=0) > 0.9
