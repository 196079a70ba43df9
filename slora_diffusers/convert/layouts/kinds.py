"""The change of a weight that each kind of adapter stands for, dW = B A: LoRA, DoRA, LoHa, LoKr, OFT, differences.

Every kind has a dW, and all that is done with a LoRA needs only dW. A product stays as thin as the kind has it (LoHa
of rank r is of rank r^2); what is of full rank is dW itself beside an identity.

Sources: Hu et al. 2021 (LoRA); Liu et al. 2024 (DoRA); Hyeon-Woo et al. 2022 (LoHa); Yeh et al. 2024 (LyCORIS); Qiu et
al. 2023 (OFT); and what PEFT and LyCORIS store of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.patterns import matches
from ...errors import AdapterFileError
from ..lowrank import LowRank
from .parts import Module

Settings = Mapping[str, Any]
"""Fields of the PEFT config that belongs to a module; empty where the file has none."""

_PEFT_TYPES = ("LORA", "LOHA", "LOKR", "OFT")
_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights, besides yes and no, that leave the base's weights as they are."""
_NO_PLAIN_CHANGE = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "use_bdlora")


def needs_weight(module: Module) -> bool:
    """Whether the change depends on the base's weight."""
    return "dora" in module.tensors or module.kind == "oft"


def shape_of(module: Module) -> tuple[int, int] | None:
    """(out, in) of the weight that a module changes, as far as it says; None if it does not.

    The rows are all that is needed to place it; OFT of PEFT turns the input and says nothing of the output.
    """
    t = module.tensors
    if module.kind == "lora":
        return t["up"].shape[0], t["down"].shape[1]
    if module.kind == "loha":
        ends = (t["w1_a"].shape[1], t["w1_b"].shape[1]) if "t1" in t else (t["w1_a"].shape[0], t["w1_b"].shape[1])
        return ends
    if module.kind == "lokr":
        w1, w2 = (_factor(t, w) for w in ("w1", "w2"))
        return w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]
    if module.kind == "diff":
        return t["diff"].shape[0], t["diff"].shape[1] if t["diff"].ndim > 1 else 1
    if "blocks" in t and t["blocks"].ndim != 3:
        raise AdapterFileError(
            f"{module.name} is a BOFT, which is not read; merge it into its base with LyCORIS first."
        )
    return (t["blocks"].shape[0] * t["blocks"].shape[1], 0) if "blocks" in t else None


def change_of(module: Module, settings: Settings, W: Tensor | None) -> LowRank:
    """dW of a module, every scale in it, in fp32 or better.

    Args:
        module: What the file holds.
        settings: The fields of its PEFT config.
        W: (out, in), the base's weight; DoRA and OFT need it.

    Raises:
        AdapterFileError: If its matrices do not fit each other.
    """
    try:
        dW = _CHANGES[module.kind](module, settings, W)
        if "scalar" in module.tensors:
            dW = LowRank(dW.A, dW.B * module.tensors["scalar"].float().reshape(()))
        return _decomposed(module, dW, W) if "dora" in module.tensors else dW
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise no_change(module) from error


def no_change(module: Module) -> AdapterFileError:
    """The error for a module whose matrices do not fit each other."""
    shapes = {part: tuple(tensor.shape) for part, tensor in module.tensors.items()}
    return AdapterFileError(
        f"The matrices of {module.name} do not make a {module.label}: {shapes}. The file is damaged."
    )


