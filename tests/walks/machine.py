"""The state machine's ground: one model, its pipeline, the truth about both, and what must hold after every step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize
from torch import Tensor, nn

import slora_diffusers as sl
from tests.faults import Fault, OutOfMemoryFault, fault_at
from tests.walks.grounds import GROUNDS
from tests.walks.truth import Truth, Weights

FOLDER = tempfile.TemporaryDirectory(prefix="walks")
FAULTS = st.one_of(*[st.none()] * 3, st.tuples(st.integers(1, 400), st.sampled_from((Fault, OutOfMemoryFault))))
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}


class Machine(RuleBasedStateMachine):
    """One model, the pipeline around it, and the truth about both."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "plain"
        self.dtype, self.coarsest = torch.float32, torch.float32
        self.qkv = self.reserved = self.foreign = self.compiled = False
        self.lora: dict[str, Tensor] = {}
        self.lora_fused = False
        self.others: list[tuple[nn.Module, Tensor]] = []
        self.count = 0

    @initialize(ground=st.sampled_from(list(GROUNDS)))
    def begin(self, ground: str) -> None:
        self.called, self.ground = ground, GROUNDS[ground]
        self.model: nn.Module = self.ground.tiny.build()
        net = self.ground.tiny.build().double()
        state = dict((*net.named_parameters(), *net.named_buffers()))
        self.truth = Truth(net, {name: tensor.detach().clone() for name, tensor in state.items()})

    def arguments(self) -> dict[str, Any]:
        """The model's inputs, in its dtype."""
        given = self.ground.tiny.arguments()
        return {k: v.to(self.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the model gives now."""
        return self.model(**self.arguments())[0].double()

    def wanted(self, weights: Mapping[str, Weights] | None = None, truth: Truth | None = None) -> Tensor:
        """What it must give, with these weights instead of those that are set."""
        return (truth or self.truth).output(self.ground.tiny.arguments(), weights)

    def near(self, output: Tensor, wanted: Tensor, tolerance: float = 0.0) -> bool:
        """Whether they are the same as far as the dtypes of the walk allow."""
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.coarsest], tolerance)
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
        fits = [truth for truth in told if self.near(output, self.wanted(truth=truth))]
        assert fits, f"the output is not the one of the status: {sl.serial_lora_status(self.model)}"
        self.truth = fits[0]

    def verb(
        self,
        call: Callable[[], Any],
        after: Callable[[], Truth],
        broken: Any = None,
        must: bool = False,
        may: bool = True,
    ) -> bool:
        """Call a verb: it does what it says, or is refused, or is interrupted; then all is as before or as after.

        Args:
            call: The verb.
            after: What must hold once it is done.
            broken: A line of it, and what is raised there.
            must: Whether it must not be refused.
            may: Whether it may be done.

        Returns:
            Whether it was done.
        """
        before = self.truth
        try:
            with fault_at(broken[0], kind=broken[1]) if broken else nullcontext():
                call()
        except sl.SerialLoraError as error:
            if must and may and not broken:
                raise AssertionError(f"refused without need: {error}") from error
            self.settle(before)
            return False
        except (OutOfMemoryFault, Fault):
            self.settle(before, *([after()] if may else []))
            return self.truth is not before
        assert may, "what cannot be right was not refused"
        self.settle(after())
        return True

    def via(self, pipe: bool) -> Any:
        """Where a verb is called: the package's function on the model, or the pipeline's method."""
        owner: Any = self.pipeline() if pipe else sl
        first = () if pipe else (self.model,)
        return lambda name, *args, **kwargs: getattr(owner, name)(*first, *args, **kwargs)

    def pipeline(self) -> Any:
        """A pipeline with the model and nothing else, or one made from such a pipeline."""
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        pipe = self.ground.wrap(self.model, scheduler)
        return self.ground.pipeline.from_pipe(pipe, dtype=self.dtype) if self.count % 2 else pipe

    def fresh(self, truth: Truth) -> nn.Module:
        """Another model with the base's weights of a truth."""
        model = self.ground.tiny.build()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(truth.base[name])
        return model

    def new_name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count - 1}"

    def names(self, draw: int) -> list[str]:
        """Some of the adapters' names."""
        return [name for i, name in enumerate(sorted(self.truth.adapters)) if draw >> i & 1]

    def some(self, draw: int) -> str:
        """One of the adapters' names."""
        return sorted(self.truth.adapters)[draw % len(self.truth.adapters)]

    @property
    def base(self) -> Truth:
        """The truth of the base alone, unfused."""
        held = self.truth if self.truth.fused is None else self.truth.unfuse()
        return replace(held, adapters={}, whole={}, active={}, lora={})

    @property
    def easy(self) -> bool:
        """Whether nothing is there that a verb may refuse to work beside."""
        return self.place == "plain" and not self.lora and not self.reserved and self.truth.fused is None
