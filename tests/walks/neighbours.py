"""What others do to the model between our verbs: they move, cast, copy, adapt and rewire it."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from peft import LoraConfig
from torch import nn

from slora_diffusers import serial_lora_status
from tests.test_placement import device_map, group_blocks, group_leaves, sequential, whole
from tests.walks.machine import FOLDER, TOLERANCE
from tests.walks.results import Results


def group_disk(model: nn.Module) -> None:
    """Groups of weights on the disk, from where every forward reads them."""
    folder = tempfile.mkdtemp(dir=FOLDER.name)
    device = torch.device("cpu")
    apply_group_offloading(model, device, offload_type="leaf_level", offload_to_disk_path=folder)


PLACES: dict[str, Callable[[nn.Module], None]] = {
    "sequential": sequential,
    "whole": whole,
    "device_map": device_map,
    "group_blocks": group_blocks,
    "group_leaves": group_leaves,
    "group_disk": group_disk,
}


class WalkAmongOthers(Results):
    """A walk in which the model has other users."""

    @precondition(lambda self: self.place == "plain")
    @rule(dtype=st.sampled_from(list(TOLERANCE)))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype = dtype
        self.coarsest = max(self.coarsest, dtype, key=TOLERANCE.__getitem__)
        self.truth = self.truth.rounded(dtype)
        self.lora = {path: dW.to(dtype).double() for path, dW in self.lora.items()}
        self.settle(self.truth)

    @precondition(lambda self: self.place == "plain" and not self.lora)
    @rule(place=st.sampled_from(list(PLACES)))
    def move(self, place: str) -> None:
        PLACES[place](self.model)
        self.place = place
        self.settle(self.truth)

    @precondition(lambda self: self.place not in ("plain", "group_disk"))  # from the disk no hook brings them back
    @rule()
    def move_back(self) -> None:
        if self.place.startswith("group"):
            HookRegistry.check_if_exists_or_initialize(self.model).remove_hook("group_offloading", recurse=True)
        else:
            remove_hook_from_module(self.model, recurse=True)
        self.place = "plain"
        self.settle(self.truth)

    @precondition(lambda self: self.place == "plain")
    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, how) -> None:
        before = self.model
        left = any("forward" in vars(module) for module in before.modules())  # by accelerate, and it does not pickle
        assume(how is copy.deepcopy or not left)
        self.others = [*self.others[-1:], (before, self.output())]
        self.model = how(before)
        self.settle(self.truth)

    @precondition(lambda self: not self.qkv)
    @rule()
    def set_processors(self) -> None:
        self.model.set_attn_processor(self.ground.processor())  # pyright: ignore[reportCallIssue]
        self.settle(self.truth)

    @precondition(lambda self: self.place == "plain" and not self.lora)
    @rule()
    def turn_qkv(self) -> None:
        if self.qkv:
            self.model.unfuse_qkv_projections()  # pyright: ignore[reportCallIssue]
        else:
            self.model.fuse_qkv_projections()  # pyright: ignore[reportCallIssue]
        self.qkv = not self.qkv
        self.settle(self.truth)

    @precondition(lambda self: self.place == "plain" and not self.lora and not self.qkv)
    @precondition(lambda self: hasattr(self.model, "add_adapter"))  # PixArt's has none
    @rule(seed=st.integers(0, 3), draw=st.integers(1, 63))
    def load_peft(self, seed: int, draw: int) -> None:
        linears = [name for i, name in enumerate(self.ground.linears) if draw >> i & 1]
        assume(linears)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=linears)
        self.model.add_adapter(config, "peft")  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(seed)
        for path, module in self.model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                A, B = (getattr(module, f"lora_{part}")["peft"].weight for part in "AB")
                for matrix in (A, B):
                    matrix.data = torch.randn(matrix.shape, generator=generator).to(matrix) * 0.3
                self.lora[path] = 2.0 * B.detach().double() @ A.detach().double()
        self.lora_fused = False
        self.truth = replace(self.truth, lora=self.lora)
        self.settle(self.truth)

    @precondition(lambda self: self.lora)
    @rule()
    def turn_peft_fuse(self) -> None:
        if self.lora_fused:
            self.model.unfuse_lora()  # pyright: ignore[reportCallIssue]
            self.truth = replace(self.truth.plus(self.lora, -1.0), lora=self.lora)
        else:
            self.model.fuse_lora()  # pyright: ignore[reportCallIssue]
            self.truth = replace(self.truth.plus(self.lora), lora={})
        self.foreign = self.truth.fused is not None
        self.lora_fused = not self.lora_fused
        self.settle(self.truth)

    @precondition(lambda self: self.lora)
    @rule()
    def unload_peft(self) -> None:
        self.model.unload_lora()  # pyright: ignore[reportCallIssue]
        self.lora, self.lora_fused = {}, False
        self.truth = replace(self.truth, lora={})
        self.settle(self.truth)

    @precondition(lambda self: self.place == "plain" and not self.lora and not self.qkv)
    @rule(seed=st.integers(1, 3))
    def load_a_checkpoint(self, seed: int) -> None:
        other = self.ground.tiny.build(seed)
        self.model.load_state_dict(other.state_dict(), strict=False)
        net = other.to(self.dtype).double()
        base = {name: tensor.detach().clone() for name, tensor in (*net.named_parameters(), *net.named_buffers())}
        self.truth = replace(self.truth, base=base, unfused=base if self.truth.fused is not None else {})
        self.foreign = self.truth.fused is not None
        self.settle(self.truth)

    def teardown(self) -> None:
        """What was copied from is as it was, whatever happened to the copy."""
        now = self.model, self.dtype
        for model, output in self.others:
            self.model, self.dtype = model, next(model.parameters()).dtype
            assert torch.equal(self.output(), output), (
                f"a copy's changes reached its original {serial_lora_status(model)}"
            )
        self.model, self.dtype = now


class WalkCompiled(WalkAmongOthers):
    """A walk in which the model may be compiled at any time; the graphs are traced and run as they are."""

    @rule()
    def compile(self) -> None:
        self.model.compile(backend="eager")
        self.compiled = True
        self.settle(self.truth)
