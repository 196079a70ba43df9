"""A LoRA compressed by the closed form: exact where it can be, the best of its rank elsewhere, and said plainly."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import slora_diffusers as sl
from slora_diffusers.convert.closed_form import closed_form
from slora_diffusers.convert.lowrank import LowRank
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline
from tests.tiny.vision import VISION

EVERYTHING = ["hidden_states", "encoder_hidden_states", "attention_output", "encoder_attention_output", "feed_forward"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(S, D, M):
    return torch.linalg.norm(S @ M - D).item()


def random_lora(model, targets, rank=4, seed=0, alpha=8, std=0.2) -> Any:
    """A stock PEFT model with a random LoRA."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return wrapped


class TestClosedForm:
    def test_is_the_formula_of_the_design_in_numpy(self):
        S, B, A = normal(96, 32), normal(96, 12, seed=1), normal(12, 32, seed=2)
        M, _ = closed_form(S, LowRank(A, B), 5, ridge=1e-9)
        s, d = S.numpy(), (B @ A).numpy()
        U, sigma, Vt = np.linalg.svd(s @ np.linalg.pinv(s) @ d)
        wanted = np.linalg.pinv(s) @ (U[:, :5] * sigma[:5]) @ Vt[:5]
        np.testing.assert_allclose((M.B @ M.A).numpy(), wanted, atol=1e-9)

    @pytest.mark.parametrize("rank", [1, 4, 8])
    def test_gradient_descent_from_it_finds_nothing_better(self, rank):
        S, D = normal(96, 32), normal(96, 12, seed=1) @ normal(12, 32, seed=2)
        M, _ = closed_form(S, LowRank(normal(12, 32, seed=2), normal(96, 12, seed=1)), rank)
        start = objective(S, D, M.B @ M.A)
        best = start
        for kind, settings in (
            (torch.optim.Adam, {"lr": 1e-3}),
            (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe"}),
        ):
            A, B = (X.clone(memory_format=torch.contiguous_format).requires_grad_() for X in (M.A, M.B))
            optimizer = kind([A, B], **settings)

            def loss(A=A, B=B, optimizer=optimizer):
                optimizer.zero_grad()
                value = (S @ B @ A - D).square().sum()
                value.backward()
                return value

            for _ in range(200):
                optimizer.step(loss)
                best = min(best, objective(S, D, (B @ A).detach()))
        assert start <= best * (1 + 1e-9)
        # The comparison can fail: the same descent does improve on a start that is a little off.
        assert objective(S, D, 1.01 * M.B @ M.A) > start * (1 + 1e-6)

    def test_descent_from_elsewhere_ends_no_lower(self):
        S, D = normal(48, 16), normal(48, 16, seed=1)
        M, _ = closed_form(S, LowRank(torch.eye(16, dtype=torch.float64), D), 3)
        A, B = normal(3, 16, seed=5).requires_grad_(), normal(16, 3, seed=6).requires_grad_()
        optimizer = torch.optim.LBFGS([A, B], max_iter=2000, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = (S @ B @ A - D).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        found = objective(S, D, (B @ A).detach())
        assert objective(S, D, M.B @ M.A) <= found * (1 + 1e-9)

    @pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, float("inf")])
    def test_ill_conditioned_weights_give_small_errors_and_finite_pairs(self, condition):
        U, _ = torch.linalg.qr(normal(96, 32))
        V, _ = torch.linalg.qr(normal(32, 32, seed=1))
        sigma = torch.logspace(0, -np.log10(min(condition, 1e12)), 32, dtype=torch.float64)
        if condition == float("inf"):
            sigma[20:] = 0
        S = (U * sigma) @ V.T
        A, B = normal(4, 32, seed=2), normal(32, 4, seed=3)
        M, _ = closed_form(S, LowRank(A, S @ B), 4)
        D = S @ B @ A
        assert objective(S, D, M.B @ M.A) < 1e-5 * torch.linalg.norm(D)
        assert torch.linalg.norm(M.B @ M.A) < 10 * torch.linalg.norm(B @ A)


