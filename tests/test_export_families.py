"""Exported LoRAs of every family: stock diffusers, stock PEFT and ComfyUI's key rules give the adapter's output.

ComfyUI is represented by what its loader does, written again here: a checkpoint under the original names gets
`W += alpha / rank up down` for each key `lora_unet_<name with underscores>`; a key that names no weight is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.convert.layouts.names import linears_of
from slora_diffusers.core.sites import find_slots
from tests.adapters import add_random_adapter, output_of
from tests.loras import FAMILIES, MIXINS, mixin_of
from tests.test_original_names import dotted_names
from tests.tiny.models import TINY
from tests.tiny.vision import VISION

TOLERANCE = 1e-5


def adapted(family):
    """A tiny model with an adapter on every pair that its record has, the optional ones included."""
    model = TINY[family].build()
    add_random_adapter(model, inputs=list(dict.fromkeys(slot.pair.name for slot in find_slots(model))), std=0.2)
    return model


def close(one, other):
    assert (one - other).abs().max() < TOLERANCE * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_patches_the_original_checkpoint_to_the_fused_model(family, tmp_path):
    model = adapted(family)
    (path,) = sl.export_lora(model, tmp_path, format="kohya").files
    base = TINY[family].build()
    linears: dict[str, Any] = dict(linears_of(base))
    places = dotted_names(base, aliases_first=False)
    checkpoint = {
        name: torch.cat([linears[p].weight[rows.argsort()] for p, rows in place.paths.items()])
        for name, place in places.items()
    }
    keys = {f"lora_unet_{name.replace('.', '_')}": name for name in checkpoint}
    file = load_file(path)
    for key in [key.removesuffix(".lora_up.weight") for key in file if key.endswith(".lora_up.weight")]:
        up, down, alpha = (file.pop(f"{key}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        checkpoint[keys[key]] += alpha / down.shape[0] * up @ down
    assert not file, "keys that ComfyUI would not load"
    for name, place in places.items():
        for p, rows in place.paths.items():
            linears[p].weight.data = checkpoint[name][rows]
    wanted = output_of(model, TINY[family])
    assert (wanted - output_of(TINY[family].build(), TINY[family])).abs().max() > 1e-4
    close(output_of(base, TINY[family]), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_for_comfyui_compresses_back_to_the_adapter(family, tmp_path):
    model, back = adapted(family), TINY[family].build()
    sl.export_lora(model, tmp_path, format="kohya")
    report = sl.compress_lora(back, tmp_path, rank=4)
    assert not report.not_carried
    assert report.relative_error < 1e-5
    close(output_of(back, TINY[family]), output_of(model, TINY[family]))


@pytest.mark.parametrize("family", MIXINS)
def test_stock_diffusers_loads_it(family, tmp_path):
    model, stock = adapted(family), TINY[family].build()
    (path,) = sl.export_lora(model, tmp_path).files
    mixin = mixin_of(family)
    assert mixin is not None
    state = mixin.lora_state_dict(load_file(path))
    stock.load_lora_adapter(state[0] if isinstance(state, tuple) else state, prefix="transformer")
    close(output_of(stock.eval(), TINY[family]), output_of(model, TINY[family]))


class TestOneFileForEachCall:
    """Wan 2.2 has two transformers, and one call of its loader reads `transformer.` alone."""

    tiny = TINY["WanTransformer3DModel"]

    def pipeline(self):
        parts = {name: self.tiny.build(seed) for seed, name in enumerate(("transformer", "transformer_2"))}
        return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, **parts)

    @pytest.fixture
    def pipe(self):
        pipe = self.pipeline()
        add_random_adapter(pipe.transformer)
        add_random_adapter(pipe.transformer_2, seed=2)
        return pipe

    def outputs(self, pipe):
        return [output_of(model, self.tiny) for model in (pipe.transformer, pipe.transformer_2)]

    def test_stock_calls_load_all_of_it(self, pipe, tmp_path):
        report = sl.export_lora(pipe, tmp_path)
        name = "pytorch_lora_weights_transformer_2.safetensors"
        assert report.files == (tmp_path / "pytorch_lora_weights.safetensors", tmp_path / name)
        assert report.load == (
            f'pipe.load_lora_weights("{tmp_path}")',
            f'pipe.load_lora_weights("{tmp_path}", weight_name="{name}", load_into_transformer_2=True)',
        )
        stock = self.pipeline()
        for line in report.load:
            exec(line, {"pipe": stock})
        for one, other in zip(self.outputs(stock), self.outputs(pipe), strict=True):
            close(one, other)

    def test_the_second_alone_does_not_go_into_the_first(self, pipe, tmp_path):
        sl.unload_serial_lora(pipe.transformer)
        report = sl.export_lora(pipe, tmp_path)
        assert [path.name for path in report.files] == ["pytorch_lora_weights_transformer_2.safetensors"]
        stock = self.pipeline()
        exec(report.load[0], {"pipe": stock})
        for one, other in zip(self.outputs(stock), self.outputs(pipe), strict=True):
            close(one, other)

    def test_comfyui_gets_a_file_for_each_model(self, pipe, tmp_path):
        report = sl.export_lora(pipe, tmp_path, format="kohya", weight_name="style.safetensors")
        assert [path.name for path in report.files] == ["style.safetensors", "style_transformer_2.safetensors"]
        for path, model, seed in zip(report.files, (pipe.transformer, pipe.transformer_2), (0, 1), strict=True):
            back = self.tiny.build(seed)
            assert sl.compress_lora(back, path, rank=4).relative_error < 1e-5
            close(output_of(back, self.tiny), output_of(model, self.tiny))

    def test_peft_gets_a_folder_for_each_model(self, pipe, tmp_path):
        from peft import PeftModel

        report = sl.export_lora(pipe, tmp_path, format="peft")
        stock = self.pipeline()
        for line, name in zip(report.load, ("transformer", "transformer_2"), strict=True):
            loaded = eval(line, {"pipe": stock, "PeftModel": PeftModel}).eval()
            close(output_of(loaded, self.tiny), output_of(getattr(pipe, name), self.tiny))

    def test_a_part_that_the_loader_does_not_read_is_an_error(self, tmp_path):
        pipe = self.pipeline()
        pipe.register_modules(text_encoder=VISION["CLIPTextModel"].build())
        add_random_adapter(pipe.transformer)
        add_random_adapter(pipe.text_encoder)
        for format in ("diffusers", "kohya"):
            with pytest.raises(sl.SerialLoraError, match=r"do not read \['text_encoder'\].*format='peft'"):
                sl.export_lora(pipe, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()


class TestAutomaticRank:
    """An exported LoRA at the least rank of each module that loses no more than its dtype rounds away."""

    def two(self):
        model = TINY["Lumina2Transformer2DModel"].build()  # its keys and values are of 8 features
        add_random_adapter(model, "a", rank=10)
        state = sl.serial_lora_state_dict(model, "a")
        sl.load_serial_lora(model, state, "b")  # the same twice: a sum of rank 10, stored at 20
        return model

    @pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
    def test_ranks_are_those_of_the_changes(self, format, tmp_path):
        model, back = self.two(), TINY["Lumina2Transformer2DModel"].build()
        whole = sl.export_lora(model, tmp_path / "whole", format=format)
        small = sl.export_lora(model, tmp_path / "small", format=format, rank="auto")
        assert whole.ranks == (20,)
        assert max(small.ranks) == 10
        assert small.parameters < 0.6 * whole.parameters
        assert small.relative_error < 1e-6
        assert "relative error" in str(small)
        sl.compress_lora(back, tmp_path / "small", rank=20)
        close(output_of(back, TINY["Lumina2Transformer2DModel"]), output_of(model, TINY["Lumina2Transformer2DModel"]))

    def test_a_coarser_dtype_allows_a_coarser_rank(self, tmp_path):
        model = TINY["DiTTransformer2DModel"].build()
        add_random_adapter(model, rank=8)
        state = sl.serial_lora_state_dict(model)
        for key, tensor in state.items():
            if "lora_A" in key:
                tensor *= torch.logspace(0, -5, 8)[:, None]
        sl.load_serial_lora(model, state, "steep")
        sl.set_serial_lora(model, "steep")
        fine = sl.export_lora(model, tmp_path / "a", format="peft", rank="auto")
        coarse = sl.export_lora(model, tmp_path / "b", format="peft", rank="auto", dtype=torch.bfloat16)
        assert coarse.parameters < fine.parameters
        assert fine.relative_error < 1e-6 < coarse.relative_error < 2**-8

    def test_the_parts_of_torch_attention_keep_one_rank(self, tmp_path):
        import peft

        tiny = VISION["nn.MultiheadAttention"]
        model, stock = tiny.build(), tiny.build()
        add_random_adapter(model, "a", targets="attend")
        sl.load_serial_lora(model, sl.serial_lora_state_dict(model, "a"), "b")
        report = sl.export_lora(model, tmp_path, format="peft", rank="auto")
        assert report.ranks == (4,)
        close(output_of(peft.PeftModel.from_pretrained(stock, tmp_path).eval(), tiny), output_of(model, tiny))

    @pytest.mark.parametrize("rank", ["automatic", 0, 1.5, True])
    def test_another_word_is_refused(self, rank, tmp_path):
        with pytest.raises(sl.SerialLoraError, match=r"whole number of at least 1, 'auto', or None"):
            sl.export_lora(self.two(), tmp_path / "out", format="peft", rank=rank)
        assert not (tmp_path / "out").exists()
