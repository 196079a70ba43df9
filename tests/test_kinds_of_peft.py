"""Every kind of adapter that PEFT saves is what PEFT merges, on convolutions too, or is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import slora_diffusers as sl
from slora_diffusers.convert.describe import describe_lora
from slora_diffusers.convert.layouts.read import read_lora
from tests.test_layouts_unet import pipeline
from tests.tiny.models import TINY

TARGETS = ["to_q", "to_v", "to_out.0"]
CONVOLUTIONS = ["to_q", "proj_in", "conv1", "conv_in", "conv_shortcut", "conv"]


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 5, "target_modules": TARGETS, **settings})


def of_convolutions(kind, **settings):
    return kind(target_modules=CONVOLUTIONS, **settings)


EFFECTIVE = {"alpha": 3, "init_weights": False, "use_effective_conv2d": True}
READ = {
    "LoRA, gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, mica": lora(init_lora_weights="mica"),
    "LoRA, ranks and alphas by pattern": lora(
        use_rslora=True,
        rank_pattern={"to_q": 2, "^transformer_blocks.0.attn1.to_v": 6},
        alpha_pattern={"to_v": 3},
    ),
    "LoRA, some layers": lora(layers_to_transform=[1], layers_pattern="transformer_blocks"),
    "LoRA, convolutions": of_convolutions(peft.LoraConfig, r=3, lora_alpha=5),
    "DoRA, convolutions": of_convolutions(peft.LoraConfig, r=3, lora_alpha=5, use_dora=True),
    "LoHa, convolutions": of_convolutions(peft.LoHaConfig, r=2, alpha=3, init_weights=False),
    "LoHa, convolutions with a core": of_convolutions(peft.LoHaConfig, r=2, **EFFECTIVE),
    "LoKr, convolutions": of_convolutions(peft.LoKrConfig, r=2, alpha=3, init_weights=False),
    "LoKr, convolutions with a core": of_convolutions(peft.LoKrConfig, r=2, **EFFECTIVE),
    "LoKr, all factored": of_convolutions(peft.LoKrConfig, r=1, decompose_both=True, decompose_factor=2, **EFFECTIVE),
    "OFT, convolutions": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["to_q", "proj_in", "conv1"]),
}
REFUSED = {
    "PiSSA": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "PiSSA, fast": (lora(init_lora_weights="pissa_niter_4"), "takes a part out of the base's weights"),
    "OLoRA": (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "KaSA": (lora(kasa_config=peft.tuners.lora.config.KasaConfig()), "kasa_config of its config"),
    "VeRA": (peft.VeraConfig(r=4, target_modules=["to_q"]), "type VERA"),
    "AdaLoRA": (
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
        "type ADALORA, and LORA, LOHA, LOKR, OFT are read",
    ),
    "IA3": (peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), "type IA3"),
}


def build(name):
    return pipeline().unet if "convolutions" in name or "factored" in name else TINY["DiTTransformer2DModel"].build()


def weights(model):
    return {name.removesuffix(".weight"): W.detach().double().clone() for name, W in model.state_dict().items()}


def adapted(model, config):
    """A stock PEFT model with a random adapter."""
    wrapped = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = 0.0 if "magnitude" in name else 0.1 * torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter.data * (1 + 0.1 * torch.rand(parameter.shape, generator=draw)) + noise
    return wrapped


@pytest.mark.parametrize("name", READ)
def test_the_change_is_what_peft_merges(name, tmp_path):
    base, wrapped = weights(build(name)), adapted(build(name), READ[name])
    wrapped.save_pretrained(tmp_path)
    merged = weights(wrapped.merge_and_unload())
    read = read_lora(tmp_path, {"unet": build(name)})
    changed = {path for path, W in merged.items() if not torch.equal(W, base[path])}
    assert changed
    assert not read.rest and not read.unknown
    assert set(read.parts["unet"]) == changed
    for path, part in read.parts["unet"].items():
        change, wanted = part.change(), merged[path] - base[path]
        dW = (change.B.double() @ change.A.double().flatten(1)).reshape(wanted.shape)
        assert torch.linalg.norm(dW - wanted) < 5e-5 * torch.linalg.norm(wanted), path


@pytest.mark.parametrize("name", REFUSED)
def test_what_its_matrices_alone_do_not_tell_is_refused_and_described(name, tmp_path):
    config, message = REFUSED[name]
    adapted(build(name), config).save_pretrained(tmp_path)
    model = build(name)
    with pytest.raises(sl.SerialLoraError, match=message):
        sl.compress_lora(model, tmp_path, rank=4)
    assert not sl.serial_lora_status(model).adapters


def test_inspect_says_what_cannot_be_read(tmp_path):
    adapted(build(""), REFUSED["PiSSA"][0]).save_pretrained(tmp_path)
    report = describe_lora(tmp_path, build(""))
    assert report.kinds == {"LoRA": 6}
    assert report.carried is None
    assert report.obstacle is not None and "init_lora_weights='pissa'" in report.obstacle


def test_diffusers_metadata_are_asked_as_well(tmp_path):
    tensors = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{x}.weight": torch.ones(16, 16) for x in "AB"}
    header = {"transformer.r": 16, "transformer.lora_alpha": 8, "transformer.init_lora_weights": "olora"}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(sl.SerialLoraError, match="init_lora_weights='olora'"):
        sl.compress_lora(build(""), tmp_path / "x.safetensors", rank=4)


def test_a_file_of_peft_without_its_config_says_that_alpha_is_guessed(tmp_path):
    adapted(build(""), lora()).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"no adapter_config.json beside it, which would say its alpha"):
        sl.compress_lora(build(""), tensors, rank=4)


@pytest.mark.parametrize("extra", ["lora_E", "lora_C.weight", "lora_diag", "ia3_l", "lora_router.weight"])
def test_a_module_with_a_part_that_is_not_understood_is_not_understood(extra, tmp_path):
    name = "base_model.model.transformer_blocks.0.attn1.to_q"
    odd = {f"{name}.lora_A.weight": torch.ones(4, 16), f"{name}.lora_B.weight": torch.ones(16, 4)}
    odd |= {f"{name}.alpha": torch.tensor(2.0), f"{name}.{extra}": torch.ones(4)}
    sound = {f"transformer.transformer_blocks.1.attn1.to_q.lora_{x}.weight": torch.ones(16, 16) for x in "AB"}
    model = build("")
    with pytest.raises(sl.SerialLoraError, match=r"4 keys are not understood .*" + extra.replace(".", r"\.")):
        sl.compress_lora(model, odd | sound, rank=4)
    report = sl.compress_lora(model, odd | sound, rank=4, keep_rest=tmp_path)
    assert {site.key.split(".")[2] for site in report.sites} == {"1"}
    assert set(load_file(report.rest[0])) == set(odd)
