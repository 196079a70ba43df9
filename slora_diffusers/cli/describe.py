"""What `slora inspect` says of an adapter's file, or of a model that could take one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from ..config import SerialLoraConfig
from ..convert.describe import Carried, LoraReport, block_norms, models_of
from ..convert.layouts.read import some
from ..convert.lowrank import LowRank
from ..convert.merge import scaled_pairs
from ..convert.plots import plot_spectra
from ..core.components import components_of
from ..core.names import split_place
from ..core.sites import find_slots, lora_equivalent, select_slots
from ..errors import SerialLoraError
from ..files.fingerprint import describe_base
from ..files.format import AdapterFile, Component
from ..files.storage import find_file


@dataclass(frozen=True)
class ComponentReport:
    """One component of an adapter, or of a model that could take one (then without ranks and norms).

    Args:
        base: Class, name and fingerprint of the base.
        config: The adapter's config.
        ranks: Ranks of the pairs, each once.
        sites: Number of adapted sites.
        pairs: {name of the pair: how many}.
        parameters: Parameters of the adapter; of a model, those of rank 16 on all but the optional pairs.
        lora_parameters: Parameters of a LoRA of the same rank on q, k, v and the output projections.
        lora_exact: Whether that was counted on the base; else every projection is taken to be square.
        norms: {block: {pair: ||s B A||_F}}.
        dtypes: Dtypes of the tensors.
    """

    base: Mapping[str, Any]
    config: Mapping[str, Any]
    ranks: tuple[int, ...]
    sites: int
    pairs: Mapping[str, int]
    parameters: int
    lora_parameters: int
    lora_exact: bool
    norms: Mapping[str, Mapping[str, float]]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class InspectReport:
    """What `slora inspect` found."""

    source: str
    kind: str
    bytes: int | None
    library_version: str | None
    components: Mapping[str, ComponentReport]


def inspect_adapter(source: str, base: Any = None, plot: Path | None = None) -> InspectReport:
    """Describe an adapter's file; with its base, the LoRA equivalent is counted instead of estimated."""
    file = AdapterFile.read(source)
    scaled = scaled_pairs(file)
    models = components_of(base) if base is not None else {}
    components = {c: _adapter_component(file.components[c], pairs, models.get(c)) for c, pairs in scaled.items()}
    if plot is not None:
        spectra = {
            f"{component}.{' '.join(split_place(key))}": part.singular_values()[: part.rank].tolist()
            for component, pairs in scaled.items()
            for key, part in pairs.items()
        }
        plot_spectra(spectra, plot, "Singular values of the adapter's pairs")
    path = find_file(source)
    return InspectReport(source, "adapter", path.stat().st_size, file.library_version, components)


def inspect_model(source: str, model: Any) -> InspectReport:
    """Describe the places for pairs in every component of a pipeline, or in a model."""
    components = {}
    for name, module in components_of(model).items():
        try:
            slots = find_slots(module)
        except SerialLoraError:
            continue
        config = SerialLoraConfig(rank=16)
        chosen = select_slots(module, config)
        names = [slot.pair.name for slot in slots]
        components[name] = ComponentReport(
            describe_base(module).to_json(),
            config.to_dict(),
            (config.rank,),
            len({slot.path for slot in chosen}),
            {pair: names.count(pair) for pair in dict.fromkeys(names)},
            sum(2 * config.rank * slot.features for slot in chosen),
            lora_equivalent(module, chosen, config),
            True,
            {},
            (),
        )
    if not components:
        raise SerialLoraError(f"{source} has no component that a record covers: nothing to adapt there.")
    return InspectReport(source, "model", None, None, components)


def tables(report: InspectReport | LoraReport) -> list[Any]:
    """The report as what rich prints."""
    if isinstance(report, LoraReport):
        return _lora_tables(report)
    shown: list[Any] = []
    for name, part in report.components.items():
        shown.append(_table(f"{report.source}: {name}", _rows(report, part)))
        if part.norms:
            pairs = list(part.pairs)
            norms = Table("block", *pairs, title="||s B A|| per block", title_justify="left")
            for block, values in part.norms.items():
                norms.add_row(block, *(f"{values[pair]:.3g}" if pair in values else "-" for pair in pairs))
            shown.append(norms)
    return shown


