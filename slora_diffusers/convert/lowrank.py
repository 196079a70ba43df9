"""A product of two thin matrices, `dW = B A`, and what converting needs of it: stack, norm, truncate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SerialLoraError

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through items with a description, showing progress on the way."""


def silently(items: Sequence[Any], description: str) -> Iterable[Any]:
    """The `Track` that shows nothing."""
    return items


@dataclass(frozen=True)
class LowRank:
    """`dW = B A` with A (r, d) and B (out, r); every scale is in the matrices."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return self.A.numel() + self.B.numel()

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same in another dtype."""
        return LowRank(self.A.to(dtype), self.B.to(dtype))

    def norm(self) -> float:
        """Frobenius norm of B A."""
        if self.rank >= min(self.B.shape[0], self.A.shape[1:].numel()):
            return torch.linalg.vector_norm(self.B.double() @ self.A.double().flatten(1)).item()
        return torch.linalg.vector_norm(self.singular_values()).item()

    def singular_values(self) -> Tensor:
        """Singular values of B A, (min(r, d, out),), in float64."""
        (_, R_B), (_, R_A) = self._qr()
        return torch.linalg.svdvals(R_B @ R_A.T)

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """The nearest product of a lower rank in Frobenius norm, by SVD, and its distance.

        Both factors get the square root of the singular values, so that neither is large where the other is small.
        """
        if rank >= self.rank:
            return self, 0.0
        (Q_B, R_B), (Q_A, R_A) = self._qr()
        U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)  # dW = Q_B U sigma Vh Q_A^T
        root = sigma[:rank].sqrt()
        B = Q_B @ (U[:, :rank] * root)
        A = (root[:, None] * Vh[:rank]) @ Q_A.T
        lost = torch.linalg.vector_norm(sigma[rank:]).item()
        return LowRank(A.to(self.A.dtype).reshape(-1, *self.A.shape[1:]), B.to(self.B.dtype)), lost

    def rank_for(self, tolerance: float) -> int:
        """The least rank that holds the product to a relative error."""
        left = self.singular_values().square().flip(0).cumsum(0).flip(0).sqrt()  # lost at the ranks 0, 1, 2, ...
        return max(1, int((left > tolerance * left[0]).sum()))

    def thin(self, tolerance: float = 1e-6) -> LowRank:
        """The same product at the least rank that holds it to a relative error."""
        return self.truncated(self.rank_for(tolerance))[0]

    def _qr(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return torch.linalg.qr(self.B.double()), torch.linalg.qr(self.A.double().flatten(1).T)


Products = dict[str, dict[str, LowRank]]
"""{component: {place in it: product}}."""


AUTO = "auto"
Rank = int | str | None
"""A rank, AUTO for the least that a tolerance allows each product, or None for all of it."""


def truncate(
    sums: Products, rank: Rank, track: Track = silently, tolerance: float = 1e-6
) -> tuple[Products, float, dict[str, float]]:
    """Each product at no more than a rank, the relative error of all together, and of each that was truncated."""
    if rank is None:
        return sums, 0.0, {}
    kept: Products = {component: {} for component in sums}
    errors: dict[str, float] = {}
    lost = whole = 0.0
    items = [(component, key, part) for component, pairs in sums.items() for key, part in pairs.items()]
    to = f"an error of {tolerance:.0e}" if rank == AUTO else f"rank {rank}"
    for component, key, part in track(items, f"Truncating to {to}"):
        norm = part.norm()
        r = part.rank_for(tolerance) if isinstance(rank, str) else rank
        kept[component][key], distance = part.truncated(r)
        lost, whole = lost + distance**2, whole + norm**2
        if part.rank > r:
            errors[f"{component}.{key}" if component else key] = distance / norm if norm else 0.0
    return kept, (lost / whole) ** 0.5 if whole else 0.0, errors


def total(parts: Sequence[LowRank]) -> LowRank:
    """The sum of products of one shape, exactly, by concatenation: [B_1, B_2, ...] [A_1; A_2; ...]."""
    if len(parts) == 1:
        return parts[0]
    return LowRank(torch.cat([p.A for p in parts]), torch.cat([p.B for p in parts], dim=1))


def below_each_other(parts: Sequence[LowRank | None], rows: Sequence[int]) -> LowRank:
    """Products that read one input, stacked by output: dW = [B_1 A_1; B_2 A_2; ...], with zeros where there is none.

    Parts that share their A stay at its rank; others go block-diagonal, at the sum of the ranks.
    """
    given = [part for part in parts if part is not None]
    distinct = {id(part.A): part.A for part in given}
    A = torch.cat(list(distinct.values()))
    starts, start = {}, 0
    for key, matrix in distinct.items():
        starts[key], start = start, start + matrix.shape[0]
    B = given[0].B.new_zeros(sum(rows), A.shape[0])
    row = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            column = starts[id(part.A)]
            B[row : row + height, column : column + part.rank] = part.B
        row += height
    return LowRank(A, B)


@dataclass(frozen=True, kw_only=True)
class Sized:
    """The part of a report that says how large a result is, and how exact.

    Args:
        ranks: Ranks of its products, each once.
        parameters: Its parameters.
        relative_error: ||dW - dW_r||_F / ||dW||_F over all products; 0 unless a rank truncated them.
        errors: The same of every product that was truncated.
    """

    ranks: tuple[int, ...]
    parameters: int
    relative_error: float
    errors: dict[str, float]

    def size(self) -> str:
        """Rank, parameters and error in words."""
        ranks = "-".join(map(str, sorted({min(self.ranks), max(self.ranks)})))
        exact = f"relative error {self.relative_error:.2e}" if self.errors else "exact"
        return f"rank {ranks}, {self.parameters:,} parameters, {exact}"


def sizes(parts: Sequence[LowRank], relative_error: float, errors: dict[str, float]) -> dict[str, Any]:
    """The fields of `Sized` for these products."""
    ranks = tuple(sorted({part.rank for part in parts}))
    numel = sum(part.numel for part in parts)
    return {"ranks": ranks, "parameters": numel, "relative_error": relative_error, "errors": errors}


def check_rank(rank: Any, auto: bool = True) -> None:
    """Raise SerialLoraError unless a rank is None, "auto" where that is allowed, or a whole number of at least 1."""
    if rank is None or (auto and rank == AUTO):
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        also = ", 'auto'" if auto else ""
        raise SerialLoraError(f"rank must be a whole number of at least 1{also}, or None; got {rank!r}.")
