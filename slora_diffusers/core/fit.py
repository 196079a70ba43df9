"""Why a record does not fit a model: which name it looked for, and which names are there."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import ArchitectureError
from ..records.registry import ARCHITECTURES, MAYBE, Architecture, Pair
from .expand import Projection, expand, projection_of

if TYPE_CHECKING:
    from .sites import Slot

_PAGE = "docs/architectures.md, section 'A model of your own'"


def check_fit(record: Architecture, model: nn.Module) -> None:
    """Raise ArchitectureError unless all that a record names is somewhere in a model of its.

    A name with a ? at its end may be missing. The records that come with the package are not held to this: they cover
    whole families, of which no model has all.
    """
    for pattern, pairs in record.sites.items():
        sites = [site for _, site in expand(model, pattern)]
        if not sites and not pattern.endswith(MAYBE):
            raise ArchitectureError(_no_path(record, model, pattern))
        for pair in pairs if sites else ():
            _check_pair(record, pattern, sites, pair)


def check_apart(slots: Iterable[Slot]) -> None:
    """Raise ArchitectureError if two pairs transform one input or feed one weight: fused, they would not be what
    they are live."""
    taken: dict[tuple[int, str], Slot] = {}
    for slot in slots:
        inputs = [((id(slot.module), name), f"read the input {name!r}") for name in slot.pair.inputs]
        weights = [((id(p.owner), p.attribute), f"feed {slot.called(p)!r}") for p in slot.projections]
        for key, what in (*inputs, *dict(weights).items()):
            if (other := taken.setdefault(key, slot)) is not slot:
                raise ArchitectureError(
                    f"The pairs {other.key!r} and {slot.key!r} both {what}. One pair reads an input, and feeds all "
                    f"projections of it: name them in one Pair of the record {slot.family!r}."
                )


def no_site(record: Architecture, model: nn.Module) -> str:
    """The message for a model none of whose modules a record finds."""
    return _no_path(record, model, next(iter(record.sites)))


def no_record(model: nn.Module) -> str:
    """The message for a model that no record covers."""
    kinds = dict.fromkeys(type(module).__name__ for module in model.modules())
    near = dict.fromkeys(hit for kind in list(kinds)[:50] for hit in difflib.get_close_matches(kind, ARCHITECTURES, 2))
    hint = f" The nearest that there is one for: {', '.join(list(near)[:4])}." if near else ""
    return (
        f"No architecture is registered for {type(model).__name__} or what it contains.{hint} Add yours with "
        f"register_architecture(): {_PAGE}."
    )


def _check_pair(record: Architecture, pattern: str, sites: list[nn.Module], pair: Pair) -> None:
    reading = [site for site in sites if not (pair.without and projection_of(site, pair.without) is not None)]
    for name in pair.projections if reading else ():
        found = [projection for site in reading if (projection := projection_of(site, name)) is not None]
        for projection in found:
            _check_matrix(record, pattern, projection)
        if found or name.endswith(MAYBE):
            continue
        linears = [path for path, module in reading[0].named_modules() if isinstance(module, nn.Linear)]
        raise ArchitectureError(
            f"The record {record.family!r} names the projection {name!r} of {_called(pattern)}, but no such module has "
            f"it. {_there(name, linears, 'Its Linears are')} Mark a projection that some models lack with a {MAYBE} at "
            "its end."
        )
    parameters = inspect.signature(type(reading[0]).forward).parameters if reading else {}
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters.values()):
        return
    for name in pair.inputs if reading else ():
        if name not in parameters:
            raise ArchitectureError(
                f"The record {record.family!r} names the input {name!r} of {_called(pattern)}, but the forward of "
                f"{type(reading[0]).__name__} takes {', '.join(list(parameters)[1:])}."
            )


def _check_matrix(record: Architecture, pattern: str, projection: Projection) -> None:
    """Whether it multiplies what it reads by a matrix: what does something else to it cannot be fused with a pair."""
    owner, weight = projection.owner, getattr(projection.owner, projection.attribute, None)
    packed = projection.attribute == "weight" and hasattr(owner, "in_features")  # quantized: of whatever shape
    if isinstance(owner, nn.Embedding | nn.Bilinear) or not (packed or (torch.is_tensor(weight) and weight.ndim == 2)):
        kind = type(owner if projection.attribute == "weight" else weight).__name__
        raise ArchitectureError(
            f"The record {record.family!r} names the projection {projection.name!r} of {_called(pattern)}, but that is "
            f"of class {kind}; a projection is a Linear, or a parameter that is a matrix (out, in)."
        )


def _called(pattern: str) -> str:
    return repr(pattern) if pattern else "the model itself"


def _no_path(record: Architecture, model: nn.Module, pattern: str) -> str:
    """Follows the pattern as far as it goes."""
    parts, here = pattern.removesuffix(MAYBE).split("."), ""
    for end in range(1, len(parts) + 1):
        found = [module for _, module in expand(model, ".".join(parts[:end]))]
        if not found:
            at = [module for _, module in expand(model, here)] if here else [model]
            children = dict.fromkeys(name for module in at for name, _ in module.named_children())
            where = f"at {here!r} there are" if here else "its modules are"
            missing = parts[end - 1]
            return (
                f"The record {record.family!r} names the site {pattern!r}, but {type(model).__name__} has no "
                f"{missing!r} there. {_there(missing, children, where[0].upper() + where[1:])} Mark a site that some "
                f"models lack with a {MAYBE} at its end."
            )
        here = ".".join(parts[:end])
    return f"The record {record.family!r} finds no pair at {pattern!r} of {type(model).__name__}."


def _there(missing: str, names: Iterable[str], what: str) -> str:
    names = list(names)
    near = difflib.get_close_matches(missing, names, 1)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"
    return f"{what} {shown}." + (f" Did you mean {near[0]!r}?" if near else "")
