"""ControlNets that are transformers: live, fused and saved adapters agree, alone and inside a pipeline's component."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import SD3MultiControlNetModel
from torch import nn

import slora_diffusers as sl
from slora_diffusers.core.sites import find_slots
from tests.adapters import add_random_adapter
from tests.tiny.models import TINY, flat_tensors

STEERS = {
    "SD3ControlNetModel": ("SD3Transformer2DModel", {}),
    "FluxControlNetModel": ("FluxTransformer2DModel", {}),
    "SanaControlNetModel": ("SanaTransformer2DModel", {}),
    "HunyuanDiT2DControlNetModel": ("HunyuanDiT2DModel", {"transformer_num_layers": 4, "conditioning_channels": 4}),
    "QwenImageControlNetModel": ("QwenImageTransformer2DModel", {}),
}
SINGLE = "SD3ControlNetModel/single"  # as SD3.5's 8B ControlNets: blocks without text


def build(name: str) -> nn.Module:
    """The ControlNet of a tiny transformer's own configuration, with numbers where it begins with zeros."""
    cls = getattr(diffusers, name.partition("/")[0])
    of, more = STEERS[name.partition("/")[0]]
    known = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in TINY[of].config.items() if key in known} | more
    if name == SINGLE:
        config |= {"joint_attention_dim": None, "dual_attention_layers": (), "qk_norm": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def output(model: nn.Module, name: str) -> torch.Tensor:
    given = TINY[STEERS[name.partition("/")[0]][0]].arguments()
    given["controlnet_cond"] = given["hidden_states"].flip(-1)
    if name == SINGLE:
        given.pop("encoder_hidden_states")
    known = inspect.signature(model.forward).parameters
    return torch.cat([t.flatten() for t in flat_tensors(model(**{k: v for k, v in given.items() if k in known}))])


@pytest.mark.parametrize("name", [*STEERS, SINGLE])
@pytest.mark.parametrize("optional", [False, True])
def test_live_fused_and_reloaded_adapters_agree(name, optional, tmp_path):
    model = build(name)
    base = output(model, name)
    names = list(dict.fromkeys(slot.pair.name for slot in find_slots(model)))
    inputs = names if optional else None
    add_random_adapter(model, inputs=inputs)
    live = output(model, name)
    assert (live - base).norm() > 1e-2 * base.norm()
    sl.save_serial_lora(model, tmp_path)
    sl.fuse_serial_lora(model)
    torch.testing.assert_close(output(model, name), live, rtol=1e-4, atol=1e-4 * float(live.abs().max()))
    sl.unfuse_serial_lora(model)
    sl.unload_serial_lora(model)
    assert torch.equal(output(model, name), base)
    sl.load_serial_lora(model, tmp_path)
    assert torch.equal(output(model, name), live)


def test_each_of_several_controlnets_in_one_model_is_adapted():
    nets = SD3MultiControlNetModel([build("SD3ControlNetModel") for _ in range(2)])  # pyright: ignore[reportArgumentType]
    report = sl.add_serial_lora(nets, sl.SerialLoraConfig(rank=2))
    assert report.pairs == 2 * sl.add_serial_lora(build("SD3ControlNetModel"), sl.SerialLoraConfig(rank=2)).pairs
