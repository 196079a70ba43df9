"""The library's verbs that change a model, as rules: what a walk draws for them, and what must hold afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import slora_diffusers as sl
from tests.walks.grounds import CONFIGS, given, what_it_computes
from tests.walks.machine import FAULTS, FOLDER, Machine
from tests.walks.truth import Weights

NUMBERS = st.integers(0, len(CONFIGS) - 1)
SEVERAL = st.integers(0, 31)
WEIGHTS = st.one_of(
    st.sampled_from([1.0, 0.5, -0.7, 0.0, 2]),
    st.fixed_dictionaries({r"transformer_blocks\.0\..*": st.sampled_from([0.0, 0.4, 1.5])}),
)
FIVE_WEIGHTS = st.lists(WEIGHTS, min_size=5, max_size=5)


class Verbs(Machine):
    """A walk of verbs."""

    @rule(number=NUMBERS, pipe=st.booleans(), weight=st.sampled_from([1.0, 0.5, -1.0]), from_file=st.booleans(),
          activate=st.sampled_from([True, True, False]), trains=st.booleans(), named=st.booleans(),
          broken=FAULTS)  # fmt: skip
    def load(
        self,
        number: int,
        pipe: bool,
        weight: float,
        from_file: bool,
        activate: bool,
        trains: bool,
        named: bool,
        broken: Any,
    ) -> None:
        assume(len(self.truth.adapters) < 5)
        adapter, name = given(self.called, number, Path(FOLDER.name)), self.new_name("a")
        after = self.truth.plus_adapter(name, adapter.terms, adapter.whole, weight if activate else None)
        more: dict[str, Any] = {"component": "transformer"} if named else {}
        self.verb(
            lambda: self.via(pipe)("load_serial_lora", adapter.path if from_file else adapter.state, name, weight,
                                   activate=activate, is_trainable=trains, **more),
            lambda: after, broken, self.easy, may=not after.clash(after.active),
        )  # fmt: skip

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=SEVERAL, number=NUMBERS, pipe=st.booleans(), activate=st.booleans(), broken=FAULTS)
    def replace_one(self, draw: int, number: int, pipe: bool, activate: bool, broken: Any) -> None:
        """Load under a name that is there already."""
        adapter, name = given(self.called, number, Path(FOLDER.name)), self.some(draw)
        weight = 0.5 if activate else None
        after = self.truth.without([name]).plus_adapter(name, adapter.terms, adapter.whole, weight)
        self.verb(
            lambda: self.via(pipe)("load_serial_lora", adapter.path, name, 0.5, hotswap=True, activate=activate),
            lambda: after, broken, self.easy, may=not after.clash(after.active),
        )  # fmt: skip

    @rule(rank=st.integers(1, 3), whole=st.booleans(), start=st.booleans(), broken=FAULTS)
    def add(self, rank: int, whole: bool, start: bool, broken: Any) -> None:
        assume(len(self.truth.adapters) < 5)
        name = self.new_name("n")
        config = sl.SerialLoraConfig(rank=rank, alpha=2, modules_to_save=[self.ground.out] if whole else None)
        path = f"{self.ground.out}."
        brought = {key: W for key, W in self.truth.base.items() if whole and key.startswith(path)}
        after = self.truth.plus_adapter(name, {}, brought, 1.0)
        may = not after.clash(after.active)
        if self.verb(lambda: sl.add_serial_lora(self.model, config, name), lambda: after, broken, self.easy, may):
            if start and self.easy:
                self.start(name, broken)
            self.train(name)

    def start(self, name: str, broken: Any) -> None:
        """Give a new adapter the start that the gradient gives: it changes no output."""

        def backward() -> None:
            self.model(**self.arguments())[0].float().square().mean().backward()

        self.verb(lambda: sl.initialize_serial_lora(self.model, backward, name), lambda: self.truth, broken)
        assert all(parameter.grad is None for parameter in self.model.parameters())

    def train(self, name: str) -> None:
        """Write numbers into an adapter's parameters, as an optimizer does."""
        generator = torch.Generator().manual_seed(self.count)
        for parameter in sl.serial_lora_parameters(self.model, name):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.read(name)

    def read(self, name: str) -> None:
        """Take an adapter's numbers from the model; its alpha is 2."""
        state = sl.serial_lora_state_dict(self.model, name)
        rank = next(len(tensor) for key, tensor in state.items() if key.endswith("lora_A.weight"))
        terms, whole = what_it_computes(state, {"rank": rank, "alpha": 2})
        truth = self.truth
        self.settle(replace(truth, adapters={**truth.adapters, name: terms}, whole={**truth.whole, name: whole}))

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=SEVERAL, weights=FIVE_WEIGHTS, pipe=st.booleans(), broken=FAULTS)
    def activate(self, draw: int, weights: Sequence[Weights], pipe: bool, broken: Any) -> None:
        chosen = dict(zip(self.names(draw), weights, strict=False))
        given = list(chosen.values())
        if pipe:  # the one component's weight
            given = [{"transformer": weight} for weight in given]
        self.verb(
            lambda: self.via(pipe)("set_serial_lora", list(chosen), given),
            lambda: replace(self.truth, active=chosen),
            broken,
            may=not self.truth.clash(chosen),
        )

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=st.integers(1, 31), pipe=st.booleans(), broken=FAULTS)
    def delete(self, draw: int, pipe: bool, broken: Any) -> None:
        names = self.names(draw)
        assume(names)
        after = self.truth.without(names)
        self.verb(lambda: self.via(pipe)("delete_serial_lora", names), lambda: after, broken, self.easy)

    @rule(pipe=st.booleans(), broken=FAULTS)
    def unload(self, pipe: bool, broken: Any) -> None:
        after = replace(self.truth.without(list(self.truth.adapters)), fused=None, unfused={})
        if self.verb(lambda: self.via(pipe)("unload_serial_lora"), lambda: after, broken, must=True):
            self.reserved = False

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=SEVERAL, pipe=st.booleans(), broken=FAULTS)
    def move_idle(self, draw: int, pipe: bool, broken: Any) -> None:
        names = self.names(draw)
        idle = not {*names} & {*self.truth.active, *(self.truth.fused or {})}
        self.verb(
            lambda: self.via(pipe)("move_serial_lora", names, "cpu"),
            lambda: self.truth, broken, must=self.easy and idle, may=idle,
        )  # fmt: skip

    @precondition(lambda self: self.truth.adapters and self.truth.fused is None)
    @rule(draw=SEVERAL, scale=st.sampled_from([1.0, 0.5, 0.0]), pipe=st.booleans(), broken=FAULTS)
    def fuse(self, draw: int, scale: float, pipe: bool, broken: Any) -> None:
        names = sorted({*self.names(draw), *self.truth.active}) if draw else None
        held = list(self.truth.active) if names is None else names
        weights = {name: self.truth.active.get(name, 1.0) for name in held}
        self.verb(
            lambda: self.via(pipe)("fuse_serial_lora", names, scale),
            lambda: self.truth.fuse(weights, scale),
            broken,
            must=self.easy and bool(held),
            may=not self.truth.clash(weights),
        )

    @precondition(lambda self: self.truth.fused is not None)
    @rule(pipe=st.booleans(), broken=FAULTS)
    def unfuse(self, pipe: bool, broken: Any) -> None:
        must = self.place == "plain" and not self.lora and not self.foreign
        self.verb(lambda: self.via(pipe)("unfuse_serial_lora"), self.truth.unfuse, broken, must)

    @precondition(lambda self: len(self.truth.adapters) > 1)
    @rule(draw=st.integers(1, 31), weights=st.lists(st.sampled_from([1.0, 0.5, -0.3]), min_size=5, max_size=5),
          broken=FAULTS)  # fmt: skip
    def merge(self, draw: int, weights: list[float], broken: Any) -> None:
        chosen = dict(zip(self.names(draw), weights, strict=False))
        assume(chosen)
        name = self.new_name("m")
        sums: dict[str, Any] = {}
        for member, weight in chosen.items():
            for key, terms in self.truth.adapters[member].items():
                sums.setdefault(key, []).extend((weight * s, A, B) for s, A, B in terms)
        after = self.truth.plus_adapter(name, sums, self.truth.wholes(chosen), None)
        self.verb(
            lambda: sl.merge_serial_lora(self.model, list(chosen), list(chosen.values()), name),
            lambda: after,
            broken,
            must=self.easy and self.dtype == torch.float32,
            may=not self.truth.clash(chosen),
        )

    @rule(rank=st.integers(2, 8), samples=st.integers(1, 4), pipe=st.booleans(), broken=FAULTS)
    def reserve(self, rank: int, samples: int, pipe: bool, broken: Any) -> None:
        assume(not self.reserved)
        self.verb(
            lambda: self.via(pipe)("reserve_serial_lora", (rank, 3), samples=samples),
            lambda: self.truth, broken, may=not any(self.truth.whole.values()),
        )  # fmt: skip
        self.reserved = sl.serial_lora_status(self.model).capacity is not None
