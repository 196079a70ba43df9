"""An adapter survives every change of attention processor, before or after load, fused or live."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as ap

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

# As SD3-medium is. diffusers' own fused processor runs neither SD3.5's second attention nor its query and key norms.
SD3_MEDIUM = dataclasses.replace(
    TINY["SD3Transformer2DModel"],
    config={**TINY["SD3Transformer2DModel"].config, "dual_attention_layers": (), "qk_norm": None},
)
SELF_ATTENTION = {
    "DiTTransformer2DModel": [ap.AttnProcessor, ap.AttnProcessor2_0, ap.XFormersAttnProcessor],
    "PixArtTransformer2DModel": [ap.AttnProcessor, ap.AttnProcessor2_0, ap.XFormersAttnProcessor],
    "SD3Transformer2DModel": [ap.JointAttnProcessor2_0, ap.XFormersJointAttnProcessor, ap.FusedJointAttnProcessor2_0],
}
CASES = [(name, processor) for name, processors in SELF_ATTENTION.items() for processor in processors]


@pytest.fixture(autouse=True)
def xformers_without_cuda(monkeypatch):
    """xFormers' real processors; their CUDA op is replaced by an SDPA of the same signature and layout."""
    pytest.importorskip("xformers")
    ops = importlib.import_module("xformers.ops")

    def sdpa(query, key, value, attn_bias=None, op=None, scale=None, p=0.0):
        joint = query.ndim == 4  # (B, N, heads, d) or (B * heads, N, d)
        q, k, v = (t.transpose(1, 2) if joint else t for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)
        return out.transpose(1, 2) if joint else out

    monkeypatch.setattr(ops, "memory_efficient_attention", sdpa)
    monkeypatch.setattr(ap, "xformers", importlib.import_module("xformers"), raising=False)


def set_all(model, processor_class, how):
    if processor_class is ap.FusedJointAttnProcessor2_0:
        model.fuse_qkv_projections()
    elif how == "assignment":
        for module in attentions(model):
            module.processor = processor_class()
    elif not hasattr(model, "set_attn_processor"):  # DiT has the attentions' own method only
        for module in attentions(model):
            module.set_processor(processor_class())
    elif how == "dict":
        model.set_attn_processor({name: processor_class() for name in model.attn_processors})
    else:
        model.set_attn_processor(processor_class())


def attentions(model):
    return [module for module in model.modules() if isinstance(module, ap.Attention)]


@pytest.mark.parametrize("how", ["one", "dict", "assignment"])
@pytest.mark.parametrize(("name", "processor_class"), CASES, ids=lambda c: c if isinstance(c, str) else c.__name__)
def test_a_change_of_processor_keeps_the_adapter_in_any_order(name, processor_class, how):
    tiny = SD3_MEDIUM if name.startswith("SD3") else TINY[name]
    reference = tiny.build()
    add_random_adapter(reference)
    wanted = output_of(reference, tiny)

    before, after, around = tiny.build(), tiny.build(), tiny.build()
    set_all(before, processor_class, how)
    add_random_adapter(before)
    assert torch.allclose(output_of(before, tiny), wanted, atol=1e-5)

    add_random_adapter(after)
    set_all(after, processor_class, how)
    assert torch.allclose(output_of(after, tiny), wanted, atol=1e-5)
    sl.fuse_serial_lora(after)
    assert torch.allclose(output_of(after, tiny), wanted, atol=1e-5)

    add_random_adapter(around)
    sl.fuse_serial_lora(around)
    set_all(around, processor_class, how)
    assert torch.allclose(output_of(around, tiny), wanted, atol=1e-5)
    sl.unfuse_serial_lora(around)
    assert torch.allclose(output_of(around, tiny), wanted, atol=1e-5)
    with sl.disable_serial_lora(around):
        assert torch.allclose(output_of(around, tiny), output_of(tiny.build(), tiny), atol=1e-5)


@pytest.mark.parametrize("name", list(SELF_ATTENTION))
def test_processors_stay_the_users_own(name):
    model = TINY[name].build()
    before = [module.processor for module in attentions(model)]
    add_random_adapter(model)
    assert all(now.processor is then for now, then in zip(attentions(model), before, strict=True))


