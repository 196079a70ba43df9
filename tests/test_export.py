"""Exported LoRAs, loaded by stock diffusers and stock PEFT, give what the adapter gives."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline
from tests.tiny.vision import VISION

TOLERANCE = 1e-5
EVERYTHING = ["hidden_states", "encoder_hidden_states", "attention_output", "encoder_attention_output", "feed_forward"]
TEXT = ["hidden_states", "attention_output", "feed_forward"]


def image(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    } | arguments
    return pipe(**arguments).images


def sd3_image(pipe):
    return image(pipe, prompt="a photo of a cat", height=32, width=32)


def flux_image(pipe):
    return image(pipe, prompt="a photo of a cat", height=32, width=32)


def pixart_image(pipe):
    return image(pipe, prompt="a photo of a cat", height=32, width=32, use_resolution_binning=False)


def dit_image(pipe):
    return image(pipe, class_labels=[1], output_type="np")


def deltas(tensors, prefix=""):
    """{module: B A} of a LoRA's file, with alpha / r where it says alpha."""
    found = {}
    for key in tensors:
        if match := re.fullmatch(r"(.*)\.lora_(A|down)\.weight", key):
            up = {"A": "lora_B", "down": "lora_up"}[match[2]]
            scale = tensors.get(f"{match[1]}.alpha", torch.tensor(float(tensors[key].shape[0]))) / tensors[key].shape[0]
            product = scale.double() * tensors[f"{match[1]}.{up}.weight"].double() @ tensors[key].double()
            found[match[1].removeprefix(prefix)] = product
    return found