def obstacle(settings: Settings) -> str | None:
    """Why a PEFT config's adapters have no change of the base's weights that their matrices alone give, if so."""
    kind = str(settings.get("peft_type") or "LORA").upper()
    if kind not in _PEFT_TYPES:
        return f"it is of PEFT's type {kind}, and {', '.join(_PEFT_TYPES)} are read"
    if (start := settings.get("init_lora_weights")) not in (None, True, False, *_KEEP_THE_BASE):
        return (
            f"it was trained with init_lora_weights={start!r}, which takes a part out of the base's weights that the "
            "file does not hold; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if (used := next((name for name in _NO_PLAIN_CHANGE if settings.get(name)), None)) is not None:
        return f"{used} of its config makes it more than a change of weights"
    return None


def _lora(module: Module, settings: Settings, W: Tensor | None) -> LowRank:
    """dW = alpha / r up down; with a core of LoCon between them, its convolution with down."""
    down, up = module.tensors["down"].float(), module.tensors["up"].float().flatten(1)
    if "mid" in module.tensors:
        down = torch.einsum("mn...,ni->mi...", module.tensors["mid"].float(), down.flatten(1))
    if down.ndim > 2 and down.shape[2:].numel() == 1:
        down = down.flatten(1)
    if down.ndim < 2 or down.shape[0] != up.shape[1]:
        raise RuntimeError("the ranks differ")
    return LowRank(down, up * _scale(module, settings, down.shape[0]))


def _loha(module: Module, settings: Settings, W: Tensor | None) -> LowRank:
    """dW = alpha / r (a1 b1) o (a2 b2), a product of rank r^2: rows of a1 and a2, columns of b1 and b2 multiplied."""
    a1, b1, a2, b2 = (module.tensors[part].float() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = _scale(module, settings, b1.shape[0])
    if "t1" in module.tensors:
        one, two = (
            torch.einsum("ij...,ip,jr->pr...", module.tensors[t].float(), a, b)
            for t, a, b in (("t1", a1, b1), ("t2", a2, b2))
        )
        return dense(one * two * scale)
    if b1.shape[0] * b2.shape[0] >= min(a1.shape[0], b1.shape[1]):
        return dense((a1 @ b1) * (a2 @ b2) * scale)
    B = torch.einsum("or,os->ors", a1, a2).flatten(1)
    A = torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1)
    return LowRank(A, B * scale)


def _lokr(module: Module, settings: Settings, W: Tensor | None) -> LowRank:
    """dW = kron(w1, w2); with w2 = a b of rank r it is kron(w1, a) kron(I, b), of rank r times w1's width."""
    t = {part: tensor.float() for part, tensor in module.tensors.items()}
    w1, w2 = _factor(t, "w1"), _factor(t, "w2")
    rank = t["w2_b"].shape[0] if "w2_b" in t else t["w1_b"].shape[0] if "w1_b" in t else None
    # LyCORIS scales only what it factored, PEFT always.
    scale = _scale(module, settings, rank or settings.get("r")) if rank or settings else 1.0
    width = w1.shape[1]
    if "w2_a" in t and "t2" not in t and w2.ndim == 2 and width * t["w2_b"].shape[0] < min(_size(w1, w2)):
        A = torch.kron(torch.eye(width), t["w2_b"])
        return LowRank(A, torch.kron(w1, t["w2_a"]) * scale)
    return dense(torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2) * scale)


