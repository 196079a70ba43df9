"""LoRAs exported under the original checkpoints' names (kohya), read by stock converters."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.convert.layouts.names import linears_of, original_names
from slora_diffusers.convert.layouts.write import Target, as_kohya
from slora_diffusers.convert.lowrank import LowRank
from tests.adapters import add_random_adapter
from tests.test_export import EVERYTHING, TEXT, TOLERANCE, deltas, flux_image
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline


class TestKohya:
    def test_flux_pipeline_reads_it_with_its_own_converter(self, tmp_path):
        pipe, stock = tiny_flux_pipeline(), tiny_flux_pipeline()
        # The stock converter holds the single blocks to Flux.1's own width; see the next test.
        add_random_adapter(pipe.transformer, inputs=EVERYTHING, targets=r"transformer_blocks\..*")
        add_random_adapter(pipe.text_encoder, inputs=TEXT, seed=2)
        ours = flux_image(pipe)
        assert (ours - flux_image(stock)).abs().max() > 0.01
        pipe.export_lora(tmp_path, format="kohya")
        stock.load_lora_weights(tmp_path)
        assert (flux_image(stock) - ours).abs().max() < TOLERANCE

    @pytest.mark.parametrize("mlp_rank", [None, 4, 12])
    def test_flux_single_blocks_of_full_width_pass_the_stock_converter(self, mlp_rank):
        d, generator = 3072, torch.Generator().manual_seed(0)
        A = torch.randn(4, d, generator=generator)
        site = "single_transformer_blocks.0"
        lora = {f"{site}.attn.to_{x}": LowRank(A, torch.randn(d, 4, generator=generator)) for x in "qkv"}
        if mlp_rank:
            A, B = torch.randn(mlp_rank, d, generator=generator), torch.randn(4 * d, mlp_rank, generator=generator)
            lora[f"{site}.proj_mlp"] = LowRank(A, B)
        with torch.device("meta"):
            block = torch.nn.ModuleDict(
                {
                    "attn": torch.nn.ModuleDict({f"to_{x}": torch.nn.Linear(d, d) for x in "qkv"}),
                    "proj_mlp": torch.nn.Linear(d, 4 * d),
                }
            )

        class FluxTransformer2DModel(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.single_transformer_blocks = torch.nn.ModuleList([block])

        target = Target({"transformer": FluxTransformer2DModel()}, None, {})
        renamed = as_kohya({"transformer": lora}, target)["transformer"]
        assert set(renamed) == {"lora_unet_single_blocks_0_linear1"}
        part = renamed["lora_unet_single_blocks_0_linear1"]
        file = {
            "lora_unet_single_blocks_0_linear1.lora_down.weight": part.A,
            "lora_unet_single_blocks_0_linear1.lora_up.weight": part.B,
            "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(float(part.rank)),
        }
        rows = slice(0, 64)
        found = {
            module: file_[f"{module}.lora_B.weight"][rows] @ file_[f"{module}.lora_A.weight"]
            for file_ in [_convert_kohya_flux_lora_to_diffusers(file)]
            for module in (f"transformer.{path}" for path in lora)
        }
        for path, wanted in lora.items():
            torch.testing.assert_close(found[f"transformer.{path}"], wanted.B[rows] @ wanted.A, atol=1e-3, rtol=1e-5)

    def test_sd3_names_are_those_of_the_original_checkpoint(self, tmp_path):
        pipe = tiny_sd3_pipeline()
        add_random_adapter(pipe.transformer, inputs=[*EVERYTHING, "encoder_feed_forward"])
        pipe.export_lora(tmp_path / "a")
        (path,) = pipe.export_lora(tmp_path / "b", format="kohya").files
        wanted = deltas(load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors"), "transformer.")
        theirs = OriginalSD3(deltas(load_file(path), "lora_unet_"), d=32)
        converted = convert_sd3_transformer_checkpoint_to_diffusers(theirs)
        assert not theirs.unread, "names that the original model does not have"
        assert len(wanted) == 22
        for module, delta in wanted.items():
            torch.testing.assert_close(converted[f"{module}.weight"], delta, atol=1e-6, rtol=1e-6)

    def test_pixart_names_are_those_of_the_original_checkpoint(self, tmp_path):
        pipe = tiny_pixart_pipeline()
        add_random_adapter(pipe.transformer, inputs=EVERYTHING[:3] + ["feed_forward"])
        add_random_adapter(pipe.text_encoder, seed=2)
        sl.export_lora(pipe.transformer, tmp_path / "a", format="peft")
        (path,) = pipe.export_lora(tmp_path / "b", format="kohya").files
        ours = deltas(load_file(tmp_path / "a" / "adapter_model.safetensors"), "base_model.model.")
        theirs = deltas(load_file(path))
        for i in range(2):
            here, there = f"transformer_blocks.{i}", f"lora_unet_blocks_{i}"
            parts = {
                "attn_qkv": "attn1.to_q attn1.to_k attn1.to_v",
                "attn_proj": "attn1.to_out.0",
                "cross_attn_q_linear": "attn2.to_q",
                "cross_attn_kv_linear": "attn2.to_k attn2.to_v",
                "cross_attn_proj": "attn2.to_out.0",
                "mlp_fc1": "ff.net.0.proj",
            }
            for name, paths in parts.items():
                wanted = torch.cat([ours[f"{here}.{path}"] for path in paths.split()])
                torch.testing.assert_close(theirs[f"{there}_{name}"], wanted, atol=1e-9, rtol=1e-6)
        assert "lora_te1_encoder_block_0_layer_0_SelfAttention_q" in theirs

    def test_every_linear_of_the_three_families_that_a_pair_feeds_has_a_name(self):
        for pipe in (tiny_sd3_pipeline(), tiny_flux_pipeline(), tiny_pixart_pipeline()):
            models = {"transformer": pipe.transformer}
            named = [path for place in original_names(models).values() for path in place.paths]
            assert len(named) == len(set(named))
            assert set(named) <= set(linears_of(pipe.transformer))

    def test_refuses_a_model_without_names(self, tmp_path):
        pipe = tiny_dit_pipeline()
        add_random_adapter(pipe.transformer)
        with pytest.raises(sl.SerialLoraError, match=r"DiTTransformer2DModel.*SD3Transformer2DModel"):
            pipe.export_lora(tmp_path / "out", format="kohya")
        assert not (tmp_path / "out").exists()


class OriginalSD3(dict):
    """A checkpoint under SD3's original names that holds changes of weights, and zeros for all that a LoRA leaves."""

    def __init__(self, changes, d):
        super().__init__({f"joint_blocks.{i}.x_block.attn.qkv.weight": None for i in range(2)})
        self["joint_blocks.0.x_block.attn2.qkv.weight"] = None
        self.update({"context_embedder.weight": torch.zeros(d, d), "joint_blocks.0.x_block.attn.ln_q.weight": None})
        self.changes, self.unread, self.d = changes, set(changes), d

    def pop(self, key, *default):
        name = key.removesuffix(".weight").replace(".", "_")
        self.unread.discard(name)
        bias = key.endswith(".bias")
        if name in self.changes and not bias:
            return self.changes[name]
        return torch.zeros(6 * self.d) if bias else torch.zeros(6 * self.d, self.d)

    def __getitem__(self, key):
        return self.pop(key)