class TestDiffusers:
    @pytest.mark.parametrize("fused", [False, True], ids=["live", "fused"])
    def test_sd3_pipeline_draws_the_same_image_from_the_exported_lora(self, tmp_path, fused):
        pipe, stock = tiny_sd3_pipeline(), tiny_sd3_pipeline()
        before = sd3_image(pipe)
        add_random_adapter(pipe.transformer, inputs=EVERYTHING, rank_pattern={r".*\.0\.attn": 3})
        add_random_adapter(pipe.text_encoder, inputs=TEXT, seed=2)
        add_random_adapter(pipe.text_encoder_2, inputs=TEXT, seed=3)
        ours = sd3_image(pipe)
        assert (ours - before).abs().max() > 0.01
        if fused:
            pipe.fuse_serial_lora()
        report = pipe.export_lora(tmp_path)
        assert report.files == (tmp_path / "pytorch_lora_weights.safetensors",)
        assert report.ranks == (3, 4)
        stock.load_lora_weights(tmp_path)
        assert (sd3_image(stock) - ours).abs().max() < TOLERANCE

    def test_flux_pipeline_draws_the_same_image_from_the_exported_lora(self, tmp_path):
        pipe, stock = tiny_flux_pipeline(), tiny_flux_pipeline()
        before = flux_image(pipe)
        add_random_adapter(pipe.transformer, inputs=EVERYTHING)
        add_random_adapter(pipe.text_encoder, inputs=TEXT, seed=2)
        ours = flux_image(pipe)
        assert (ours - before).abs().max() > 0.01
        pipe.export_lora(tmp_path)
        stock.load_lora_weights(tmp_path)
        assert (flux_image(stock) - ours).abs().max() < TOLERANCE

    def test_bare_transformer_loads_it_with_its_own_loader(self, tmp_path):
        tiny = TINY["WanTransformer3DModel"]
        model, stock = tiny.build(), tiny.build()
        add_random_adapter(model, rslora=True)
        sl.export_lora(model, tmp_path)
        stock.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix="transformer")
        torch.testing.assert_close(output_of(stock, tiny), output_of(model, tiny), atol=TOLERANCE, rtol=0)

    def test_file_names_the_base_and_the_adapters(self, tmp_path):
        pipe = tiny_sd3_pipeline()
        add_random_adapter(pipe.transformer, "style")
        pipe.set_serial_lora("style", 0.5)
        (path,) = pipe.export_lora(tmp_path).files
        with safe_open(path, "pt") as file:
            header = file.metadata()
        origin = json.loads(header["serial_lora_export"])["components"]["transformer"]
        assert origin["adapters"] == {"style": 0.5}
        state = sl.serial_lora_state_dict(pipe.transformer, "style")
        assert origin["base"] == state.metadata["components"]["transformer"]["base"]
        assert origin["base"]["fingerprint"]
        settings = json.loads(header["lora_adapter_metadata"])
        assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4

    def test_warns_where_diffusers_has_no_lora_loader(self, tmp_path):
        pipe = tiny_dit_pipeline()
        add_random_adapter(pipe.transformer)
        with pytest.warns(UserWarning, match="no LoRA loader for DiTTransformer2DModel"):
            pipe.export_lora(tmp_path)

    def test_refuses_a_text_encoder_that_the_stock_loader_ignores(self, tmp_path):
        pipe = tiny_sd3_pipeline()
        add_random_adapter(pipe.text_encoder_3)
        with pytest.raises(sl.SerialLoraError, match=r"text_encoder_3.*format='peft'"):
            pipe.export_lora(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def peft_output_matches(tiny, folder, **config):
    model, stock = tiny.build(), tiny.build()
    add_random_adapter(model, **config)
    sl.export_lora(model, folder, format="peft")
    wrapped = peft.PeftModel.from_pretrained(stock, folder).eval()
    ours, theirs, base = output_of(model, tiny), output_of(wrapped, tiny), output_of(tiny.build(), tiny)
    assert (ours - base).abs().max() > 1e-3
    assert (ours - theirs).abs().max() < TOLERANCE * max(1.0, float(ours.abs().max()))


class TestPeft:
    @pytest.mark.parametrize(
        "name",
        [
            "DiTTransformer2DModel",
            "PixArtTransformer2DModel",
            "BriaFibo2Transformer2DModel",
            "QwenImageTransformer2DModel",
        ],
    )
    def test_stock_peft_loads_it_into_a_diffusion_transformer(self, name, tmp_path):
        peft_output_matches(TINY[name], tmp_path)

    @pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2Model", "SamVisionModel"])
    def test_stock_peft_loads_it_into_a_vision_transformer(self, name, tmp_path):
        peft_output_matches(VISION[name], tmp_path)

    def test_stock_peft_loads_it_into_torch_attention(self, tmp_path):
        peft_output_matches(VISION["nn.MultiheadAttention"], tmp_path, targets="attend")

    def test_optional_pairs_and_ranks_of_their_own_load_too(self, tmp_path):
        inputs = ["hidden_states", "attention_output", "feed_forward"]
        peft_output_matches(VISION["ViTModel"], tmp_path, inputs=inputs, rank_pattern={r".*\.0\..*": 2})
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["alpha_pattern"] == config["rank_pattern"]

    def test_modules_that_another_name_ends_in_stay_alone(self, tmp_path):
        model = VISION["ViTModel"].build()
        model.wrapped = torch.nn.ModuleDict({"layers": copy.deepcopy(model.layers)})
        add_random_adapter(model, targets=r"layers\.0\.attention")
        sl.export_lora(model, tmp_path, format="peft")
        targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        hit = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
        assert len(hit) == 3
        assert all(name.split(".")[0] != "wrapped" for name in hit)

    def test_pixart_pipeline_draws_the_same_image(self, tmp_path):
        pipe, stock = tiny_pixart_pipeline(), tiny_pixart_pipeline()
        add_random_adapter(pipe.transformer, inputs=EVERYTHING[:3])
        add_random_adapter(pipe.text_encoder, seed=2)
        ours = pixart_image(pipe)
        assert (ours - pixart_image(stock)).abs().max() > 0.01
        pipe.export_lora(tmp_path, format="peft")
        for component in ("transformer", "text_encoder"):
            wrapped = peft.PeftModel.from_pretrained(getattr(stock, component), tmp_path / component)
            setattr(stock, component, wrapped.merge_and_unload())
        assert (pixart_image(stock) - ours).abs().max() < TOLERANCE

    def test_dit_pipeline_draws_the_same_image(self, tmp_path):
        pipe, stock = tiny_dit_pipeline(), tiny_dit_pipeline()
        add_random_adapter(pipe.transformer)
        ours = dit_image(pipe)
        pipe.export_lora(tmp_path, format="peft")
        stock.transformer = peft.PeftModel.from_pretrained(
            stock.transformer, tmp_path / "transformer"
        ).merge_and_unload()
        assert isinstance(stock.transformer, DiTTransformer2DModel)
        assert abs(dit_image(stock) - ours).max() < TOLERANCE

    def test_refuses_projections_that_no_lora_can_sit_on(self, tmp_path):
        model = VISION["nn.MultiheadAttention"].build()
        add_random_adapter(model, targets="cross")
        with pytest.raises(sl.SerialLoraError, match=r"bare parameter.*fuse_serial_lora"):
            sl.export_lora(model, tmp_path / "out", format="peft")
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted(TINY))
    def test_every_diffusion_transformer_exports(self, name, tmp_path):
        peft_output_matches(TINY[name], tmp_path)


