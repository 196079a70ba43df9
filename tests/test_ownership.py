"""Who owns a weight: every verb on a model whose weights are kept somewhere else gives the plain model's result, or is
refused in a sentence and changes nothing.
"""

from __future__ import annotations

import contextlib
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig, GroupOffloadingType, _apply_group_offloading
from torch import nn

import slora_diffusers as sl
from tests.adapters import add_random_adapter, output_of
from tests.tiny.models import TINY

CPU = torch.device("cpu")
SD3 = TINY["SD3Transformer2DModel"]
INPUTS = ("hidden_states", "attention_output")


class Stream:
    """As much of a CUDA stream as diffusers' group offloading asks for."""

    def synchronize(self):
        pass


@pytest.fixture
def stream(monkeypatch):
    """Group offloading with a stream, whose copies a CPU cannot pin."""
    monkeypatch.setattr(torch.cpu, "stream", lambda stream: nullcontext(), raising=False)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda *a: Stream(), raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *a: tensor.clone())


def group(level, **options):
    def place(model, folder):
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        disk = {"offload_to_disk_path": str(folder)} if options.get("disk") else {}
        if not options.get("stream"):
            apply_group_offloading(model, onload_device=CPU, offload_type=level, **blocks, **disk)
            return
        config = GroupOffloadingConfig(  # what apply_group_offloading makes where the device has streams
            CPU, CPU, GroupOffloadingType(level), True, False, False, stream=Stream(), **blocks, **disk
        )
        _apply_group_offloading(model, config)

    return place