def _oft(module: Module, settings: Settings, W: Tensor | None) -> LowRank:
    """W' = R W with a rotation of blocks of the output (LyCORIS, kohya), or W' = W R^T of the input (PEFT)."""
    assert W is not None
    shape, W = W.shape, W.float().flatten(1)
    if "R" in module.tensors:
        R = _peft_rotation(module.tensors["R"].float(), settings)
        blocks = R.expand(W.shape[1] // R.shape[1], -1, -1) if R.shape[0] == 1 else R
        turned = torch.einsum("okn,kmn->okm", W.unflatten(1, (blocks.shape[0], blocks.shape[1])), blocks)
        return dense((turned.flatten(1) - W).reshape(shape))
    Q = module.tensors["blocks"].float()
    Q = Q - Q.transpose(1, 2)
    limit = module.alpha or 0.0
    if settings.get("network_module", "").endswith("networks.oft"):
        limit *= shape[0]  # sd-scripts multiplies when it loads, LyCORIS before it saves
    if 0 < limit < (norm := torch.linalg.vector_norm(Q).item() + 1e-8):
        Q = Q * (limit / norm)
    identity = torch.eye(Q.shape[1])
    R = (identity + Q) @ torch.linalg.inv(identity - Q)
    turned = torch.einsum("knm,kni->kmi", R, W.unflatten(0, (Q.shape[0], Q.shape[1]))).flatten(0, 1)
    if "rescale" in module.tensors:
        turned = turned * module.tensors["rescale"].float().reshape(-1, 1)
    return dense((turned - W).reshape(shape))


def _diff(module: Module, settings: Settings, W: Tensor | None) -> LowRank:
    """dW as it is."""
    if module.tensors["diff"].ndim < 2:
        raise RuntimeError("a difference of a vector is not one of a weight matrix")
    return dense(module.tensors["diff"].float())


def dense(dW: Tensor) -> LowRank:
    """A matrix of full rank as a product with an identity on its shorter side."""
    if dW.ndim > 2 and dW.shape[2:].numel() == 1:
        dW = dW.flatten(1)
    if dW.ndim > 2 or dW.shape[0] < dW.shape[1]:
        return LowRank(dW, torch.eye(dW.shape[0], device=dW.device))
    return LowRank(torch.eye(dW.shape[1], device=dW.device), dW)


def _decomposed(module: Module, dW: LowRank, W: Tensor | None) -> LowRank:
    """DoRA: W' = m V / ||V|| with V = W + dW, norms of each output (PEFT), or each input (LyCORIS' first)."""
    assert W is not None
    magnitude = module.tensors["dora"].float()
    V = W.float() + (dW.B @ dW.A.flatten(1)).reshape(W.shape)
    # PEFT's are of outputs in any shape, also (1, out, 1, 1); of others the shape tells: (out, 1) or (1, in).
    peft = ".lora_magnitude_vector" in module.keys.get("dora", "")
    of_outputs = peft or magnitude.ndim == 1 or magnitude.shape[0] == V.shape[0]
    if magnitude.numel() != V.shape[0 if of_outputs else 1]:
        raise RuntimeError("the magnitudes are neither one for each output nor one for each input")
    flat = V.flatten(1) if of_outputs else V.transpose(0, 1).flatten(1)
    shape = (-1, *[1] * (V.ndim - 1)) if of_outputs else (1, -1, *[1] * (V.ndim - 2))
    scale = magnitude.reshape(-1) / torch.linalg.vector_norm(flat, dim=1)
    return dense(V * scale.reshape(shape) - W.float())


def _peft_rotation(vectors: Tensor, settings: Settings) -> Tensor:
    """R of PEFT's OFT, (blocks, b, b): Cayley's map of skew matrices, or the first terms of its series."""
    if not settings:
        raise AdapterFileError(
            "An OFT of PEFT needs its adapter_config.json, which says how the rotation was computed. Give the folder "
            "that holds both."
        )
    if settings.get("coft"):
        raise AdapterFileError("A constrained OFT of PEFT (coft=True) is not read; merge it with PEFT first.")
    b = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    above = torch.triu_indices(b, b, 1)
    Q = vectors.new_zeros(vectors.shape[0], b, b)
    Q[:, above[0], above[1]] = vectors
    Q = Q - Q.transpose(1, 2)
    identity = torch.eye(b).expand_as(Q)
    if not settings.get("use_cayley_neumann", True):
        return torch.linalg.solve(identity + Q, identity - Q, left=False)
    terms = settings.get("num_cayley_neumann_terms", 5)
    R, power = identity, identity  # I + 2 Q + 2 Q^2 + ... + Q^k, the last power once, as PEFT sums them
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    for n in range(1, last + 1):
        power = power @ Q
        R = R + power * (1 if n == last and terms > 2 else 2)
    return R


def _scale(module: Module, settings: Settings, rank: int | None) -> float:
    """alpha / r: alpha from the file's own key, or from the settings of PEFT, else r."""
    if not rank:
        return 1.0
    if module.alpha is not None:
        return module.alpha / rank
    alpha = settings.get("lora_alpha", settings.get("alpha"))
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def settings_of(name: str, settings: Mapping[str, Settings]) -> Settings:
    """The fields of a PEFT config that hold for a module: its own alpha and rank where a pattern names it."""
    plain = name.removeprefix("base_model.model.")
    component = next((c for c in settings if c and plain.startswith(f"{c}.")), "")
    if component not in settings:
        return {}
    own, path = dict(settings[component]), plain.removeprefix(f"{component}.")
    for field, target in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha" if "lora_alpha" in own else "alpha")):
        for pattern, value in (own.get(field) or {}).items():
            if matches(rf"(.*\.)?({pattern})", path):  # as PEFT does
                own[target] = value
                break
    return own


def _factor(t: Mapping[str, Tensor], w: str) -> Tensor:
    """w1 or w2 of LoKr, multiplied out."""
    if w in t:
        return t[w].float()
    a, b = t[f"{w}_a"].float(), t[f"{w}_b"].float()
    if w == "w2" and "t2" in t:
        return torch.einsum("ij...,ip,jr->pr...", t["t2"].float(), a, b).contiguous()
    return a @ b


def _size(w1: Tensor, w2: Tensor) -> tuple[int, int]:
    return w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]


_CHANGES = {"lora": _lora, "loha": _loha, "lokr": _lokr, "oft": _oft, "diff": _diff}
