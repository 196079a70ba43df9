"""Adapters on a model that something else moves: offloading, device maps, layerwise casting, changes of dtype."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

CPU = torch.device("cpu")
NAME = "SD3Transformer2DModel"


def sequential(model):
    cpu_offload(model, execution_device=CPU)


def whole(model):
    cpu_offload_with_hook(model, execution_device=CPU)


def device_map(model):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def disk(model, folder="."):
    blocks = {f"transformer_blocks.{i}": "disk" for i in range(len(model.transformer_blocks))}
    rest = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    dispatch_model(model, {**rest, **blocks}, main_device="cpu", offload_dir=folder, force_hooks=True)


def group_blocks(model):
    apply_group_offloading(model, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def group_leaves(model):
    apply_group_offloading(model, onload_device=CPU, offload_type="leaf_level")


PLACEMENTS = [sequential, whole, device_map, group_blocks, group_leaves]


def hooks_of(model):
    """Every hook that moves weights, by module; the pairs' own modules aside."""
    found = {}
    for name, module in model.named_modules():
        if "serial_lora" in name:
            continue
        hook = getattr(module, "_hf_hook", None)
        registry = getattr(module, "_diffusers_hook", None)
        found[name] = (type(hook), id(hook) if hook else None, sorted(registry.hooks) if registry else None,
                       module.forward.__name__ if hasattr(module.forward, "__name__") else "partial")  # fmt: skip
    return found


def devices_of(model):
    return {n: p.device for n, p in model.named_parameters() if "serial_lora" not in n}


@pytest.fixture
def adapter(tmp_path):
    """Two saved adapters, and the outputs of the first and of both on the plain model."""
    tiny = TINY[NAME]
    model = tiny.build()
    outputs = {"base": output_of(model, tiny)}
    for i, name in enumerate("ab"):
        add_random_adapter(model, name, seed=i)
        sl.save_serial_lora(model, tmp_path / name, name)
        outputs[name * (i + 1)] = output_of(model, tiny)
    return tiny, tmp_path, outputs


@pytest.mark.parametrize("place", PLACEMENTS)
def test_loading_into_a_placed_model_changes_neither_devices_nor_hooks(place, adapter):
    tiny, path, outputs = adapter
    model = tiny.build()
    place(model)
    hooks, devices = hooks_of(model), devices_of(model)
    sl.load_serial_lora(model, path / "a", "a")
    assert devices_of(model) == devices
    assert hooks_of(model) == hooks
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)
    sl.load_serial_lora(model, path / "b", "b")
    assert torch.allclose(output_of(model, tiny), outputs["bb"], atol=1e-5)
    sl.save_serial_lora(model, path / "again", "a")
    sl.delete_serial_lora(model, "b")
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)
    with pytest.raises(sl.SerialLoraError):
        sl.load_serial_lora(model, {"transformer.nowhere.lora_A.weight": torch.ones(1)})
    sl.unload_serial_lora(model)
    assert hooks_of(model) == hooks
    assert devices_of(model) == devices
    assert torch.allclose(output_of(model, tiny), outputs["base"], atol=1e-6)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_placing_a_model_that_has_adapters_keeps_them(place, adapter):
    tiny, path, outputs = adapter
    model = tiny.build()
    sl.load_serial_lora(model, path / "a", "a")
    place(model)
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)
    sl.load_serial_lora(model, path / "b", "b")
    assert torch.allclose(output_of(model, tiny), outputs["bb"], atol=1e-5)
    sl.save_serial_lora(model, path / "again", "a")
    again = tiny.build()
    sl.load_serial_lora(again, path / "again")
    assert torch.allclose(output_of(again, tiny), outputs["a"], atol=1e-5)
    with sl.disable_serial_lora(model):
        assert torch.allclose(output_of(model, tiny), outputs["base"], atol=1e-6)
    sl.set_serial_lora(model, "a")
    sl.delete_serial_lora(model, "b")
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)


def test_weights_offloaded_to_disk_take_an_adapter(adapter, tmp_path):
    tiny, path, outputs = adapter
    model = tiny.build()
    disk(model, str(tmp_path / "offload"))
    sl.load_serial_lora(model, path / "a", "a")
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)


def test_fusing_offloaded_weights_is_refused_and_works_once_the_hooks_are_off(adapter):
    tiny, path, outputs = adapter
    model = tiny.build()
    sequential(model)
    sl.load_serial_lora(model, path / "a")
    with pytest.raises(sl.SerialLoraError, match="offloaded"):
        sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)
    remove_hook_from_module(model, recurse=True)
    sl.fuse_serial_lora(model)
    assert torch.allclose(output_of(model, tiny), outputs["a"], atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_keeps_the_adapter(when, adapter):
    tiny, path, _ = adapter
    model, reference = tiny.build(), tiny.build()
    reference.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    if when == "before":
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    sl.load_serial_lora(model, path / "a")
    if when == "after":
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    plain = tiny.build()
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not any(
            re.search(skip, name) for skip in ("pos_embed", "norm", "^proj_out$")
        ):
            module.half().float()
    sl.load_serial_lora(plain, path / "a")
    assert torch.allclose(output_of(model, tiny), output_of(plain, tiny), atol=1e-5)
    sl.unload_serial_lora(model)
    assert torch.allclose(output_of(model, tiny), output_of(reference, tiny), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moving_to_another_dtype_after_load_keeps_the_adapter(dtype, adapter):
    tiny, path, _ = adapter
    moved, fresh = tiny.build(), tiny.build()
    sl.load_serial_lora(moved, path / "a")
    moved.to(dtype)
    fresh.to(dtype)
    sl.load_serial_lora(fresh, path / "a")

    def run(model):
        arguments = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                     for k, v in tiny.arguments().items()}  # fmt: skip
        with torch.no_grad():
            return model(**arguments).sample.double()

    assert torch.allclose(run(moved), run(fresh), atol=0.1 if dtype is torch.bfloat16 else 0.01)
    assert torch.isfinite(run(moved)).all()


def test_a_fuse_survives_a_change_of_dtype(adapter):
    tiny, path, _ = adapter
    model, base = tiny.build(), tiny.build().bfloat16()
    sl.load_serial_lora(model, path / "a")
    sl.fuse_serial_lora(model)
    model.bfloat16()
    sl.unfuse_serial_lora(model)
    sl.unload_serial_lora(model)
    for (name, ours), theirs in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_loading_leaves_the_base_on_its_device_and_in_its_dtype(adapter):
    tiny, path, _ = adapter
    model = tiny.build().bfloat16()
    before = {n: (p.device, p.dtype, p.data_ptr()) for n, p in model.named_parameters()}
    sl.load_serial_lora(model, path / "a")
    now = {n: (p.device, p.dtype, p.data_ptr()) for n, p in model.named_parameters() if "serial_lora" not in n}
    assert now == before