class TestRoundTrip:
    @pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
    def test_an_exported_lora_compresses_back_to_its_adapter(self, format, tmp_path):
        model = tiny_sd3_pipeline().transformer
        add_random_adapter(model, inputs=EVERYTHING)
        sl.export_lora(model, tmp_path, format=format)
        back = tiny_sd3_pipeline().transformer
        report = sl.compress_lora(back, tmp_path, rank=4)
        assert report.relative_error < 1e-5
        assert all(site.relative_error < 1e-5 for site in report.sites)
        assert not report.not_carried and not report.unplaced and not report.ignored
        one, other = products(model), products(back)
        assert set(one) == set(other)
        for key, M in one.items():
            assert torch.linalg.norm(other[key] - M) < 1e-5 * torch.linalg.norm(M)

    def test_a_whole_pipeline_with_text_encoders_comes_back(self, tmp_path):
        pipe, back = tiny_flux_pipeline(), tiny_flux_pipeline()
        add_random_adapter(pipe.transformer)
        add_random_adapter(pipe.text_encoder, seed=2)
        pipe.export_lora(tmp_path)
        report = sl.compress_lora(back, tmp_path, rank=4, adapter_name="back")
        assert report.relative_error < 1e-5
        assert list(back.serial_lora_status()["text_encoder"].adapters) == ["back"]
        path = back.save_serial_lora(tmp_path)
        again = tiny_flux_pipeline()
        again.load_serial_lora(path)
        assert products(again.text_encoder).keys() == products(pipe.text_encoder).keys()

    def test_fused_names_of_one_linear_are_split_and_joined(self, tmp_path):
        pipe, back = tiny_flux_pipeline(), tiny_flux_pipeline()
        add_random_adapter(pipe.transformer, inputs=[*EVERYTHING, "encoder_feed_forward"])
        pipe.export_lora(tmp_path, format="kohya")
        assert sl.compress_lora(back.transformer, tmp_path, rank=4).relative_error < 1e-5

    def test_a_vision_transformer_comes_back_from_peft(self, tmp_path):
        tiny = VISION["Dinov2Model"]
        model, back = tiny.build(), tiny.build()
        add_random_adapter(model)
        sl.export_lora(model, tmp_path, format="peft")
        assert sl.compress_lora(back, tmp_path, rank=4).relative_error < 1e-5
        torch.testing.assert_close(output_of(back, tiny), output_of(model, tiny), atol=1e-5, rtol=1e-5)


def products(model):
    """{pair: s B A} of the only adapter."""
    state = sl.serial_lora_state_dict(model)
    (header,) = state.metadata["components"].values()
    config = sl.SerialLoraConfig.from_dict(header["config"])
    found = {}
    for key, A in state.items():
        if key.endswith(".lora_A.weight"):
            place = key.removesuffix(".lora_A.weight").partition(".")[2]
            s = config.scaling_of(place.partition(".serial_lora.")[0], A.shape[0])
            found[place] = s * state[key.replace("lora_A", "lora_B")].double() @ A.double()
    return found


