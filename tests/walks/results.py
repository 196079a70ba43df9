"""Rules of what a walk's model gives to others, and of blocks: files, LoRAs, models of stock diffusers, calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from peft import PeftModel

import slora_diffusers as sl
from tests.walks.machine import FOLDER
from tests.walks.truth import Truth, Weights, weight_at
from tests.walks.verbs import FIVE_WEIGHTS, SEVERAL, Verbs

SCALES = st.sampled_from([0.0, 0.5, -1.0, 2.0, 1.0])
SAMPLE = st.tuples(SEVERAL, st.sampled_from([None, None, 0.5, -1.0, 0.0]))
BLOCKS = st.lists(
    st.one_of(
        st.tuples(st.just("scale"), SCALES),
        st.tuples(st.just("disable"), st.just(0.0)),
        st.tuples(st.just("batch"), st.lists(SAMPLE, min_size=1, max_size=2)),
        st.tuples(st.just("batch"), st.lists(SAMPLE, min_size=2, max_size=2)),
    ),
    min_size=1,
    max_size=3,
)
Sample = dict[str, float | None]


class Results(Verbs):
    """A walk of verbs and of what comes of them."""

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=st.integers(0, 4), pipe=st.booleans())
    def save_and_load_elsewhere(self, draw: int, pipe: bool) -> None:
        name = self.some(draw)
        path = self.via(pipe)("save_serial_lora", Path(FOLDER.name) / "saved", name)
        model, truth = self.fresh(self.base), self.base
        sl.load_serial_lora(model, path, "it")
        truth = truth.plus_adapter("it", self.truth.adapters[name], self.truth.whole[name], 1.0)
        self.check_elsewhere(model, truth)

    @precondition(lambda self: not self.lora and not self.qkv and self.place == "plain")
    @rule()
    def save_the_model(self) -> None:
        """Stock diffusers loads the base, or what was fused."""
        folder = Path(FOLDER.name) / "model"
        self.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        model = type(self.ground.tiny.build()).from_pretrained(folder).float()
        self.check_elsewhere(model, replace(self.truth, active={}))

    @precondition(lambda self: self.truth.adapters and not self.qkv)
    @rule(draw=st.integers(0, 4), pipe=st.booleans())
    def export(self, draw: int, pipe: bool) -> None:
        """PEFT loads a LoRA that equals the adapter."""
        name, folder, held = self.some(draw), Path(FOLDER.name) / "lora", self.truth
        may = not held.whole[name]
        try:
            self.via(pipe)("export_lora", folder, name, "peft", weights=0.5)
        except sl.SerialLoraError:
            assert not (may and self.easy)
            return
        assert may, "modules that no LoRA can hold were left out"
        truth = self.base.plus_adapter("it", held.adapters[name], {}, 0.5)
        folder = folder / "transformer" if pipe else folder
        model = PeftModel.from_pretrained(self.fresh(self.base), folder)
        self.check_elsewhere(model, truth)
        self.settle(self.truth)

    def check_elsewhere(self, model: Any, truth: Truth) -> None:
        """Another model gives what a truth says, and nothing has changed here."""
        with torch.no_grad():
            output = model(**self.ground.tiny.arguments())[0].double()
        assert self.near(output, self.wanted(truth=truth))
        self.settle(self.truth)

    @precondition(lambda self: self.truth.adapters and self.truth.fused is None)
    @rule(blocks=BLOCKS, what=st.sampled_from(["nothing", "set", "delete", "raise", "fuse"]), draw=SEVERAL,
          weights=FIVE_WEIGHTS, pipe=st.booleans())  # fmt: skip
    def inside_blocks(
        self, blocks: Sequence[tuple[str, Any]], what: str, draw: int, weights: Sequence[Weights], pipe: bool
    ) -> None:
        """Blocks multiply and nest; a verb inside works, or is refused; afterwards none of it is left."""
        factor, samples = 1.0, None
        try:
            with ExitStack() as stack:
                for kind, given in blocks:
                    if kind == "batch":
                        samples = [dict.fromkeys(self.names(draw), weight) for draw, weight in given]
                        if not self.serves(samples):
                            self.refused_block(samples)
                            return
                        stack.enter_context(self.via(pipe)("serial_lora_batch", [_entry(s) for s in samples]))
                    else:
                        factor *= given
                        name = "serial_lora_scale" if kind == "scale" else "disable_serial_lora"
                        stack.enter_context(self.via(pipe)(name, *([given] if kind == "scale" else [])))
                self.check_inside(factor, samples)
                if what == "raise":
                    raise KeyError(what)
                self.change_inside(what, draw, weights, factor, samples)
                if self.truth.adapters:
                    self.check_inside(factor, samples)
        except KeyError:
            pass
        self.settle(self.truth)

    def check_inside(self, factor: float, samples: Sequence[Sample] | None) -> None:
        """The output of each row is that of its sample."""
        try:
            output = self.output()
        except sl.SerialLoraError:  # what is compiled has no room for it, or no room is reserved for blocks
            assert self.compiled
            return
        for row in range(len(output)):
            held = self.held_by(None if samples is None else samples[row % len(samples)])
            wanted = self.wanted({name: _times(weight, factor) for name, weight in held.items()})
            assert self.near(torch.cat([wanted[:row], output[row : row + 1], wanted[row + 1 :]]), wanted), row

    def held_by(self, sample: Sample | None) -> Mapping[str, Weights]:
        """{adapter: weight} of a sample, or what is set."""
        if sample is None:
            return self.truth.active
        return {name: self.truth.active.get(name, 1.0) if w is None else w for name, w in sample.items()}

    def serves(self, samples: Sequence[Sample]) -> bool:
        """Whether one run serves them all: a module that adapters bring whole is there once."""
        held = [self.held_by(sample) for sample in samples]
        whole = [{n: weight for n, weight in one.items() if self.truth.whole[n]} for one in held]
        paths = {key.rpartition(".")[0] for brought in self.truth.whole.values() for key in brought}
        owners = [
            [{n for n, w in one.items() if f"{p}.weight" in self.truth.whole[n] and weight_at(p, w)} for one in whole]
            for p in paths
        ]
        return all(len(each) <= 1 and each == one[0] for one in owners for each in one)

    def refused_block(self, samples: Sequence[Sample]) -> None:
        try:
            sl.serial_lora_batch(self.model, [_entry(sample) for sample in samples])
        except sl.SerialLoraError:
            return
        raise AssertionError("samples that need different modules were not refused")

    def change_inside(
        self, what: str, draw: int, weights: Sequence[Weights], factor: float, samples: Sequence[Sample] | None
    ) -> None:
        """A verb inside the blocks."""
        names = self.names(draw)
        if what == "set":
            chosen = dict(zip(names, weights, strict=False))
            after = replace(self.truth, active=chosen)
            if samples is None or all(None not in sample.values() for sample in samples):
                self.change(lambda: sl.set_serial_lora(self.model, names, list(chosen.values())), after)
        elif what == "delete" and names:
            served = any(name in sample for sample in samples or () for name in names)
            self.change(lambda: sl.delete_serial_lora(self.model, names), self.truth.without(names), not served)
        elif what == "fuse" and (factor != 1 or samples is not None):
            self.change(lambda: sl.fuse_serial_lora(self.model), self.truth, False)

    def change(self, call: Any, after: Truth, may: bool = True) -> None:
        """The truth after a verb that is done, or refused."""
        try:
            call()
        except sl.SerialLoraError:
            return
        assert may and not after.clash(after.active)
        self.truth = after


def _entry(sample: Sample) -> Any:
    """What a user writes for a sample."""
    if not sample:
        return None
    return [name if weight is None else (name, weight) for name, weight in sample.items()]


def _times(weight: Weights, factor: float) -> Weights:
    if not isinstance(weight, dict):
        return float(weight) * factor  # pyright: ignore[reportArgumentType]
    return {**{pattern: w * factor for pattern, w in weight.items()}, ".*": factor}
