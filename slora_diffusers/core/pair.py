"""The maths of one serial pair, in the paper's symbols: `x~ = (I + s B A) x` with A (r, d) and B (d, r).

Pure functions of tensors. Every scale and weight of an adapter is one number here, its gain g = w s: several adapters
add, so that `stack` makes one pair of them, and the rest need not know how many there are.

Source: Zhong et al., Serial Low-rank Adaptation of Vision Transformer, ICME 2025, arXiv 2503.17750, equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SerialLoraError

_ROWS = 256  # of a weight that are fused at a time: their fp32 copy stays in a CPU's cache


def shift(x: Tensor, A: Tensor, B: Tensor, s: float | Tensor = 1.0) -> Tensor:
    """x~ = x + s B A x, for x of shape (..., d)."""
    return shift_from(x, F.linear(x, A), B, s)


def shift_from(x: Tensor, h: Tensor, B: Tensor, s: float | Tensor = 1.0) -> Tensor:
    """x~ = x + s B h, for x of shape (..., d) and h = A x of shape (..., r)."""
    if x.is_nested or isinstance(s, Tensor):  # nn.TransformerEncoder packs a padded batch so, and has no addmm for it
        return x + F.linear(h, B) * s
    return torch.addmm(x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=s).view_as(x)


def shift_per_sample(x: Tensor, A: Tensor, B: Tensor, s: float = 1.0) -> Tensor:
    """x~_b = x_b + s B_b A_b x_b for each sample b, for x (b, ..., d), A (b, r, d) and B (b, d, r)."""
    x3 = x.reshape(len(x), -1, x.shape[-1])  # (b, n, d)
    return torch.baddbmm(x3, x3 @ A.mT, B.mT, alpha=s).view_as(x)


def stack(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """A = [A_1; A_2; ...] (R, d) and B = [g_1 B_1, g_2 B_2, ...] (d, R), so that B A = sum_i g_i B_i A_i."""
    return torch.cat([A for A, _, _ in pairs]), torch.cat([B * g for _, B, g in pairs], dim=1)


@torch.no_grad()
def fuse(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W' = W (I + B A) for W of shape (out, d), computed in fp32 or better, in W's dtype."""
    A, B = _beside(W, A, B)
    fused = torch.empty_like(W)
    exact = W.new_empty(W[:_ROWS].shape, dtype=A.dtype)  # one for all blocks: fresh memory costs page faults
    for W_i, fused_i in zip(W.split(_ROWS), fused.split(_ROWS), strict=True):
        block = exact[: len(W_i)].copy_(W_i)  # (rows, d)
        fused_i.copy_(block.addmm_(block @ B, A))
    return fused


@torch.no_grad()
def as_lora(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The equivalent LoRA on W (out, d): lora_A = A (R, d) and lora_B = W B (out, R)."""
    A, B = _beside(W, A, B)
    return A, W.to(B.dtype) @ B


def new_matrices(rank: int, features: int, init: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Untrained fp32 A (r, d), drawn as `INITS` says, and B (d, r) = 0, so that x~ = x exactly.

    Raises:
        SerialLoraError: If no start has that name.
    """
    check_init(init)
    A = torch.empty(rank, features, device=device, dtype=torch.float32)
    INITS[init](A)
    return A, torch.zeros(features, rank, device=device, dtype=torch.float32)


def check_init(init: object) -> None:
    """Raise SerialLoraError unless a start of A has that name."""
    if init not in list(INITS):  # compared, not hashed: a file may hold anything
        raise SerialLoraError(f"init must be one of {', '.join(INITS)}; got {init!r}.")


def _kaiming(A: Tensor) -> None:
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))


def _gaussian(A: Tensor) -> None:
    nn.init.normal_(A, std=1 / math.sqrt(len(A)))


GRADIENT = "gradient"
INITS: dict[str, Callable[[Tensor], None]] = {"kaiming": _kaiming, "gaussian": _gaussian, GRADIENT: _kaiming}
"""Name of a start -> what fills A (r, d) in place. B is zero in all of them.

"gradient" is drawn as "kaiming" is: what it stands for takes data, and `gradient_start` puts it there.
"""

ROW_NORM = 3**-0.5  # of a row of A as "kaiming" draws it: d numbers of variance 1 / (3 d)


@torch.no_grad()
def orthonormal(M: Tensor) -> Tensor:
    """Orthonormal rows that span those of M (n, d), in fp64 on the CPU; rows beyond the d-th are zero."""
    Q, _ = torch.linalg.qr(M.double().cpu().mT)  # (d, min(n, d))
    return F.pad(Q.mT, (0, 0, 0, len(M) - Q.shape[1]))


@torch.no_grad()
def gradient_start(Z: Tensor, A: Tensor) -> Tensor:
    """The start of A (r, d): the leading right singular vectors of Z (n, d) as rows, of the norm of Kaiming's.

    Z = Q^T G is the gradient G of M = BA seen through orthonormal columns Q. Where its rank is below r, the rows of
    an ordinary start `A` fill up: what of them is orthogonal to the leading ones, and themselves beyond the d-th row.
    """
    _, S, V = torch.linalg.svd(Z.double().cpu(), full_matrices=False)
    known = V[S[0] * max(Z.shape) * torch.finfo(Z.dtype).eps < S][: len(A)]  # (k, d)
    A = A.double().cpu()
    rows = torch.linalg.qr(torch.cat([known, A]).mT)[0].mT[: len(A)]  # (min(r, d), d), the known ones first
    return torch.cat([rows * ROW_NORM, A[len(rows) :]])


def _beside(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B beside W and at least as precise as fp32."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return A.to(W.device, dtype), B.to(W.device, dtype)
