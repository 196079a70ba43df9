"""DoRA, LoHa, LoKr, OFT and odd LoRAs: each has a dW, that of PEFT where PEFT has the kind, else its formula."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import slora_diffusers as sl
from slora_diffusers.convert.layouts.read import read_lora
from tests.adapters import output_of
from tests.tiny.models import TINY

TINY_DIT = TINY["DiTTransformer2DModel"]
PATH = "transformer_blocks.0.attn1.to_q"
pytestmark = pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")  # of blocks that a target lacks
PEFT_KINDS = {
    "LoRA": lambda targets: peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets),
    "LoRA, rank-stabilised": lambda targets: peft.LoraConfig(
        r=4, lora_alpha=5, use_rslora=True, target_modules=targets, alpha_pattern={r"blocks.1.attn1.to_q": 9}
    ),
    "DoRA": lambda targets: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=targets),
    "LoHa": lambda targets: peft.LoHaConfig(r=2, alpha=3, target_modules=targets, init_weights=False),
    "LoHa of full rank": lambda targets: peft.LoHaConfig(r=6, alpha=3, target_modules=targets, init_weights=False),
    "LoKr": lambda targets: peft.LoKrConfig(r=2, alpha=3, target_modules=targets, init_weights=False),
    "LoKr, both factored": lambda targets: peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, target_modules=targets, init_weights=False
    ),
    "LoKr, none factored": lambda targets: peft.LoKrConfig(r=64, alpha=3, target_modules=targets, init_weights=False),
    "OFT": lambda targets: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets),
    "OFT, exact": lambda targets: peft.OFTConfig(
        r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=targets
    ),
    "OFT, two terms": lambda targets: peft.OFTConfig(
        r=0, oft_block_size=4, num_cayley_neumann_terms=2, target_modules=targets
    ),
    "OFT, blocks shared": lambda targets: peft.OFTConfig(
        r=0, oft_block_size=4, block_share=True, target_modules=targets
    ),
}


def weights(model):
    return {name.removesuffix(".weight"): W.clone() for name, W in model.state_dict().items()}


def peft_model(config):
    """A tiny DiT with a random PEFT adapter."""
    wrapped = peft.get_peft_model(TINY_DIT.build(), config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        elif parameter.requires_grad:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    return wrapped


def product(change):
    return change.B.double() @ change.A.double().flatten(1)


@pytest.mark.parametrize("kind", PEFT_KINDS)
class TestPeft:
    def test_the_change_is_what_peft_merges(self, kind, tmp_path):
        base = weights(TINY_DIT.build())
        wrapped = peft_model(PEFT_KINDS[kind](["to_q", "to_v", "to_out.0", "ff.net.0.proj"]))
        wrapped.save_pretrained(tmp_path)
        merged = weights(wrapped.merge_and_unload())
        lora = read_lora(tmp_path, {"transformer": TINY_DIT.build()})
        changed = {path for path, W in merged.items() if not torch.equal(W, base[path])}
        assert set(lora.parts["transformer"]) == changed
        assert len(changed) == 8
        for path, part in lora.parts["transformer"].items():
            wanted = merged[path].double() - base[path].double()
            assert torch.linalg.norm(product(part.change()) - wanted) < 2e-6 * torch.linalg.norm(merged[path])

    def test_compressed_at_full_rank_the_output_is_that_of_peft(self, kind, tmp_path):
        wrapped = peft_model(PEFT_KINDS[kind](["to_out.0"]))
        wrapped.save_pretrained(tmp_path)
        model = TINY_DIT.build()
        report = sl.compress_lora(model, tmp_path, rank=model.config.num_attention_heads * 16)
        assert sum(report.kinds.values()) == 2
        assert set(report.kinds) == {kind.partition(",")[0].partition(" ")[0]}
        base, wanted = output_of(TINY_DIT.build(), TINY_DIT), output_of(wrapped, TINY_DIT)
        assert (wanted - base).abs().max() > 1e-3
        torch.testing.assert_close(output_of(model, TINY_DIT), wanted, atol=1e-5, rtol=1e-5)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


def read(**tensors):
    """dW of one module from the parts of its key."""
    model = TINY_DIT.build()
    lora = read_lora({f"lora_unet_{PATH.replace('.', '_')}.{key}": t for key, t in tensors.items()}, {"model": model})
    assert not lora.rest
    return product(lora.parts["model"][PATH].change()), getattr_path(model, PATH).weight.double()


def getattr_path(model, path):
    return model.get_submodule(path)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


D = 16


class TestLycoris:
    """The formulas of LyCORIS and sd-scripts, in float64."""

    def test_loha_is_scaled_by_alpha_over_its_rank(self):
        a1, b1, a2, b2 = normal(D, 3), normal(3, D, seed=1), normal(D, 3, seed=2), normal(3, D, seed=3)
        dW, _ = read(hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, alpha=torch.tensor(6.0))
        close(dW, (a1 @ b1) * (a2 @ b2) * 2)

    def test_lokr_is_scaled_only_where_it_is_factored(self):
        w1, w2, a, b = normal(4, 4), normal(4, 4, seed=1), normal(4, 2, seed=2), normal(2, 4, seed=3)
        dW, _ = read(lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(6.0))
        close(dW, torch.kron(w1, w2))
        dW, _ = read(lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b, alpha=torch.tensor(6.0))
        close(dW, torch.kron(w1, a @ b) * 3)
        w1_a, w1_b = normal(4, 2, seed=5), normal(2, 4, seed=6)
        dW, _ = read(lokr_w1_a=w1_a, lokr_w1_b=w1_b, lokr_w2=w2, alpha=torch.tensor(1.0))
        close(dW, torch.kron(w1_a @ w1_b, w2) / 2)

    @pytest.mark.parametrize("axis", ["outputs", "inputs"])
    def test_dora_holds_its_magnitudes_over_outputs_or_inputs(self, axis):
        down, up = normal(3, D), normal(D, 3, seed=1)
        magnitude = normal(D, 1, seed=2).abs() + 1 if axis == "outputs" else normal(1, D, seed=2).abs() + 1
        dW, W = read(**{"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude})
        V = W + up @ down
        norm = V.norm(dim=1, keepdim=True) if axis == "outputs" else V.norm(dim=0, keepdim=True)
        close(dW, magnitude * V / norm - W)

    @pytest.mark.parametrize("alpha", [None, 0.5])
    def test_oft_turns_blocks_of_outputs_within_its_constraint(self, alpha):
        blocks = normal(4, 4, 4)
        more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
        dW, W = read(oft_blocks=blocks, rescale=torch.full((D, 1), 1.5), **more)
        Q = blocks - blocks.transpose(1, 2)
        if alpha is not None:
            assert Q.norm() > alpha
            Q = Q * alpha / Q.norm()
        eye = torch.eye(4, dtype=torch.float64)
        R = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q) for q in Q))
        close(dW, 1.5 * R.T @ W - W)

    def test_a_butterfly_of_rotations_is_refused(self):
        with pytest.raises(sl.SerialLoraError, match="to_q is a BOFT, which is not read"):
            read(oft_blocks=normal(2, 4, 4, 4))

    def test_a_full_difference_is_itself(self):
        diff = normal(D, D)
        dW, _ = read(diff=diff)
        close(dW, diff)


class TestOddLoras:
    def lora(self, **more):
        return {"lora_down.weight": normal(3, D).float(), "lora_up.weight": normal(D, 3, seed=1).float(), **more}

    def test_convolutions_of_one_pixel_are_matrices(self):
        tensors = self.lora()
        dW, _ = read(**{key: t[:, :, None, None] for key, t in tensors.items()})
        close(dW, tensors["lora_up.weight"].double() @ tensors["lora_down.weight"].double())

    def test_a_core_between_the_matrices_counts(self):
        tensors, mid = self.lora(), normal(3, 3, 1, 1, seed=4).float()
        dW, _ = read(**tensors, **{"lora_mid.weight": mid})
        up, down = tensors["lora_up.weight"].double(), tensors["lora_down.weight"].double()
        close(dW, up @ mid[:, :, 0, 0].double() @ down)

    @pytest.mark.parametrize("alpha", [6.0, [6.0], [[6.0]], [6.0, 6.0, 6.0]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
    def test_alpha_of_any_shape_is_one_number(self, alpha, dtype):
        tensors = self.lora()
        dW, _ = read(**tensors, alpha=torch.tensor(alpha, dtype=dtype))
        close(dW, 2 * tensors["lora_up.weight"].double() @ tensors["lora_down.weight"].double())

    @pytest.mark.parametrize("alpha", [[], [1.0, 2.0], [float("nan")]])
    def test_alpha_that_is_no_one_number_is_refused(self, alpha):
        with pytest.raises(sl.SerialLoraError, match=r"to_q\.alpha is to be one finite number"):
            read(**self.lora(), alpha=torch.tensor(alpha))

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
    def test_small_floats_are_read(self, dtype, tmp_path):
        name = f"transformer.{PATH}"
        tensors = {f"{name}.lora_A.weight": normal(3, D).to(dtype), f"{name}.lora_B.weight": normal(D, 3).to(dtype)}
        save_file(tensors, tmp_path / "x.safetensors")
        lora = read_lora(tmp_path / "x.safetensors", {"transformer": TINY_DIT.build()})
        A, B = (t.double() for t in tensors.values())
        close(product(lora.parts["transformer"][PATH].change()), B @ A)
        model = TINY_DIT.build()
        assert sl.compress_lora(model, tmp_path / "x.safetensors", rank=4).kinds == {"LoRA": 1}

    def test_a_scalar_of_lycoris_counts(self):
        tensors = self.lora()
        dW, _ = read(**tensors, scalar=torch.tensor(0.5))
        close(dW, 0.5 * tensors["lora_up.weight"].double() @ tensors["lora_down.weight"].double())


ODD = {
    f"base_model.model.{PATH}.lora_C.weight": torch.ones(2, 2),
    f"base_model.model.{PATH}.ia3_l": torch.ones(2),
    f"base_model.model.{PATH}.lora_A.bias": torch.ones(2),
    f"base_model.model.{PATH}.diff_b": torch.ones(2),
    "base_model.model.transformer_blocks.0.attn1.to_k.lora_mid.weight": torch.ones(3),
    "base_model.model.transformer_blocks.1.norm1.linear.lora_A.weight": torch.ones(2, 2),
    "base_model.model.proj_out_1.weight": torch.ones(2, 2),
    f"base_model.model.{PATH}.hada_w1_a": torch.ones(2, 2),
    "lora_unet_nowhere_0.alpha": torch.ones(1),
    "transformer_blocks.7.attn1.to_q.lora_A.weight": torch.ones(2, 2),
    "emb_params": torch.ones(2),
}


@pytest.mark.filterwarnings("ignore:The state dict is of PEFT and has no adapter_config.json")
class TestNothingIsHalfRead:
    """What is not understood is named and refused, or kept beside the result as it was."""

    @pytest.fixture
    def lora(self, tmp_path):
        peft_model(PEFT_KINDS["LoRA"](["to_q", "to_k", "to_v"])).save_pretrained(tmp_path / "lora")
        return load_file(tmp_path / "lora" / "adapter_model.safetensors")

    @pytest.mark.parametrize("key", ODD)
    def test_an_odd_key_is_named_and_refused(self, lora, key):
        model = TINY_DIT.build()
        tensors = {**lora, key: ODD[key]}
        with pytest.raises(sl.SerialLoraError, match=r"half read|do not make a") as error:
            sl.compress_lora(model, tensors, rank=4)
        assert key.rpartition(".")[0].rpartition(".")[0].removesuffix(".lora_A") in str(error.value)
        assert not sl.serial_lora_status(model).adapters

    @pytest.mark.parametrize(
        "key", ["emb_params", "base_model.model.proj_out_1.weight", f"base_model.model.{PATH}.diff_b"]
    )
    def test_an_odd_key_is_kept_beside_as_it_was(self, lora, key, tmp_path):
        model = TINY_DIT.build()
        report = sl.compress_lora(model, {**lora, key: ODD[key]}, rank=4, keep_rest=tmp_path / "rest")
        assert report.ignored == (key,)
        assert report.rest == (tmp_path / "rest" / "rest_as_it_was.safetensors",)
        kept = load_file(report.rest[0])
        assert set(kept) == {key}
        assert torch.equal(kept[key], ODD[key])
        assert "1 keys are not understood, and kept as they were" in str(report)

    @pytest.mark.parametrize(
        "name",
        ["diffusion_model.double_blocks.0.img_attn.qkv", "transformer.blocks.0.attn", "unet.mid", "lora_unet_mid"],
    )
    def test_modules_of_no_name_are_refused_or_kept(self, lora, name, tmp_path):
        more = {f"{name}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        with pytest.raises(sl.SerialLoraError, match=rf"1 modules are not in DiTTransformer2DModel \({name}\)"):
            sl.compress_lora(TINY_DIT.build(), lora | more, rank=4)
        report = sl.compress_lora(TINY_DIT.build(), lora | more, rank=4, keep_rest=tmp_path)
        assert set(load_file(report.rest[0])) == set(more)

    @pytest.mark.parametrize(
        "name", ["text_encoder.x", "lora_te1_x", "lora_te3_x", "text_encoders.t5xxl.transformer.x", "transformer_2.x"]
    )
    def test_modules_of_other_components_are_named(self, lora, name, tmp_path):
        more = {f"{name}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        report = sl.compress_lora(TINY_DIT.build(), lora | more, rank=4)
        assert report.unplaced == (name,)
        report = sl.compress_lora(TINY_DIT.build(), lora | more, rank=4, keep_rest=tmp_path)
        assert set(load_file(report.rest[0])) == set(more)

    def test_biases_and_differences_that_are_zero_change_nothing(self, lora):
        zeros = {f"base_model.model.{PATH}.diff_b": torch.zeros(D), "transformer.norm.diff": torch.zeros(4)}
        one, other = TINY_DIT.build(), TINY_DIT.build()
        assert sl.compress_lora(one, lora | zeros, rank=4).ignored == ()
        sl.compress_lora(other, lora, rank=4)
        assert torch.equal(output_of(one, TINY_DIT), output_of(other, TINY_DIT))

    def test_the_model_is_as_it_was_when_the_rest_cannot_be_written(self, lora, tmp_path):
        (tmp_path / "file").write_text("in the way")
        model = TINY_DIT.build()
        with pytest.raises(sl.SerialLoraError, match="must be a folder"):
            sl.compress_lora(model, {**lora, "emb_params": torch.ones(2)}, rank=4, keep_rest=tmp_path / "file")
        assert not sl.serial_lora_status(model).adapters
        with pytest.raises(sl.SerialLoraError, match="must be a folder"):
            sl.compress_lora(model, lora, rank=4, plot=tmp_path / "file" / "x.png")
        assert not sl.serial_lora_status(model).adapters
