"""The state machine: which verbs, placements, neighbours and faults a walk draws, and what must hold after each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.hooks import apply_group_offloading
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor, nn

import slora_diffusers as sl
from tests.faults import Fault, OutOfMemoryFault, fault_at
from tests.test_placement import device_map, group_blocks, group_leaves, sequential, whole
from tests.walks.adapters import BASE, CONFIGS, given
from tests.walks.truth import Truth, Weights

FOLDER = tempfile.TemporaryDirectory(prefix="walks")
FAULTS = st.one_of(*[st.none()] * 3, st.tuples(st.integers(1, 400), st.sampled_from((Fault, OutOfMemoryFault))))
WEIGHTS = st.one_of(
    st.sampled_from([1.0, 0.5, -0.7, 0.0, 2]),
    st.fixed_dictionaries({r"transformer_blocks\.0\..*": st.sampled_from([0.0, 0.4, 1.5])}),
)


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
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}


class Walk(RuleBasedStateMachine):
    """One model, the pipeline around it, and the truth about both."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = BASE.build()
        net = BASE.build().double()
        state = dict((*net.named_parameters(), *net.named_buffers()))
        self.truth = Truth(net, {name: tensor.detach().clone() for name, tensor in state.items()})
        self.place = "plain"
        self.dtype, self.coarsest = torch.float32, torch.float32
        self.qkv = self.reserved = self.foreign = False
        self.lora: dict[str, Tensor] = {}
        self.lora_fused = False
        self.others: list[tuple[nn.Module, Tensor]] = []
        self.count = 0

    # What holds after every step.

    def arguments(self) -> dict[str, Any]:
        """The model's inputs, in its dtype."""
        given = BASE.arguments()
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in given.items()}

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the model gives now."""
        return self.model(**self.arguments())[0].double()

    def agrees(self, output: Tensor, truth: Truth, weights: dict[str, Weights] | None = None) -> bool:
        """Whether an output is the one that the truth asks for, as far as the dtypes of the walk allow."""
        wanted = truth.output(BASE.arguments(), weights)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.coarsest])
        return bool(torch.linalg.vector_norm(output - wanted) <= tolerance * torch.linalg.vector_norm(wanted))

    def says(self, truth: Truth) -> bool:
        """Whether the status tells what the truth does."""
        status = sl.serial_lora_status(self.model)
        held = truth.active if truth.fused is None else truth.fused
        fused = set() if truth.fused is None else set(truth.fused)
        return (
            set(status.adapters) == set(truth.adapters) and status.weights == dict(held) and set(status.fused) == fused
        )

    def settle(self, *candidates: Truth) -> None:
        """The truth is now the first of these that status and output both tell; one of them must be."""
        told = [truth for truth in candidates if self.says(truth)]
        assert told, f"the status is none of what it may be: {sl.serial_lora_status(self.model)}"
        output = self.output()
        fits = [truth for truth in told if self.agrees(output, truth)]
        assert fits, f"the output is not the one of the status: {sl.serial_lora_status(self.model)}"
        self.truth = fits[0]

    def verb(self, call: Callable[[], Any], after: Callable[[], Truth], broken: Any = None, must: bool = False) -> bool:
        """Call a verb: it does what it says, or is refused, or is interrupted; then all is as before or as after."""
        before = self.truth
        try:
            with fault_at(broken[0], kind=broken[1]) if broken else nullcontext():
                call()
        except sl.SerialLoraError as error:
            if must and not broken:
                raise AssertionError(f"refused without need: {error}") from error
            self.settle(before)
            return False
        except (OutOfMemoryFault, Fault):
            self.settle(before, after())
            return self.truth is not before
        self.settle(after())
        return True

    def via(self, pipe: bool) -> Any:
        """Where a verb is called: the package's function on the model, or the pipeline's method."""
        owner: Any = self.pipeline() if pipe else sl
        first = () if pipe else (self.model,)
        return lambda name, *args, **kwargs: getattr(owner, name)(*first, *args, **kwargs)

    def pipeline(self) -> Any:
        """A pipeline with the model and nothing else, or one made from such a pipeline."""
        nothing = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        pipe = StableDiffusion3Pipeline(**dict.fromkeys(nothing), transformer=self.model, scheduler=scheduler)
        return StableDiffusion3Pipeline.from_pipe(pipe, dtype=self.dtype) if self.count % 2 else pipe

    def names(self, draw: int) -> list[str]:
        """Some of the adapters' names."""
        return [name for i, name in enumerate(sorted(self.truth.adapters)) if draw >> i & 1]

    @property
    def easy(self) -> bool:
        """Whether nothing is there that a verb may refuse to work beside."""
        return self.place == "plain" and not self.lora and not self.reserved and self.truth.fused is None

    # The library's verbs.

    @rule(number=st.integers(0, len(CONFIGS) - 1), pipe=st.booleans(), weight=st.sampled_from([1.0, 0.5, -1.0]),
          from_file=st.booleans(), broken=FAULTS)  # fmt: skip
    def load(self, number: int, pipe: bool, weight: float, from_file: bool, broken: Any) -> None:
        assume(len(self.truth.adapters) < 5)
        adapter, name = given(number, Path(FOLDER.name)), f"a{self.count}"
        self.count += 1
        source = adapter.path if from_file else adapter.state

        def after() -> Truth:
            t = self.truth
            return replace(t, adapters={**t.adapters, name: adapter.terms}, active={**t.active, name: weight})

        self.verb(lambda: self.via(pipe)("load_serial_lora", source, name, weight=weight), after, broken, self.easy)

    @rule(rank=st.integers(1, 3), broken=FAULTS)
    def add(self, rank: int, broken: Any) -> None:
        assume(len(self.truth.adapters) < 5)
        name, config = f"n{self.count}", sl.SerialLoraConfig(rank=rank, alpha=2)
        self.count += 1

        def after() -> Truth:
            t = self.truth
            return replace(t, adapters={**t.adapters, name: {}}, active={**t.active, name: 1.0})

        if self.verb(lambda: sl.add_serial_lora(self.model, config, name), after, broken, self.easy):
            self.train(name)

    def train(self, name: str) -> None:
        """Write numbers into an adapter's parameters, as an optimizer does."""
        generator = torch.Generator().manual_seed(self.count)
        for parameter in sl.serial_lora_parameters(self.model, name):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.truth = replace(self.truth, adapters={**self.truth.adapters, name: self.terms(name)})
        self.settle(self.truth)

    def terms(self, name: str) -> Any:
        """An adapter's terms, of its matrices in the model."""
        from tests.reference import terms_of

        state = sl.serial_lora_state_dict(self.model, name)
        rank = next(iter(state.values())).shape[0]
        return terms_of((state, 2 / rank))

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=st.integers(0, 31), weights=st.lists(WEIGHTS, min_size=5, max_size=5), pipe=st.booleans(), broken=FAULTS)
    def activate(self, draw: int, weights: Sequence[Weights], pipe: bool, broken: Any) -> None:
        chosen = dict(zip(self.names(draw), weights, strict=False))
        given = list(chosen.values())
        self.verb(
            lambda: self.via(pipe)("set_serial_lora", list(chosen), given),
            lambda: replace(self.truth, active=chosen),
            broken,
        )

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=st.integers(1, 31), pipe=st.booleans(), broken=FAULTS)
    def delete(self, draw: int, pipe: bool, broken: Any) -> None:
        names = self.names(draw)
        assume(names)

        def after() -> Truth:
            kept = {n: a for n, a in self.truth.adapters.items() if n not in names}
            return replace(
                self.truth, adapters=kept, active={n: w for n, w in self.truth.active.items() if n not in names}
            )

        self.verb(lambda: self.via(pipe)("delete_serial_lora", names), after, broken, self.easy)

    @rule(pipe=st.booleans(), broken=FAULTS)
    def unload(self, pipe: bool, broken: Any) -> None:
        def after() -> Truth:
            return replace(self.truth, adapters={}, active={}, fused=None, unfused={})

        if self.verb(lambda: self.via(pipe)("unload_serial_lora"), after, broken, must=True):
            self.reserved = False

    @precondition(lambda self: self.truth.adapters and self.truth.fused is None)
    @rule(draw=st.integers(0, 31), scale=st.sampled_from([1.0, 0.5, 0.0]), pipe=st.booleans(), broken=FAULTS)
    def fuse(self, draw: int, scale: float, pipe: bool, broken: Any) -> None:
        names = sorted({*self.names(draw), *self.truth.active}) if draw else None
        held = list(self.truth.active) if names is None else names
        weights = {name: self.truth.active.get(name, 1.0) for name in held}
        self.verb(
            lambda: self.via(pipe)("fuse_serial_lora", names, scale),
            lambda: self.truth.fuse(weights, scale),
            broken,
            must=self.easy and bool(held),
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
        name = f"m{self.count}"
        self.count += 1

        def after() -> Truth:
            sums: dict[str, Any] = {}
            for member, weight in chosen.items():
                for key, terms in self.truth.adapters[member].items():
                    sums.setdefault(key, []).extend((weight * s, A, B) for s, A, B in terms)
            return replace(self.truth, adapters={**self.truth.adapters, name: sums})

        self.verb(
            lambda: sl.merge_serial_lora(self.model, list(chosen), list(chosen.values()), name),
            after,
            broken,
            must=self.easy and self.dtype == torch.float32,
        )

    @rule(rank=st.integers(2, 8), pipe=st.booleans(), broken=FAULTS)
    def reserve(self, rank: int, pipe: bool, broken: Any) -> None:
        assume(not self.reserved)
        if self.verb(lambda: self.via(pipe)("reserve_serial_lora", (rank, 3)), lambda: self.truth, broken):
            self.reserved = True
        self.reserved = self.reserved or sl.serial_lora_status(self.model).capacity is not None

    @precondition(lambda self: self.truth.adapters)
    @rule(draw=st.integers(0, 4), pipe=st.booleans())
    def save_and_load_elsewhere(self, draw: int, pipe: bool) -> None:
        name = sorted(self.truth.adapters)[draw % len(self.truth.adapters)]
        path = self.via(pipe)("save_serial_lora", Path(FOLDER.name) / "saved", name)
        fresh = BASE.build()
        sl.load_serial_lora(fresh, path, "it")
        base = {
            n: t.detach().double()
            for n, t in (*fresh.named_parameters(), *fresh.named_buffers())
            if n in self.truth.base
        }
        truth = Truth(self.truth.net, base, {"it": self.truth.adapters[name]}, {"it": 1.0})
        with torch.no_grad():
            output = fresh(**BASE.arguments())[0].double()
        assert self.agrees(output, truth)
        self.settle(self.truth)

    @precondition(lambda self: self.truth.adapters and self.truth.fused is None)
    @rule(scale=st.sampled_from([0.0, 0.5, -1.0, 2.0]), how=st.sampled_from(["scale", "disable", "batch"]))
    def inside_a_block(self, scale: float, how: str) -> None:
        if how == "batch":
            self.per_sample()
            return
        block = sl.serial_lora_scale(self.model, scale) if how == "scale" else sl.disable_serial_lora(self.model)
        factor = scale if how == "scale" else 0.0
        scaled = {n: _times(w, factor) for n, w in self.truth.active.items()}
        with block:
            assert self.agrees(self.output(), self.truth, scaled)
        self.settle(self.truth)

    def per_sample(self) -> None:
        """Each sample has the adapter that its place in the list names."""
        names: list[str | None] = [*sorted(self.truth.adapters)[:1], None]
        with sl.serial_lora_batch(self.model, names):
            output = self.output()
        for i, name in enumerate(names):
            held: dict[str, Weights] = {} if name is None else {name: self.truth.active.get(name, 1.0)}
            wanted = self.truth.output(BASE.arguments(), held)
            assert self.agrees(torch.cat([wanted[:i], output[i : i + 1], wanted[i + 1 :]]), self.truth, held)
        self.settle(self.truth)


def _times(weight: Weights, factor: float) -> Weights:
    if not isinstance(weight, dict):
        return float(weight) * factor  # pyright: ignore[reportArgumentType]
    return {**{pattern: w * factor for pattern, w in weight.items()}, ".*": factor}