class TestStockLora:
    def dit(self, tmp_path, targets, **lora):
        model = tiny_dit_pipeline().transformer
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wrapped = random_lora(model, targets, **lora)
        wrapped.save_pretrained(tmp_path)
        return base, {
            name.removesuffix(".base_layer"): module.get_delta_weight("default").double()
            for name, module in wrapped.base_model.model.named_modules()
            if hasattr(module, "get_delta_weight")
        }

    def test_reported_errors_are_those_of_the_loaded_adapter(self, tmp_path):
        base, deltas = self.dit(tmp_path, ["to_q", "to_k", "to_v"])
        model = tiny_dit_pipeline().transformer
        report = sl.compress_lora(model, tmp_path, rank=4)
        M = products(model)
        lost = whole = 0.0
        for site in report.sites:
            path = site.key.removeprefix("transformer.").partition(".serial_lora.")[0]
            S = torch.cat([base[f"{path}.{p}.weight"].double() for p in ("to_q", "to_k", "to_v")])
            D = torch.cat([deltas[f"{path}.{p}"] for p in ("to_q", "to_k", "to_v")])
            gap = objective(S, D, M[site.key.removeprefix("transformer.")])
            assert site.relative_error == pytest.approx(gap / torch.linalg.norm(D).item(), rel=1e-5)
            assert site.norm == pytest.approx(torch.linalg.norm(D).item(), rel=1e-5)
            # Of rank 12 at most, in 96 dimensions that 32 inputs reach: some of it is lost, not all.
            assert 0.1 < site.relative_error < 1
            lost, whole = lost + gap**2, whole + torch.linalg.norm(D).item() ** 2
        assert report.relative_error == report.total_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)

    def test_errors_fall_with_the_rank_along_the_reported_curve(self, tmp_path):
        self.dit(tmp_path, ["to_q", "to_k", "to_v"])
        by_rank = {r: sl.compress_lora(tiny_dit_pipeline().transformer, tmp_path, rank=r).sites[0] for r in (1, 4, 12)}
        assert by_rank[1].relative_error > by_rank[4].relative_error > by_rank[12].relative_error
        for r, site in by_rank.items():
            assert by_rank[1].curve[r] == pytest.approx(site.relative_error, rel=1e-4)
        assert by_rank[1].curve[0] == pytest.approx(1.0)

    def test_an_output_projection_is_carried_exactly_at_the_loras_own_rank(self, tmp_path):
        base, deltas = self.dit(tmp_path, ["to_out.0"], rank=6)
        model = tiny_dit_pipeline().transformer
        report = sl.compress_lora(model, tmp_path, rank=2)
        assert {site.rank for site in report.sites} == {6}
        assert report.relative_error < 1e-5
        path = "transformer_blocks.0.attn1"
        wanted = torch.linalg.solve(base[f"{path}.to_out.0.weight"].double(), deltas[f"{path}.to_out.0"])
        M = products(model)[f"{path}.serial_lora.attention_output"]
        assert torch.linalg.norm(M - wanted) < 1e-4 * torch.linalg.norm(wanted)

    def test_an_mlp_is_approximated_at_the_chosen_rank(self, tmp_path):
        self.dit(tmp_path, ["ff.net.0.proj"], rank=6)
        report = sl.compress_lora(tiny_dit_pipeline().transformer, tmp_path, rank=3)
        assert {site.rank for site in report.sites} == {3}
        assert all(site.key.endswith("feed_forward") for site in report.sites)
        assert 0.1 < report.relative_error < 1

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT is asked for all, the file holds a rest
    def test_what_no_pair_carries_is_named_and_can_be_kept_beside(self, tmp_path):
        targets = ["to_out.0", "ff.net.2", "norm1.linear"]
        tiny = TINY["DiTTransformer2DModel"]
        lora = random_lora(tiny.build(), targets, std=0.1)
        lora.save_pretrained(tmp_path / "lora")
        model = tiny.build()
        report = sl.compress_lora(model, tmp_path / "lora", rank=4, keep_rest=tmp_path / "rest")
        layers = range(len(model.transformer_blocks))
        assert {f"transformer.transformer_blocks.{i}.ff.net.2" for i in layers} <= set(report.not_carried)
        assert report.relative_error < 1e-5 < 0.1 < report.total_error
        assert "not carried (kept as a LoRA beside it)" in str(report)
        ours, theirs = output_of(model, tiny), output_of(lora, tiny)
        assert (ours - theirs).abs().max() > 1e-3
        both = peft.PeftModel.from_pretrained(model, tmp_path / "rest").eval()
        torch.testing.assert_close(output_of(both, tiny), theirs, atol=2e-5, rtol=1e-4)

    def test_what_is_lost_is_said(self, tmp_path):
        self.dit(tmp_path, ["to_out.0", "ff.net.2"])
        report = sl.compress_lora(tiny_dit_pipeline().transformer, tmp_path, rank=4)
        assert report.rest == ()
        assert "2 modules are not carried (lost:" in str(report)

    def test_large_pairs_are_said(self, tmp_path):
        self.dit(tmp_path, ["to_out.0"])
        model = tiny_dit_pipeline().transformer
        report = sl.compress_lora(model, tmp_path, rank=4)
        assert "in fp32" not in str(report)
        model = tiny_dit_pipeline().transformer
        W = model.transformer_blocks[0].attn1.to_out[0].weight
        W.data[0] = W.data[1] + 1e-4 * W.data[0]  # hardly invertible
        report = sl.compress_lora(model, tmp_path, rank=4)
        M = products(model)["transformer_blocks.0.attn1.serial_lora.attention_output"]
        assert report.sites[0].amplification == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-4)
        assert report.sites[0].amplification > 100
        assert "transformer_blocks.0.attn1.serial_lora.attention_output changes its input" in str(report)

    def test_rslora_alpha_counts(self, tmp_path):
        model = tiny_dit_pipeline().transformer
        config = peft.LoraConfig(
            r=4, lora_alpha=3, use_rslora=True, target_modules=["to_out.0"], alpha_pattern={"0.attn1.to_out.0": 5}
        )
        wrapped: Any = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data = normal(*parameter.shape).float()
        wrapped.save_pretrained(tmp_path)
        back = tiny_dit_pipeline().transformer
        report = sl.compress_lora(back, tmp_path, rank=4)
        for i in range(2):
            linear = wrapped.base_model.model.transformer_blocks[i].attn1.to_out[0]
            wanted = torch.linalg.norm(linear.get_delta_weight("default")).item()
            (site,) = [s for s in report.sites if f"blocks.{i}." in s.key]
            assert site.norm == pytest.approx(wanted, rel=1e-5)

    def test_parts_for_components_that_are_not_there_are_named(self, tmp_path):
        pipe = tiny_sd3_pipeline()
        add_random_adapter(pipe.transformer)
        add_random_adapter(pipe.text_encoder)
        pipe.export_lora(tmp_path)
        report = sl.compress_lora(tiny_sd3_pipeline().transformer, tmp_path, rank=4)
        assert len(report.unplaced) == 9
        assert all(name.startswith("text_encoder.") for name in report.unplaced)
        assert "9 modules are not in this model, and dropped" in str(report)

    @pytest.mark.filterwarnings("ignore:The state dict is of PEFT and has no adapter_config.json")
    def test_layouts_of_older_tools_read_alike(self, tmp_path):
        pipe = tiny_pixart_pipeline()
        add_random_adapter(pipe.transformer)
        (path, _) = sl.export_lora(pipe.transformer, tmp_path, format="peft").files
        tensors = load_file(path)
        plain = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
        layouts = {
            "named adapter": {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()},
            "bare": plain,
            "component": {f"transformer.{k}": t for k, t in plain.items()},
            "down and up": {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for k, t in plain.items()},
            "flat": {
                "lora_unet_" + k.partition(".lora_")[0].replace(".", "_") + ".lora_" + k.partition(".lora_")[2]: t
                for k, t in plain.items()
            },
        }
        for name, layout in layouts.items():
            report = sl.compress_lora(tiny_pixart_pipeline().transformer, layout, rank=4)
            assert report.relative_error < 1e-5, name
            assert not report.unplaced, name

    def test_the_plot_is_a_picture(self, tmp_path):
        self.dit(tmp_path, ["to_q", "to_k", "to_v"])
        sl.compress_lora(tiny_dit_pipeline().transformer, tmp_path, rank=4, plot=tmp_path / "plots" / "error.png")
        picture = Image.open(tmp_path / "plots" / "error.png")
        assert picture.size[0] > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