def accelerate_disk(model, folder):
    blocks = {f"transformer_blocks.{i}": "disk" for i in range(len(model.transformer_blocks))}
    rest = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    dispatch_model(model, {**rest, **blocks}, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OWNERS = {
    "the model itself": lambda model, folder: None,
    "accelerate, sequential": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "accelerate, whole": lambda model, folder: cpu_offload_with_hook(model, execution_device=CPU),
    "accelerate, device map": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "accelerate, disk": accelerate_disk,
    "groups of blocks": group("block_level"),
    "groups of leaves": group("leaf_level"),
    "groups of blocks, stream": group("block_level", stream=True),
    "groups of leaves, stream": group("leaf_level", stream=True),
    "groups of blocks, disk": group("block_level", disk=True),
    "groups of leaves, disk": group("leaf_level", disk=True),
    "groups of blocks, disk, stream": group("block_level", disk=True, stream=True),
    "groups of leaves, disk, stream": group("leaf_level", disk=True, stream=True),
}


def adapter(seed=1):
    model = SD3.build()
    add_random_adapter(model, seed=seed, inputs=INPUTS)
    return sl.serial_lora_state_dict(model)


def run(model):
    return output_of(model, SD3)


def plain(*states, weight=1.0):
    model = SD3.build()
    for i, state in enumerate(states):
        sl.load_serial_lora(model, state, f"a{i}", weight)
    return run(model)


def close(one, other):
    return torch.allclose(one, other, atol=1e-5)


def load_into_owned(model, state, owner, when, ran):
    """Load an adapter before or after the weights get their owner, and perhaps run the model."""
    if when == "adapter first":
        sl.load_serial_lora(model, state, "a0")
    owner(model)
    if when == "owner first":
        sl.load_serial_lora(model, state, "a0")
    if ran:
        run(model)


@pytest.fixture(params=list(OWNERS))
def owner(request, tmp_path, stream):
    return lambda model: OWNERS[request.param](model, tmp_path / "kept")


@pytest.mark.parametrize("when", ["adapter first", "owner first"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
def test_every_verb_gives_the_plain_models_result_or_is_refused(owner, when, ran, tmp_path):
    state, other = adapter(), adapter(seed=2)
    model = SD3.build()
    load_into_owned(model, state, owner, when, ran)

    file = sl.save_serial_lora(model, tmp_path / "saved")
    saved = SD3.build()
    sl.load_serial_lora(saved, file)
    assert close(run(saved), plain(state)), "save"

    sl.export_lora(model, tmp_path / "lora", format="peft")
    stock = SD3.build()
    from peft import PeftModel

    stock = PeftModel.from_pretrained(stock, tmp_path / "lora")
    assert close(run(stock), plain(state)), "export"

    assert close(run(model), plain(state)), "load"
    sl.set_serial_lora(model, "a0", 0.5)
    assert close(run(model), plain(state, weight=0.5)), "set"
    sl.set_serial_lora(model, "a0")
    sl.load_serial_lora(model, other, "a1")
    assert close(run(model), plain(state, other)), "load beside"
    sl.merge_serial_lora(model, ["a0", "a1"], None, "both")
    sl.set_serial_lora(model, "both")
    assert close(run(model), plain(state, other)), "merge"
    sl.delete_serial_lora(model, ["both", "a1"])
    sl.set_serial_lora(model, "a0")

    live = run(model)
    refused = None
    try:
        sl.fuse_serial_lora(model)
    except sl.SerialLoraError as error:
        refused = str(error)
    if refused is not None:
        assert "ffload" in refused
        assert torch.equal(run(model), live) and not sl.serial_lora_status(model).fused
    else:
        assert close(run(model), live), "fuse"
        assert close(run(model), live), "fuse, after the weights were moved once more"
        again = sl.serial_lora_state_dict(model)
        assert all(torch.equal(again[key], state[key]) for key in state), "save while fused"
        sl.unfuse_serial_lora(model)
        assert torch.equal(run(model), live), "unfuse"
    sl.unload_serial_lora(model)
    assert close(run(model), run(SD3.build())), "unload"


def test_compressing_reads_the_weights_from_their_owner(owner, tmp_path):
    state = adapter()
    model = SD3.build()
    sl.load_serial_lora(model, state)
    sl.export_lora(model, tmp_path / "lora", format="peft")
    sl.unload_serial_lora(model)
    owner(model)
    report = sl.compress_lora(model, tmp_path / "lora", 4)
    assert report.relative_error < 1e-5
    assert torch.allclose(run(model), plain(state), atol=1e-4)


def test_a_base_without_numbers_does_not_take_the_adapters(tmp_path):
    state = adapter()
    model = SD3.build().to("meta")
    assert next(model.parameters()).is_meta
    sl.load_serial_lora(model, state)
    saved = sl.serial_lora_state_dict(model)
    assert all(torch.equal(saved[key], state[key]) for key in state)
    base = SD3.build().state_dict()
    missing, unexpected = model.load_state_dict(base, strict=False, assign=True)
    assert not unexpected and all("serial_lora" in key for key in missing)
    assert close(run(model), plain(state))


def test_numbers_outlive_to_empty():
    state = adapter()
    model = SD3.build().to("meta")
    sl.load_serial_lora(model, state)
    model.to_empty(device="cpu")
    saved = sl.serial_lora_state_dict(model)
    assert all(torch.equal(saved[key], state[key]) for key in state)


def test_fusing_weights_without_numbers_is_refused():
    model = SD3.build().to("meta")
    sl.load_serial_lora(model, adapter())
    with pytest.raises(sl.SerialLoraError, match="offloaded, not in memory"):
        sl.fuse_serial_lora(model)


class PackedLinear(nn.Module):
    """A quantized layer that keeps its weight in a form and under names of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 127).round().to(torch.int8))
        self.bias = linear.bias

    qweight: torch.Tensor

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.float() / 127, self.bias)


def packed():
    model = SD3.build()
    for block in model.transformer_blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn, name, PackedLinear(getattr(block.attn, name)))
        block.attn.to_out[0] = PackedLinear(block.attn.to_out[0])
    return model


def test_a_layer_without_a_weight_takes_adapters_and_refuses_what_needs_its_numbers(tmp_path):
    model, state = packed(), adapter()
    base = run(model)
    sl.load_serial_lora(model, state)
    assert not torch.equal(run(model), base)
    live = run(model)
    for verb in (sl.fuse_serial_lora, lambda m: sl.export_lora(m, tmp_path / "lora", format="peft")):
        with pytest.raises(sl.SerialLoraError, match=r"without a tensor 'weight'"):
            verb(model)
    assert torch.equal(run(model), live)
    file = sl.save_serial_lora(model, tmp_path / "a")
    again = packed()
    sl.load_serial_lora(again, file)
    assert torch.equal(run(again), live)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2), "trained")
    sl.unload_serial_lora(model)
    sl.reserve_serial_lora(model, (4, 1))
    sl.unload_serial_lora(model)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
def test_what_was_fused_before_the_owner_came_is_unfused_or_refused(owner, ran, tmp_path):
    """Sequential offloading and groups on disk once kept the fused weights, while the status said live."""
    state = adapter()
    model = SD3.build()
    sl.load_serial_lora(model, state, "a0")
    sl.fuse_serial_lora(model)
    owner(model)
    if ran:
        run(model)
    assert close(run(model), plain(state))
    saved = SD3.build()
    sl.load_serial_lora(saved, sl.save_serial_lora(model, tmp_path / "saved"))
    assert close(run(saved), plain(state)), "save"
    try:
        sl.unfuse_serial_lora(model)
        refused = ""
    except sl.SerialLoraError as error:
        refused = str(error)
    assert "offload" in refused or not refused
    assert close(run(model), plain(state)) and bool(sl.serial_lora_status(model).fused) == bool(refused)
    if not refused:
        with sl.disable_serial_lora(model):
            assert torch.equal(run(model), plain())


@pytest.mark.parametrize("when", ["adapter first", "owner first"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
def test_whole_modules_are_the_plain_models_or_refused(owner, when, ran, tmp_path):
    trained = SD3.build()
    add_random_adapter(trained, inputs=INPUTS, modules_to_save=["proj_out", "norm_out.linear"])
    state, expected = sl.serial_lora_state_dict(trained), run(trained)
    model = SD3.build()
    base = run(model)
    load_into_owned(model, state, owner, when, ran)
    saved = SD3.build()
    sl.load_serial_lora(saved, sl.save_serial_lora(model, tmp_path / "saved"))
    assert close(run(saved), expected), "save"
    assert close(run(model), expected), "load"
    with sl.disable_serial_lora(model):
        assert torch.equal(run(model), base), "disable"
    sl.set_serial_lora(model, "a0", 0.0)
    assert torch.equal(run(model), base), "set"
    sl.set_serial_lora(model, "a0")
    with contextlib.suppress(sl.SerialLoraError):  # where the owner lets nobody write
        sl.fuse_serial_lora(model)
        assert close(run(model), expected), "fuse"
        sl.unfuse_serial_lora(model)
    assert close(run(model), expected) and not sl.serial_lora_status(model).fused, "unfuse"
    sl.load_serial_lora(model, state, "a0", hotswap=True)
    assert close(run(model), expected), "swap"
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2, modules_to_save="pos_embed.proj"), "new")
    assert close(run(model), expected), "add"
    sl.unload_serial_lora(model)
    assert torch.equal(run(model), base), "unload"


@pytest.mark.parametrize("order", ["owner first", "room first"])
def test_reserved_room_is_filled_or_refused(owner, order):
    """Groups on disk once filled the room from parameters that hold nothing between forwards."""
    state, other = adapter(), adapter(seed=2)
    model = SD3.build()
    sl.load_serial_lora(model, state, "a0")
    steps = [lambda: owner(model), lambda: sl.reserve_serial_lora(model, (8, 2), inputs=INPUTS)]
    for step in steps if order == "owner first" else steps[::-1]:
        with contextlib.suppress(sl.SerialLoraError):
            step()
    assert close(run(model), plain(state)), "reserve"
    verbs = [
        (lambda: sl.set_serial_lora(model, "a0", 0.5), plain(state, weight=0.5)),
        (lambda: sl.set_serial_lora(model, "a0"), plain(state)),
        (lambda: sl.load_serial_lora(model, other, "a1"), plain(state, other)),
        (lambda: sl.delete_serial_lora(model, "a1"), plain(state)),
        (lambda: sl.load_serial_lora(model, other, "a0", hotswap=True), plain(other)),
    ]
    held = run(model)
    for verb, wanted in verbs:
        try:
            verb()
            held = wanted
        except sl.SerialLoraError:
            pass
        assert close(run(model), held)