class TestSeveralAdapters:
    def two(self):
        pipe = tiny_sd3_pipeline()
        add_random_adapter(pipe.transformer, "a", seed=1)
        add_random_adapter(pipe.transformer, "b", seed=2, rank=3, alpha=2)
        pipe.set_serial_lora(["a", "b"], [0.7, -0.4])
        return pipe

    def test_become_one_lora_of_the_summed_rank(self, tmp_path):
        pipe, stock = self.two(), tiny_sd3_pipeline()
        report = pipe.export_lora(tmp_path)
        assert report.ranks == (7,)
        assert report.relative_error == 0
        stock.load_lora_weights(tmp_path)
        assert (sd3_image(stock) - sd3_image(pipe)).abs().max() < TOLERANCE

    def test_weights_can_be_given_for_the_export_alone(self, tmp_path):
        pipe = self.two()
        pipe.export_lora(tmp_path / "set")
        pipe.set_serial_lora("a")
        pipe.export_lora(tmp_path / "given", ["a", "b"], weights=[0.7, -0.4])
        one, other = (deltas(load_file(tmp_path / n / "pytorch_lora_weights.safetensors")) for n in ("set", "given"))
        for module in one:
            torch.testing.assert_close(one[module], other[module])
        assert list(sl.serial_lora_status(pipe.transformer).active) == ["a"]

    def test_truncation_is_the_best_of_its_rank_and_tells_its_error(self, tmp_path):
        pipe = self.two()
        pipe.export_lora(tmp_path / "whole")
        report = pipe.export_lora(tmp_path / "cut", rank=3)
        assert report.ranks == (3,)
        whole, cut = (deltas(load_file(tmp_path / n / "pytorch_lora_weights.safetensors")) for n in ("whole", "cut"))
        lost = norm = 0.0
        for module, dW in whole.items():
            sigma = torch.linalg.svdvals(dW)
            best = sigma[3:].square().sum().sqrt()
            gap = torch.linalg.vector_norm(dW - cut[module])
            torch.testing.assert_close(gap, best, rtol=1e-4, atol=1e-7)
            assert report.errors[module] == pytest.approx(float(best / torch.linalg.vector_norm(dW)), rel=1e-4)
            lost, norm = lost + best**2, norm + sigma.square().sum()
        assert report.relative_error == pytest.approx(float((lost / norm).sqrt()), rel=1e-4)

    def test_fused_at_a_scale_exports_what_is_fused(self, tmp_path):
        pipe, stock = self.two(), tiny_sd3_pipeline()
        pipe.fuse_serial_lora(scale=0.5)
        pipe.export_lora(tmp_path)
        stock.load_lora_weights(tmp_path)
        assert (sd3_image(stock) - sd3_image(pipe)).abs().max() < TOLERANCE