def test_enabling_and_disabling_xformers_keeps_the_adapter(monkeypatch):
    tiny = TINY["PixArtTransformer2DModel"]
    model = tiny.build()
    add_random_adapter(model)
    wanted = output_of(model, tiny)
    real_randn = torch.randn
    with monkeypatch.context() as patch:  # diffusers tries the op on the GPU first
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch, "randn", lambda *a, device=None, **k: real_randn(*a, **k))
        patch.setattr(ap, "is_xformers_available", lambda: True)
        model.enable_xformers_memory_efficient_attention()
    assert all(isinstance(p, ap.XFormersAttnProcessor) for p in model.attn_processors.values())
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)
    model.disable_xformers_memory_efficient_attention()
    assert not any(isinstance(p, ap.XFormersAttnProcessor) for p in model.attn_processors.values())
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_attention_slicing_keeps_the_adapter(name):
    tiny = TINY[name]
    model = tiny.build()
    add_random_adapter(model)
    wanted = output_of(model, tiny)
    for module in attentions(model):
        module.set_attention_slice(1)
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)
    sl.fuse_serial_lora(model)
    for module in attentions(model):
        module.set_attention_slice(None)
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_attention_backend_keeps_the_adapter(name, backend):
    tiny = TINY[name]
    model = tiny.build()
    add_random_adapter(model)
    wanted = output_of(model, tiny)
    model.set_attention_backend(backend)
    try:
        assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)
        sl.fuse_serial_lora(model)
        assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)
    finally:
        model.reset_attention_backend()
        model.set_attention_backend("native")


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"])
def test_fused_qkv_projections_follow_fuse_and_unfuse_in_any_order(name):
    tiny = SD3_MEDIUM if name.startswith("SD3") else TINY[name]
    model = tiny.build()
    add_random_adapter(model)
    wanted, base = output_of(model, tiny), output_of(tiny.build(), tiny)
    model.fuse_qkv_projections()
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)  # live, through to_qkv
    sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)  # fused after: to_qkv followed
    model.unfuse_qkv_projections()
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)
    model.fuse_qkv_projections()
    sl.unfuse_serial_lora(model)  # unfused after: to_qkv followed
    assert torch.allclose(output_of(model, tiny), wanted, atol=1e-5)
    sl.unload_serial_lora(model)
    assert torch.allclose(output_of(model, tiny), base, atol=1e-5)


def test_stock_lora_is_lost_when_qkv_projections_are_fused():
    """The contrast: diffusers copies the base's weights into to_qkv, and PEFT's LoRA drops out in silence."""
    peft = pytest.importorskip("peft")
    tiny = SD3_MEDIUM
    model, base = tiny.build(), output_of(tiny.build(), tiny)
    targets = ["to_q", "to_k", "to_v"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    assert not torch.allclose(output_of(model, tiny), base, atol=1e-3)
    model.fuse_qkv_projections()
    assert torch.allclose(output_of(model, tiny), base, atol=1e-5)


def test_ip_adapter_processors_keep_their_class_and_the_adapter():
    tiny = TINY["SD3Transformer2DModel"]
    reference, model = tiny.build(), tiny.build()
    width = model.inner_dim

    def processors(of):
        torch.manual_seed(3)
        return {
            key: ap.SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=width, ip_hidden_states_dim=8, head_dim=width // of.config.num_attention_heads,
                timesteps_emb_dim=width,
            )
            for key in of.attn_processors
        }  # fmt: skip

    image = {"ip_hidden_states": torch.ones(2, 3, 8), "temb": torch.ones(2, width)}
    arguments = {**tiny.arguments(), "joint_attention_kwargs": image}
    reference.set_attn_processor(processors(reference))
    add_random_adapter(reference)
    add_random_adapter(model)
    model.set_attn_processor(processors(model))
    with torch.no_grad():
        wanted, got = reference(**arguments).sample, model(**arguments).sample
        sl.fuse_serial_lora(model)
        fused = model(**arguments).sample
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(fused, wanted, atol=1e-5)
    assert all(isinstance(p, ap.SD3IPAdapterJointAttnProcessor2_0) for p in model.attn_processors.values())


@pytest.mark.parametrize("guided", [False, True])
def test_perturbed_attention_guidance_equals_its_fused_weights(guided):
    tiny = TINY["SD3Transformer2DModel"]
    model = tiny.build()
    add_random_adapter(model)
    processor = ap.PAGCFGJointAttnProcessor2_0() if guided else ap.PAGJointAttnProcessor2_0()
    site = model.transformer_blocks[-1].attn
    site.processor = processor  # as diffusers' PAG mixin does, without set_processor
    copies = 3 if guided else 2
    arguments = {k: torch.cat([v] * copies) if torch.is_tensor(v) else v for k, v in tiny.arguments().items()}
    with torch.no_grad():
        live = model(**arguments).sample
        sl.fuse_serial_lora(model)
        fused = model(**arguments).sample
    base = tiny.build()
    base.transformer_blocks[-1].attn.processor = processor
    with torch.no_grad():
        assert not torch.allclose(live, base(**arguments).sample, atol=1e-3)
    assert torch.allclose(live, fused, atol=1e-5)