def _rows(report: InspectReport, part: ComponentReport) -> list[tuple[str, str]]:
    base, config = part.base, part.config
    ranks = "-".join(map(str, sorted({min(part.ranks), max(part.ranks)})))
    adapter = report.kind == "adapter"
    about = "" if part.lora_exact else " (about; --base counts exactly)"
    alpha = config.get("alpha")
    rows = [
        ("base", f"{base.get('class')} {base.get('name') or ''}".strip()),
        ("fingerprint", (base.get("fingerprint") or "none")[:16] + "..." if base.get("fingerprint") else "none"),
        ("rank", ranks if adapter else f"{ranks} (as an example)"),
        ("alpha", "rank" if alpha is None else f"{alpha:g}{' / sqrt(rank)' if config.get('rslora') else ''}"),
        ("sites", str(part.sites)),
        ("pairs", ", ".join(f"{count} {name}" for name, count in part.pairs.items())),
        ("parameters", f"{part.parameters:,}"),
        ("LoRA equivalent", f"{part.lora_parameters:,}{about}: {part.parameters / part.lora_parameters:.2f} of it"),
    ]
    if report.bytes is not None:
        rows.append(("file", f"{report.bytes:,} bytes, {', '.join(part.dtypes)}, slora {report.library_version}"))
    return rows


def _adapter_component(component: Component, pairs: Mapping[str, LowRank], model: nn.Module | None) -> ComponentReport:
    config = component.config or SerialLoraConfig()
    places = [split_place(key) for key in pairs]
    kinds = [pair for _, pair in places]
    if model is not None:
        exact = lora_equivalent(model, [slot for slot in find_slots(model) if slot.key in pairs], config)
    else:  # q, k, v and the output, square: eight matrices of LoRA for two of ours; optional pairs feed one
        exact = sum(part.numel * (1 if pair.endswith(("output", "forward")) else 4)
                    for (_, pair), part in zip(places, pairs.values(), strict=True))  # fmt: skip
    return ComponentReport(
        component.base.to_json(),
        config.to_dict(),
        tuple(sorted({part.rank for part in pairs.values()})),
        len({path for path, _ in places}),
        {pair: kinds.count(pair) for pair in dict.fromkeys(kinds)},
        sum(part.numel for part in pairs.values()),
        exact,
        model is not None,
        block_norms(pairs),
        tuple(sorted({str(t.dtype).removeprefix("torch.") for t in component.tensors.values()})),
    )


def _lora_tables(report: LoraReport) -> list[Any]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    remedy = "`slora compress` turns it into a Serial LoRA"
    if report.obstacle is not None:
        remedy = f"it cannot be read: {report.obstacle}"
    rows = [
        ("an ordinary LoRA", f"{kinds}; {remedy}"),
        ("layout", report.layout),
        ("names modules of", models_of(report)),
        ("base, by its header", report.base or "not said"),
        ("rank", "-".join(map(str, sorted({min(report.ranks), max(report.ranks)}))) if report.ranks else "none"),
        ("alpha", ", ".join(f"{alpha:g}" for alpha in report.alphas[:4]) or "rank"),
        ("parameters", f"{report.parameters:,}"),
        ("file", f"{report.bytes:,} bytes, {', '.join(report.dtypes)}"),
    ]
    if report.not_understood:
        rows.append(("not understood", f"{len(report.not_understood)} keys: {some(report.not_understood)}"))
    shown = [_table(f"{report.source}", rows)]
    if report.carried is not None:
        shown.append(_table("compressed on this base", _carried_rows(report.carried)))
    return shown


def _carried_rows(carried: Carried) -> list[tuple[str, str]]:
    rows = [
        (component, ", ".join(f"{count} {name}" for name, count in pairs.items()))
        for component, pairs in carried.pairs.items()
    ] or [("carried", "nothing: the LoRA is for another base")]
    for what, names in (
        ("not carried", carried.not_carried),
        ("of components that are not here", carried.elsewhere),
        ("of no module of this base", carried.unknown),
    ):
        if names:
            rows.append((what, f"{len(names)} modules: {some(names)}"))
    return rows


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
