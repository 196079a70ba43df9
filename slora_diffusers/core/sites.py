"""Find the sites of a model: from the records of its architecture to modules, pairs and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ..config import SerialLoraConfig, matches
from ..errors import ArchitectureError, SerialLoraError
from ..records.registry import ARCHITECTURES, REFUSED, Architecture, Pair, check_config, is_built_in
from .expand import Projection, expand, projection_of, unwrap
from .fit import check_apart, check_fit, no_record, no_site
from .names import place_name
from .offload import device_of

T = TypeVar("T")

# What an attention may do to its input before, or beside, the projections: there W (I + sBA) is not the same map.
_REFUSED_NORMS = ("group_norm", "spatial_norm", "norm_cross")


@dataclass(frozen=True)
class Slot:
    """A place for a pair in a model: the site at `path`, the pair's record, and the projections that are there."""

    path: str
    module: nn.Module
    pair: Pair
    projections: tuple[Projection, ...]
    features: int
    family: str

    @property
    def key(self) -> str:
        """The name of the place in files: `<path of the site>.serial_lora.<pair>`."""
        return place_name(self.path, self.pair.name)

    @property
    def device(self) -> torch.device:
        """Where matrices go that stand in front of its projections."""
        return device_of(self.projections[0].owner, self.projections[0].attribute)

    def called(self, projection: Projection) -> str:
        """The path of one of its projections, for messages."""
        return f"{self.path}.{projection.name}" if self.path else projection.name


def find_slots(model: nn.Module) -> list[Slot]:
    """Every place for a pair in the model, in the order of its modules.

    Raises:
        ArchitectureError: If no record covers the model or one of its submodules, or an attention cannot be served.
    """
    slots: dict[str, Slot] = {}
    refusals: list[str] = []
    empty: list[str] = []  # why records that cover a module found nothing in it
    records: dict[type, Architecture | None] = {}  # a model has thousands of modules, but few classes
    for prefix, module in unwrap(model).named_modules():
        kind = type(module)
        if kind not in records:
            records[kind] = _entry(ARCHITECTURES, kind)
            if records[kind] is None and (reason := _entry(REFUSED, kind)) is not None:
                refusals.append(f"{kind.__name__}: {reason}")
        if (record := records[kind]) is not None:
            found = list(_slots_of(_plain(prefix), module, record))
            slots.update((slot.key, slot) for slot in found if slot.key not in slots)
            empty += [] if found else [no_site(record, module)]
    if not slots and refusals:
        raise ArchitectureError(f"Serial LoRA does not serve this model. {'; '.join(dict.fromkeys(refusals))}")
    if not slots:
        raise ArchitectureError(empty[0] if empty else no_record(unwrap(model)))
    check_apart(slots.values())
    return list(slots.values())


def select_slots(model: nn.Module, config: SerialLoraConfig) -> list[Slot]:
    """The places that a config chooses.

    Raises:
        SerialLoraError: If an input's name is unknown, a pattern matches nothing, or nothing is left.
    """
    slots = find_slots(model)
    names = list(dict.fromkeys(slot.pair.name for slot in slots))
    if config.inputs is not None and (unknown := [name for name in config.inputs if name not in names]):
        raise SerialLoraError(
            f"inputs={list(config.inputs)} names {unknown}, but {type(unwrap(model)).__name__} has {names}."
        )
    for pattern in (*(config.targets or ()), *config.rank_pattern, *config.alpha_pattern):
        names_of_pairs = (slot.key for slot in slots if pattern in config.rank_pattern)
        if not any(matches(pattern, name) for name in (*(slot.path for slot in slots), *names_of_pairs)):
            raise SerialLoraError(f"The pattern {pattern!r} matches no site. {_listing(slots)}")
    chosen = [slot for slot in slots if is_chosen(slot, config)]
    if not chosen:
        raise SerialLoraError(
            f"Nothing matched inputs={config.inputs}, targets={config.targets}, exclude={config.exclude}, "
            f"layers={config.layers}. {_listing(slots)}"
        )
    return chosen


def is_chosen(slot: Slot, config: SerialLoraConfig) -> bool:
    """Whether a config chooses this place."""
    wanted = not slot.pair.optional if config.inputs is None else slot.pair.name in config.inputs
    return wanted and config.selects(slot.path)


def lora_equivalent(model: nn.Module, chosen: list[Slot], config: SerialLoraConfig) -> int:
    """Parameters of a LoRA of the same rank on every projection of the chosen sites, the output's included."""
    paths = {slot.path for slot in chosen if not slot.pair.optional}
    wanted = {slot.key for slot in chosen}
    weights = {
        id(projection.owner): (projection, config.rank_of(slot.path, slot.key))
        for slot in find_slots(model)
        if slot.key in wanted or (slot.path in paths and slot.pair.name.endswith("attention_output"))
        for projection in slot.projections
    }
    return sum(rank * (out_features(p) + in_features(p)) for p, rank in weights.values())


def in_features(projection: Projection) -> int:
    """Width of what the projection reads; known also where the stored weight is quantized."""
    width = getattr(projection.owner, "in_features", None)
    return width if width is not None else projection.weight.shape[-1]


def out_features(projection: Projection) -> int:
    """Width of what the projection gives."""
    width = getattr(projection.owner, "out_features", None)
    return width if width is not None else projection.weight.shape[0]


def _entry(table: Mapping[str, T], kind: type) -> T | None:
    """What a table by class name has for a class, or for the nearest class that it derives from."""
    return next((table[c.__name__] for c in kind.__mro__ if c.__name__ in table), None)


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _slots_of(prefix: str, model: nn.Module, record: Architecture) -> Iterator[Slot]:
    check_config(record, getattr(model, "config", None))
    if not is_built_in(record):
        check_fit(record, model)
    for pattern, pairs in record.sites.items():
        for path, site in expand(model, pattern):
            full = ".".join(part for part in (prefix, path) if part)
            for pair in pairs:
                if pair.without and projection_of(site, pair.without) is not None:
                    continue
                projections = tuple(p for name in pair.projections if (p := projection_of(site, name)) is not None)
                if projections:
                    yield Slot(full, site, pair, projections, _features(full, site, projections), record.family)


def _features(path: str, site: nn.Module, projections: tuple[Projection, ...]) -> int:
    norms = [name for name in _REFUSED_NORMS if getattr(site, name, None) is not None]
    if norms or getattr(site, "residual_connection", False):
        raise ArchitectureError(
            f"The attention {path!r} has {', '.join(norms) or 'a residual connection'}: it changes its input before "
            "the projections, or adds it back, so a serial pair would not equal its fused weights."
        )
    if isinstance(site, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ArchitectureError(
            f"The site {path!r} is a {type(site).__name__}, which would take its pair for one more of its members. "
            "Name the module around it in the record, and the projections by their path from there."
        )
    widths = {projection.name: in_features(projection) for projection in projections}
    if len(set(widths.values())) != 1:
        raise ArchitectureError(f"The projections of {path!r} that share a pair read different widths: {widths}.")
    return next(iter(widths.values()))


def _listing(slots: list[Slot]) -> str:
    sites = list(dict.fromkeys(slot.path for slot in slots))
    shown = ", ".join(sites[:6]) + (f", ... {sites[-1]}" if len(sites) > 6 else "")
    return (
        f"There are {len(sites)} sites: {shown}; with the inputs {list(dict.fromkeys(s.pair.name for s in slots))}. "
        "Patterns are regular expressions, anchored at both ends."
    )