class TestBadInput:
    @pytest.fixture
    def lora(self, tmp_path):
        random_lora(tiny_dit_pipeline().transformer, ["to_q", "to_k", "to_v"]).save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 0}, "rank must be a whole number"),
            ({"ridge": 0}, "ridge must lie between 0 and 1"),
            ({"inputs": ["nothing"]}, r"names \['nothing'\], but DiTTransformer2DModel has"),
            ({"inputs": ["attention_output"]}, "No pair of DiTTransformer2DModel with inputs"),
            ({"lora_source": "no/such/place/at all"}, "neither a local file or folder"),
            ({"adapter_name": "a b"}, "adapter name is made of letters"),
        ],
    )
    def test_is_refused_and_the_model_is_as_it_was(self, lora, arguments, message):
        model = tiny_dit_pipeline().transformer
        with pytest.raises(sl.SerialLoraError, match=message):
            sl.compress_lora(model, **{"lora_source": lora, "rank": 4, **arguments})
        assert not sl.serial_lora_status(model).adapters

    def test_a_lora_for_another_model_is_refused(self, lora):
        with pytest.raises(sl.SerialLoraError, match="No pair of ViTModel can carry"):
            sl.compress_lora(VISION["ViTModel"].build(), lora, rank=4)

    def test_a_lora_of_another_width_is_refused(self, lora):
        with pytest.raises(sl.SerialLoraError, match="for another model"):
            sl.compress_lora(TINY["DiTTransformer2DModel"].build(), lora, rank=4)

    def test_a_file_without_a_lora_is_refused(self, tmp_path):
        save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors")
        with pytest.raises(sl.SerialLoraError, match="holds no LoRA"):
            sl.compress_lora(tiny_dit_pipeline().transformer, tmp_path / "x.safetensors", rank=4)

    def test_nan_is_refused(self, lora):
        tensors = load_file(lora / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = float("nan")
        with pytest.raises(sl.SerialLoraError, match="NaN"):
            sl.compress_lora(tiny_dit_pipeline().transformer, tensors, rank=4)

    def test_a_quantized_base_is_refused(self, lora):
        model = tiny_dit_pipeline().transformer
        linear = model.transformer_blocks[0].attn1.to_q
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(sl.SerialLoraError, match="Cannot compress"):
            sl.compress_lora(model, lora, rank=4)
