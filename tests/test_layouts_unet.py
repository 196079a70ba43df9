"""LoRAs of Stable Diffusion's UNets: diffusers' names old and new, kohya's, and those of the original code."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.convert.layouts.read import read_lora
from slora_diffusers.core.sites import find_slots
from tests.adapters import add_random_adapter

pytestmark = pytest.mark.filterwarnings("ignore:The state dict is of PEFT and has no adapter_config.json")


def pipeline():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=unet, **none, requires_safety_checker=False)


def sgm(path):
    """The original name of an attention: two resnets a level and a sampler between count the blocks."""
    if match := re.match(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.*)", path):
        level, layer = int(match[2]), int(match[3])
        down = match[1] == "down"
        block = f"input_blocks_{1 + 3 * level + layer}" if down else f"output_blocks_{3 * level + layer}"
        return f"lora_unet_{block}_1_{match[4].replace('.', '_')}"
    return f"lora_unet_middle_block_1_{path.removeprefix('mid_block.attentions.0.').replace('.', '_')}"


def processor(path):
    """diffusers' first LoRAs were attention processors."""
    if match := re.fullmatch(r"(.*attn\d)\.(to_[qkv]|to_out)(\.0)?", path):
        return f"unet.{match[1]}.processor.{match[2]}_lora"
    return f"unet.{path}.lora"


AB = (".lora_A.weight", ".lora_B.weight", False)
KOHYA = (".lora_down.weight", ".lora_up.weight", True)
LAYOUTS = {
    "diffusers": (lambda path: f"unet.{path}", *AB),
    "diffusers' first": (processor, ".down.weight", ".up.weight", False),
    "PEFT": (lambda path: f"base_model.model.{path}", *AB),
    "PEFT of the first scripts": (lambda path: f"unet.base_model.model.{path}", *AB),
    "kohya": (lambda path: f"lora_unet_{path.replace('.', '_')}", *KOHYA),
    "kohya, the original names": (sgm, *KOHYA),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_whole(layout):
    pipe = pipeline()
    name, down, up, alpha = LAYOUTS[layout]
    tensors, wanted = {}, {}
    generator = torch.Generator().manual_seed(0)
    for slot in find_slots(pipe.unet):
        for projection in slot.projections:
            path, linear = slot.called(projection), projection.owner
            A = torch.randn(2, linear.in_features, generator=generator)
            B = torch.randn(linear.out_features, 2, generator=generator)
            tensors |= {name(path) + down: A, name(path) + up: B}
            tensors |= {f"{name(path)}.alpha": torch.tensor(4.0)} if alpha else {}
            wanted[path] = (2 if alpha else 1) * B @ A
    lora = read_lora(tensors, {"unet": pipe.unet}, pipeline=pipe)
    assert not lora.unknown
    assert not lora.rest
    assert set(lora.parts["unet"]) == set(wanted)
    for path, part in lora.parts["unet"].items():
        change = part.change()
        torch.testing.assert_close(change.B @ change.A, wanted[path])


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_an_exported_file_is_loaded_by_stock_and_compressed_back(format, tmp_path):
    pipe, stock, back = pipeline(), pipeline(), pipeline()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    add_random_adapter(pipe.unet, inputs=["hidden_states", "encoder_hidden_states", "attention_output"])
    sl.export_lora(pipe, tmp_path, format=format)
    stock.load_lora_weights(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert sl.compress_lora(back, tmp_path, rank=4).relative_error < 1e-5
    with torch.no_grad():
        wanted = pipe.unet(*inputs).sample
        for other in (stock, back):
            torch.testing.assert_close(other.unet(*inputs).sample, wanted, atol=1e-5, rtol=1e-5)