class TestBadInput:
    @pytest.fixture
    def model(self):
        model = TINY["DiTTransformer2DModel"].build()
        add_random_adapter(model)
        return model

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"format": "onnx"}, "diffusers, peft, kohya; got 'onnx'"),
            ({"adapter_names": "other"}, r"Unknown adapter \['other'\]; there are \['default'\]"),
            ({"rank": 0}, "whole number of at least 1"),
            ({"weights": 2.0}, "weights go with adapter_names"),
            ({"adapter_names": "default", "weights": 0.0}, "no effect"),
        ],
    )
    def test_is_refused_and_nothing_is_written(self, model, tmp_path, arguments, message):
        with pytest.raises(sl.SerialLoraError, match=message):
            sl.export_lora(model, tmp_path / "out", **{"format": "peft", **arguments})
        assert not (tmp_path / "out").exists()

    def test_no_active_adapter_is_an_error(self, model, tmp_path):
        sl.set_serial_lora(model, [])
        with pytest.raises(sl.SerialLoraError, match="no active adapter"):
            sl.export_lora(model, tmp_path / "out", format="peft")

    def test_quantized_base_is_refused(self, model, tmp_path):
        weight = model.transformer_blocks[1].attn1.to_k.weight
        model.transformer_blocks[1].attn1.to_k.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
        with pytest.raises(sl.SerialLoraError, match=r"Cannot export.*transformer_blocks\.1\.attn1\.to_k"):
            sl.export_lora(model, tmp_path / "out", format="peft")
        assert not (tmp_path / "out").exists()

    def test_overflow_in_the_stored_dtype_is_refused(self, model, tmp_path):
        for parameter in sl.serial_lora_parameters(model):
            parameter.data *= 1e7
        with pytest.raises(sl.SerialLoraError, match="NaN or infinity"):
            sl.export_lora(model, tmp_path / "out", format="peft", dtype=torch.float16)
        assert not (tmp_path / "out").exists()

    def test_a_file_in_the_way_is_an_error(self, model, tmp_path):
        (tmp_path / "file").write_text("theirs")
        for path in ("file", "file/lora"):
            with pytest.raises(sl.SerialLoraError, match="save_directory must be a folder"):
                sl.export_lora(model, tmp_path / path, format="peft")
        assert (tmp_path / "file").read_text() == "theirs"

    def test_a_model_without_adapters_is_an_error(self, tmp_path):
        with pytest.raises(sl.SerialLoraError, match="no active adapter"):
            sl.export_lora(TINY["DiTTransformer2DModel"].build(), tmp_path, format="peft")

    def test_something_that_is_no_model_is_an_error(self, tmp_path):
        with pytest.raises(sl.SerialLoraError, match="Give a model or a pipeline; got str"):
            sl.export_lora("model", tmp_path)


def test_the_model_is_as_it_was(tmp_path):
    model = TINY["DiTTransformer2DModel"].build()
    add_random_adapter(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sl.export_lora(model, Path(tmp_path), format="peft", rank=2, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "adapter_model.safetensors").values())


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_weights_of_a_pipelines_components_and_sites_hold_and_unknown_ones_are_refused(verb, tmp_path):
    pipe = tiny_dit_pipeline()
    add_random_adapter(pipe.transformer, "one", 1)

    def norms(weight):
        if verb == "export":
            sl.export_lora(pipe, tmp_path / str(len(list(tmp_path.iterdir()))), "one", "peft", weights=[weight])
            (file,) = sorted(tmp_path.glob("*/transformer/adapter_model.safetensors"), key=str)[-1:]
            tensors = load_file(file)
        else:
            sl.merge_serial_lora(pipe, ["one"], [weight], "sum")
            tensors = sl.serial_lora_state_dict(pipe.transformer, "sum")
            sl.delete_serial_lora(pipe, "sum")
        return {key: t.norm().item() for key, t in tensors.items() if "lora_B" in key and t.any()}

    whole = norms(1.0)
    second = {key: 0.5 * norm for key, norm in whole.items() if ".1." in key}
    assert len(whole) == 2 * len(second) > 0
    for weight in ({r".*\.0\..*": 0.0, ".*": 0.5}, {"transformer": {r".*\.0\..*": 0.0, ".*": 0.5}}):
        assert norms(weight) == pytest.approx(second, rel=1e-5)
    assert norms({"transformer": 0.5}) == pytest.approx({key: 0.5 * norm for key, norm in whole.items()}, rel=1e-5)
    for wrong in ({"block.9": 0.0}, {"transformer": {"block.9": 0.0}}, float("nan"), True):
        with pytest.raises(sl.SerialLoraError, match=r"matches none|finite"):
            norms(wrong)
