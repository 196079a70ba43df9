"""The best pair for a change of weights: M = B A of rank r that minimises ||S M - D||_F, in closed form.

With S = [W_q; W_k; W_v] and D = [dW_q; dW_k; dW_v] of the projections that read one input, it is
`M = S^+ U_r Sigma_r V_r^T`, with U Sigma V^T the SVD of S S^+ D. A ridge, l ||M||^2 besides, is the same problem with
sqrt(l) I below S and zeros below D, so it has the same closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.sites import Slot, out_features
from .lowrank import LowRank

RIDGE = 1e-6


@dataclass(frozen=True)
class SiteError:
    """How well one pair carries the LoRA's parts on its projections.

    Args:
        key: `<component>.<site>.serial_lora.<pair>`.
        rank: Rank of the pair.
        relative_error: ||S M - D||_F / ||D||_F, of A and B as they are stored (fp32).
        norm: ||D||_F, the size of the LoRA's change there.
        amplification: ||M||_2, the size of the pair's change of its input.
        curve: The least relative error at the ranks 0, 1, 2, ...
    """

    key: str
    rank: int
    relative_error: float
    norm: float
    amplification: float
    curve: tuple[float, ...]


def closed_form(S: Tensor, D: LowRank, rank: int | None, ridge: float = RIDGE) -> tuple[LowRank, Tensor]:
    """M = B A of rank r that minimises ||S M - D||_F^2 + l ||M||_F^2, with sqrt(l) = ridge * ||S||_F / sqrt(d).

    Args:
        S: (n, d), the weights below each other.
        D: (n, d), the change of them, as a product.
        rank: r; `None` is the rank of D's factors.
        ridge: Root of the ridge's weight, relative to S.

    Returns:
        M, in float64, and the singular values of Q^T D, where S = Q C: what each rank adds.
    """
    S = S.double()
    root = ridge * torch.linalg.matrix_norm(S).item() / S.shape[1] ** 0.5
    ridged = torch.cat([S, root * torch.eye(S.shape[1], dtype=S.dtype, device=S.device)])
    C = torch.linalg.qr(ridged, mode="r").R  # S = Q C, so that S S^+ D = Q (Q^T D) and S^+ Q = C^-1
    Q_D = torch.linalg.solve_triangular(C.T, S.T @ D.B.double(), upper=False)  # Q^T D = (Q_D) A
    Q_A, R_A = torch.linalg.qr(D.A.double().T)
    U, sigma, Vh = torch.linalg.svd(Q_D @ R_A.T, full_matrices=False)  # Q^T D = U sigma Vh Q_A^T
    r = min(rank or sigma.shape[0], sigma.shape[0])
    half = sigma[:r].sqrt()
    B = torch.linalg.solve_triangular(C, U[:, :r] * half, upper=True)
    A = (half[:, None] * Vh[:r]) @ Q_A.T
    return LowRank(A, B), sigma


def compress_slot(
    slot: Slot, weights: Sequence[Tensor], changes: Mapping[str, LowRank], rank: int | None, ridge: float
) -> tuple[LowRank, SiteError]:
    """The pair of a slot, in fp32, and how well it does.

    Args:
        slot: Where the pair goes.
        weights: The base's weights (out, d) of its projections.
        changes: {name of a projection: its dW}; the others stay.
        rank: Rank of the pair, `None` for the rank of the change.
        ridge: As for `closed_form`.
    """
    S = torch.cat([W.detach().double() for W in weights])  # (n, d)
    heights = [out_features(projection) for projection in slot.projections]
    D = stacked([changes.get(projection.name) for projection in slot.projections], heights, S)
    M, sigma = closed_form(S, D, rank, ridge)
    M = _balanced(M).to(torch.float32)
    norm = D.norm()
    gap = LowRank(torch.cat([M.A.double(), D.A.double()]), torch.cat([S @ M.B.double(), -D.B.double()], dim=1))
    left = (norm**2 - torch.cat([sigma.new_zeros(1), sigma.square().cumsum(0)])).clamp_min(0).sqrt()
    curve = tuple((left / norm).tolist()) if norm else (0.0,)
    error = gap.norm() / norm if norm else 0.0
    return LowRank(M.A.cpu(), M.B.cpu()), SiteError(slot.key, M.rank, error, norm, M.singular_values()[0].item(), curve)


def stacked(parts: Sequence[LowRank | None], heights: Sequence[int], like: Tensor) -> LowRank:
    """D = [dW_1; dW_2; ...] with zeros for projections that are left alone, as a product of the rank that it needs.

    Parts are made of one orthonormal basis of all their A's rows, so that equal A's count once.
    """
    given = [part for part in parts if part is not None]
    width = like.shape[1]
    if sum(part.rank for part in given) >= width:
        rows = [
            p.B.to(like) @ p.A.to(like) if p else like.new_zeros(h, width) for p, h in zip(parts, heights, strict=True)
        ]
        return LowRank(torch.eye(width).to(like), torch.cat(rows))
    basis, sigma, Vh = torch.linalg.svd(torch.cat([part.A for part in given]).to(like), full_matrices=False)
    k = int((sigma > sigma[0] * 1e-9).sum()) or 1
    B = like.new_zeros(sum(heights), k)
    row = start = 0
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            B[row : row + height] = part.B.to(like) @ (basis[start : start + part.rank, :k] * sigma[:k])
            start += part.rank
        row += height
    return LowRank(Vh[:k], B)


def _balanced(M: LowRank) -> LowRank:
    """The same product with A and B of one size, which rounding to fp32 likes."""
    a, b = torch.linalg.vector_norm(M.A), torch.linalg.vector_norm(M.B)
    scale = (b / a).sqrt() if a > 0 and b > 0 else torch.ones_like(a)
    return LowRank(M.A * scale, M.B / scale)
