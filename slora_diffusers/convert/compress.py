"""Compress a LoRA into a Serial LoRA of a chosen rank, by the closed form.

With S = [W_q; W_k; W_v] and D = [dW_q; dW_k; dW_v] of the projections that read one input, the best M = B A of rank r
in ||S M - D||_F is `M = S^+ U_r Sigma_r V_r^T`, with U Sigma V^T the SVD of S S^+ D. A ridge, l ||M||^2 besides,
is the same problem with sqrt(l) I below S and zeros below D, so it has the same closed form.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.fuse import base_weights
from ..core.components import adapted, components_of, free_name, is_pipeline
from ..core.sites import Slot, find_slots, in_features, out_features
from ..core.state import check_new_name, registry_of
from ..errors import AdapterFileError, SerialLoraError
from ..files.fingerprint import describe_base
from ..files.format import library_version
from ..files.load import apply_plans, plan_load
from .layouts.read import ReadLora, read_lora
from .layouts.write import Target, unread_by_diffusers, write_lora
from .lowrank import LowRank, Products, Track, check_rank, silently
from .pairs import as_adapter
from .plots import plot_errors

RIDGE = 1e-6
REST_PREFIX = "rest_of_"
LARGE = 100.0
"""Amplification beyond which the 8 bits of bf16 no longer hold x and M x together."""


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


@dataclass(frozen=True)
class CompressReport:
    """What `compress_lora` made of a LoRA.

    Args:
        adapter_name: Name of the new adapter.
        sites: Every pair with its error.
        relative_error: Over all that the pairs carry: sqrt(sum ||S M - D||^2 / sum ||D||^2).
        total_error: The same, counting what no pair carries as lost.
        not_carried: Modules of the LoRA that no pair carries.
        ignored: Keys of the LoRA that are no low-rank product at all.
        rest: Files of the LoRA that holds what is not carried, if it was asked for.
        unplaced: Modules of the LoRA that the model does not have: in no result.
        parameters: Parameters of the adapter.
        lora_parameters: Parameters of the LoRA's carried part.
    """

    adapter_name: str
    sites: tuple[SiteError, ...]
    relative_error: float
    total_error: float
    not_carried: tuple[str, ...]
    ignored: tuple[str, ...]
    rest: tuple[Path, ...]
    unplaced: tuple[str, ...]
    parameters: int
    lora_parameters: int

    def __str__(self) -> str:
        lines = [
            f"{self.adapter_name}: {len(self.sites)} pairs, {self.parameters:,} parameters "
            f"({self.parameters / self.lora_parameters:.2f} of the LoRA's {self.lora_parameters:,}), relative error "
            f"{self.relative_error:.2e}"
        ]
        worst = max(self.sites, key=lambda site: site.amplification)
        if worst.amplification > LARGE:
            lines.append(
                f"{worst.key} changes its input by up to {worst.amplification:.3g} times its size, where the base "
                "hardly reads it: run this adapter in fp32, or compress with a larger ridge"
            )
        if self.not_carried:
            kept = "kept as a LoRA beside it" if self.rest else f"lost: {self.total_error:.2e} with them"
            lines.append(f"{len(self.not_carried)} modules are not carried ({kept}): {_some(self.not_carried)}")
        if self.unplaced:
            lines.append(f"{len(self.unplaced)} modules are not in this model, and dropped: {_some(self.unplaced)}")
        if self.ignored:
            lines.append(f"{len(self.ignored)} keys are no low-rank product, and dropped: {_some(self.ignored)}")
        return "\n".join(lines)


def compress_lora(
    model: Any,
    lora_source: Any,
    rank: int,
    *,
    adapter_name: str | None = None,
    inputs: Sequence[str] | None = None,
    ridge: float = RIDGE,
    keep_rest: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    weight_name: str | None = None,
    track: Track = silently,
    **hub: Any,
) -> CompressReport:
    """Add to a model the Serial LoRA that comes nearest to a LoRA, and say how near.

    Pairs in front of projections that give no more features than they read (an attention's output projection) get
    the LoRA's own rank, for there the result is exact wherever the weights have full rank: dW = W M with M = W^+ dW.
    Work goes pair by pair in float64, on the CPU's or the weights' device.

    Args:
        model: The base, or a pipeline with it; its weights must not be quantized.
        lora_source: File, folder, Hub id or state dict of a LoRA in the layout of diffusers, PEFT or kohya.
        rank: Rank of the pairs.
        adapter_name: Name of the new adapter; `None` takes the first free one. It is active afterwards.
        inputs: Names of the pairs to use; `None` takes all that the LoRA has a part for, the optional ones included.
        ridge: Root of the ridge's weight, as a fraction of S's root-mean-square singular value. Directions of the
            input that the base reads more weakly than that are not amplified.
        keep_rest: Folder for what no pair carries, as an ordinary LoRA; load it beside the adapter.
        plot: Path of a picture of the error against the rank.
        weight_name: Name of the LoRA's file in its folder or repository.
        track: Goes through the pairs, showing progress.
        **hub: `revision`, `token` and so on, for a LoRA on the Hub.

    Raises:
        SerialLoraError: If the LoRA cannot be read, or has no part that the model's pairs can carry; nothing has
            changed then.

    Source: Eckart and Young for the closed form; the ridge is Tikhonov's.
    """
    _check_arguments(rank, ridge)
    models, pipeline = components_of(model), model if is_pipeline(model) else None
    lora = read_lora(lora_source, models, weight_name, **hub)
    slots = {c: _slots_with_parts(models[c], modules, inputs) for c, modules in lora.modules.items()}
    work = [(component, slot) for component, found in slots.items() for slot in found]
    if not work:
        raise AdapterFileError(_nothing_message(models, lora, inputs))
    name = adapter_name or free_name(adapted(model, required=False))
    for component in dict.fromkeys(component for component, _ in work):
        check_new_name(registry_of(models[component], create=True), name)
    pairs, sites = _compress_slots(models, work, lora, rank, ridge, track)
    plans = [plan_load(models[c], as_adapter(models[c], found), name) for c, found in pairs.items()]
    rest = _rest_of(lora, work)
    files = _write_rest(rest, Path(keep_rest), models, pipeline) if keep_rest is not None and rest else []
    if plot is not None:
        plot_errors(sites, rank, Path(plot))
    report = _report(name, sites, lora, rest, files, sum(plan.report.parameters for plan in plans))
    apply_plans(plans, weight=1.0)  # last, when nothing else can fail
    return report


def _check_arguments(rank: int, ridge: float) -> None:
    check_rank(rank)
    if not isinstance(ridge, int | float) or not 0 < ridge < 1:
        raise SerialLoraError(f"ridge must lie between 0 and 1; got {ridge!r}.")


def _compress_slots(
    models: Mapping[str, nn.Module],
    work: Sequence[tuple[str, Slot]],
    lora: ReadLora,
    rank: int,
    ridge: float,
    track: Track,
) -> tuple[Products, list[SiteError]]:
    pairs: Products = {}
    sites = []
    for component, slot in track(work, f"Compressing to rank {rank}"):
        M, site = _compress_slot(models[component], slot, lora.modules[component], rank, ridge)
        pairs.setdefault(component, {})[slot.key] = M
        sites.append(replace(site, key=f"{component}.{slot.key}"))
    return pairs, sites


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


def _compress_slot(
    model: nn.Module, slot: Slot, modules: Mapping[str, LowRank], rank: int, ridge: float
) -> tuple[LowRank, SiteError]:
    """M in fp32, and how well it does."""
    weights = base_weights(model, [slot], "compress")[0]
    S = torch.cat([W.detach().double() for W in weights])  # (n, d)
    D = _stacked(slot, modules, S)
    exact = slot.pair.optional and S.shape[0] <= S.shape[1]
    M, sigma = closed_form(S, D, None if exact else rank, ridge)
    M = _balanced(M).to(torch.float32)
    norm = D.norm()
    gap = LowRank(torch.cat([M.A.double(), D.A.double()]), torch.cat([S @ M.B.double(), -D.B.double()], dim=1))
    left = (norm**2 - torch.cat([sigma.new_zeros(1), sigma.square().cumsum(0)])).clamp_min(0).sqrt()
    curve = tuple((left / norm).tolist()) if norm else (0.0,)
    error = gap.norm() / norm if norm else 0.0
    return LowRank(M.A.cpu(), M.B.cpu()), SiteError(slot.key, M.rank, error, norm, M.singular_values()[0].item(), curve)


def _stacked(slot: Slot, modules: Mapping[str, LowRank], S: Tensor) -> LowRank:
    """D = [dW_1; dW_2; ...] with zeros for projections that the LoRA leaves alone.

    Parts are made of one orthonormal basis of all their A's rows, so that equal A's count once.
    """
    parts = [modules.get(slot.called(p)) for p in slot.projections]
    rows = torch.cat([part.A for part in parts if part is not None]).to(S)
    basis, sigma, Vh = torch.linalg.svd(rows, full_matrices=False)
    k = int((sigma > sigma[0] * 1e-9).sum()) or 1
    B = S.new_zeros(S.shape[0], k)
    row = start = 0
    for projection, part in zip(slot.projections, parts, strict=True):
        height = out_features(projection)
        if part is not None:
            B[row : row + height] = part.B.to(S) @ (basis[start : start + part.rank, :k] * sigma[:k])
            start += part.rank
        row += height
    return LowRank(Vh[:k], B)


def _balanced(M: LowRank) -> LowRank:
    """The same product with A and B of one size, which rounding to fp32 likes."""
    a, b = torch.linalg.vector_norm(M.A), torch.linalg.vector_norm(M.B)
    scale = (b / a).sqrt() if a > 0 and b > 0 else torch.ones_like(a)
    return LowRank(M.A * scale, M.B / scale)


def _slots_with_parts(model: nn.Module, modules: Mapping[str, LowRank], inputs: Sequence[str] | None) -> list[Slot]:
    try:
        slots = find_slots(model)
    except SerialLoraError:
        return []  # a component that no record covers: what the LoRA has there is not carried
    names = {slot.pair.name for slot in slots}
    if inputs is not None and (unknown := sorted(set(inputs) - names)):
        raise SerialLoraError(f"inputs={list(inputs)} names {unknown}, but {type(model).__name__} has {sorted(names)}.")
    return [
        slot
        for slot in slots
        if (inputs is None or slot.pair.name in inputs)
        and any(_fits(modules.get(slot.called(p)), in_features(p)) for p in slot.projections)
    ]


def _fits(part: LowRank | None, features: int) -> bool:
    return part is not None and part.A.ndim == 2 and part.A.shape[1] == features


def _rest_of(lora: ReadLora, work: Sequence[tuple[str, Slot]]) -> Products:
    """What no pair carries, by component; modules that the model lacks stay where their names say."""
    carried = {(component, slot.called(p)) for component, slot in work for p in slot.projections}
    rest: Products = {}
    for component, modules in lora.modules.items():
        for path, part in modules.items():
            if (component, path) not in carried:
                rest.setdefault(component, {})[path] = part
    return rest


def _write_rest(rest: Products, folder: Path, models: Mapping[str, nn.Module], pipeline: Any) -> list[Path]:
    components = {c: {"base": describe_base(models[c]).to_json() if _has_slots(models[c]) else {}} for c in rest}
    origin = {"library_version": library_version(), "components": components}
    target = Target({c: models[c] for c in rest}, pipeline, origin)
    format = "diffusers" if unread_by_diffusers(target) == [] else "peft"
    return write_lora(rest, folder, format, target, None, prefix=REST_PREFIX)


def _has_slots(model: nn.Module) -> bool:
    try:
        return bool(find_slots(model))
    except SerialLoraError:
        return False


def _report(
    name: str, sites: list[SiteError], lora: ReadLora, rest: Products, files: list[Path], parameters: int
) -> CompressReport:
    whole = sum(site.norm**2 for site in sites)
    lost = sum((site.relative_error * site.norm) ** 2 for site in sites)
    left = sum(part.norm() ** 2 for modules in rest.values() for part in modules.values() if part.A.ndim == 2)
    everything = sum(part.numel for modules in lora.modules.values() for part in modules.values())
    uncarried = sum(part.numel for modules in rest.values() for part in modules.values())
    return CompressReport(
        name,
        tuple(sites),
        (lost / whole) ** 0.5 if whole else 0.0,
        ((lost + left) / (whole + left)) ** 0.5 if whole + left else 0.0,
        tuple(f"{component}.{path}" for component, modules in rest.items() for path in modules),
        tuple(lora.ignored),
        tuple(files),
        tuple(lora.unknown),
        parameters,
        everything - uncarried,
    )


def _nothing_message(models: Mapping[str, nn.Module], lora: ReadLora, inputs: Sequence[str] | None) -> str:
    modules = [f"{c}.{path}" for c, found in lora.modules.items() for path in found] + list(lora.unknown)
    kinds = ", ".join(type(m).__name__ for m in models.values())
    chosen = f" with inputs={list(inputs)}" if inputs is not None else ""
    return (
        f"No pair of {kinds}{chosen} can carry any of the LoRA's {len(modules)} modules, such as {_some(modules)}. "
        "Check that the LoRA is for this base."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
