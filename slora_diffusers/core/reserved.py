"""Reserved room at one pair: operands of fixed shapes, so that no change of adapters, scale or mix compiles anything.

    x~_b = x_b + B (G_b * (A x_b))        A: R x d, B: d x R, the adapters side by side; G_b: one gain per row of A

Which adapters a row of the batch has, and how strongly, are values of the gate G. What was recorded (torch.compile,
torch.export, a CUDA graph) reads these very tensors, which are written in place before it runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pair

Matrices = tuple[Tensor, Tensor]


def is_recording(x: Tensor) -> bool:
    """Whether what runs on x now is being recorded, to be run again without Python."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


class Reserved(nn.Module):
    """The operands of one pair for adapters of a summed rank.

    Args:
        rank: R, the room for the ranks of all adapters of a batch.
        samples: Samples of a batch that can have adapters of their own.
        features: Width d of the input.
        like: A tensor of the dtype and on the device that the operands get.
    """

    A: Tensor
    B: Tensor
    gate: Tensor
    layout: Tensor

    def __init__(self, rank: int, samples: int, features: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", like.new_zeros(rank, features), persistent=False)
        self.register_buffer("B", like.new_zeros(features, rank), persistent=False)
        self.register_buffer("gate", like.new_zeros(samples, rank), persistent=False)
        # Rows after which the samples come again, and rows of one sample, side by side. Not as a vector (2,): the
        # values of one of up to eight numbers are written into the code that AOTInductor makes.
        self.register_buffer("layout", torch.ones(1, 2, dtype=torch.long, device=like.device), persistent=False)
        self.placed: dict[str, _Place] = {}

    def forward(self, x: Tensor, batch: int | None) -> Tensor:
        """x~ (B, ..., d) of x, where `batch` is the size of the model's own batch."""
        h = F.linear(x, self.A.to(x))  # (B, ..., R)
        return pair.shift_from(x, h * self._gains(x, batch).to(x), self.B.to(x))

    def _gains(self, x: Tensor, batch: int | None) -> Tensor:
        """The gains of each row (B, 1, ..., R), or of all (R,); NaN where the batch does not hold the samples."""
        period, each = self.layout[0].unbind()
        if batch is not None and x.shape[0] != batch:  # other axes are folded into it: whose row is whose is not known
            return torch.where(period == 1, self.gate[0], torch.nan)
        row = torch.arange(x.shape[0], device=x.device)
        gains = torch.where(x.shape[0] % period == 0, self.gate[row % period // each], torch.nan)
        return gains.view(-1, *[1] * (x.ndim - 2), gains.shape[-1])

    @torch.no_grad()
    def fill(self, gains: Sequence[Mapping[str, float]], each: int, read: Callable[[str], Matrices]) -> bool:
        """Write the adapters and gains of each sample; False, and NaN instead, where they do not fit.

        Args:
            gains: {adapter: gain} of each sample; one for all samples alike.
            each: Rows of one sample, side by side.
            read: Gives the A (r, d) and B (d, r) of an adapter.
        """
        matrices = {name: read(name) for name in sorted({name for sample in gains for name in sample})}
        rank = sum(len(A) for A, _ in matrices.values())
        if rank > len(self.A) or len(gains) > len(self.gate):
            self.gate.fill_(torch.nan)
            return False
        self._place(matrices)
        gate = torch.zeros(len(gains), self.gate.shape[1])
        for row, sample in zip(gate, gains, strict=True):
            for name, gain in sample.items():
                row[self.placed[name].columns] = gain
        self.gate[: len(gains)].copy_(gate)
        self.layout[0].copy_(torch.tensor([1 if len(gains) == 1 else len(gains) * each, each]))
        return True

    def _place(self, matrices: Mapping[str, Matrices]) -> None:
        """Have these adapters in A and B. Others stay beside them, for the next batch, as long as there is room."""
        held = {n: p for n, p in self.placed.items() if n not in matrices or p.holds(*matrices[n])}
        needed = {n: p for n, p in held.items() if n in matrices}
        for kept in (held, needed, {}):  # what stays where it is: all, what this batch needs, nothing
            if (places := self._fit(kept, matrices)) is not None:
                break
        else:
            raise AssertionError("the caller has seen that there is room")
        for name in matrices:
            if kept.get(name) is not places[name]:
                self.A[places[name].columns].copy_(matrices[name][0])
                self.B[:, places[name].columns].copy_(matrices[name][1])
        self.placed = places

    def _fit(self, kept: Mapping[str, _Place], matrices: Mapping[str, Matrices]) -> dict[str, _Place] | None:
        """Places for all, each new one at the first gap that is wide enough; None if there is none."""
        places = dict(kept)
        for name, (A, B) in matrices.items():
            if name in places:
                continue
            start = 0
            for columns in sorted((p.columns for p in places.values()), key=lambda columns: columns.start):
                if columns.start - start >= len(A):
                    break
                start = columns.stop
            if start + len(A) > len(self.A):
                return None
            places[name] = _Place(slice(start, start + len(A)), A, B)
        return places

    def state(self) -> Any:
        """What the operands hold, for `restore`."""
        return [buffer.clone() for buffer in self.buffers()], dict(self.placed)

    @torch.no_grad()
    def restore(self, state: Any) -> None:
        """Fill the operands as they were: in place, for compiled graphs hold these very tensors."""
        for buffer, held in zip(self.buffers(), state[0], strict=True):
            buffer.copy_(held)
        self.placed = dict(state[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "placed": {}}


class _Place:
    """Where an adapter lies in the operands, and which tensors, in which state, were copied there."""

    def __init__(self, columns: slice, *matrices: Tensor) -> None:
        self.columns = columns
        self.copied = [(weakref.ref(matrix), *_state(matrix)) for matrix in matrices]

    def holds(self, *matrices: Tensor) -> bool:
        """Whether what was copied is what these tensors hold now."""
        now = [(matrix, *_state(matrix)) for matrix in matrices]
        return all(a[0]() is b[0] and a[1:] == b[1:] for a, b in zip(self.copied, now, strict=True))


def _state(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), -1 if matrix.is_inference() else matrix._version
