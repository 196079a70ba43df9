"""Pictures of what a conversion costs: the error of compressing against the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SerialLoraError

if TYPE_CHECKING:
    from .closed_form import SiteError

_BAND, _LINE, _MARK = "#c9d8ec", "#1f5fa8", "#c2410c"


def plot_errors(sites: Sequence[SiteError], rank: int, path: Path) -> None:
    """Draw the least relative error against the rank: over all pairs, and the range of single ones."""
    longest = max(len(site.curve) for site in sites)
    curves = np.array([np.pad(site.curve, (0, longest - len(site.curve)), mode="edge") for site in sites])
    sizes = np.array([site.norm for site in sites])[:, None]
    overall = np.sqrt((curves**2 * sizes**2).sum(0) / (sizes**2).sum())
    ranks = np.arange(longest)
    # An error at the rounding of the LoRA's own fp32 is none; cut there, or the axis shows nothing else.
    floor = 1e-7
    figure, axes = _figure((7, 4.2))
    low, high = (np.quantile(curves, q, axis=0).clip(floor) for q in (0.1, 0.9))
    axes.fill_between(ranks, low, high, color=_BAND, label="middle 80% of the pairs")
    axes.plot(ranks, overall.clip(floor), color=_LINE, marker="o", markersize=3, label="all pairs together")
    if rank < longest:
        axes.axvline(rank, color=_MARK, linestyle="--", linewidth=1)
        axes.annotate(
            f"rank {rank}: {overall[rank]:.2g}", (rank, overall[rank].clip(floor)), xytext=(6, 8),
            textcoords="offset points", color=_MARK,
        )  # fmt: skip
    if overall[1:].min() < 0.05 * overall[0]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05)
    axes.set(xlabel="rank of the Serial LoRA", ylabel="relative error  ||S M - D|| / ||D||", xlim=(0, longest - 1))
    made = np.array([site.relative_error for site in sites])[:, None]
    lost = float(np.sqrt((made**2 * sizes**2).sum() / (sizes**2).sum()))
    axes.set_title(f"Compressing a LoRA to rank {rank}: relative error {lost:.2g}")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_spectra(spectra: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draw the singular values of s B A of every pair, one line each, coloured by its block."""
    figure, axes = _figure((7, 4.2))
    colours = _plt().colormaps["viridis"](np.linspace(0, 0.9, max(1, len(spectra))))
    top = max((max(values, default=0.0) for values in spectra.values()), default=0.0) or 1.0
    for (name, values), colour in zip(spectra.items(), colours, strict=True):
        label = name if len(spectra) <= 8 else None
        shown = np.clip(values, top * 1e-7, None)
        axes.plot(range(1, len(shown) + 1), shown, color=colour, linewidth=1, marker=".", label=label)
    axes.set_yscale("log")
    axes.set(xlabel="index", ylabel="singular value of s B A", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(spectra) <= 8:
        axes.legend(frameon=False, fontsize=7)
    else:
        names = list(spectra)
        axes.text(0.99, 0.98, f"dark: {names[0]}\nbright: {names[-1]}", transform=axes.transAxes, ha="right", va="top",
                  fontsize=7)  # fmt: skip
    _save(figure, path)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    figure, axes = _plt().subplots(figsize=size, constrained_layout=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _plt().close(figure)


def _plt() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SerialLoraError("Plots need matplotlib: pip install 'slora_diffusers[cli]'.") from error
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt
