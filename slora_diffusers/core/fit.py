"""Why a record does not fit a model: which name it looked for, and which names are there."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

from torch import nn

from ..errors import ArchitectureError
from ..records.registry import ARCHITECTURES, MAYBE, Architecture, Pair
from .expand import expand, projection_of

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
        if name.endswith(MAYBE) or any(projection_of(site, name) is not None for site in reading):
            continue
        linears = [path for path, module in reading[0].named_modules() if isinstance(module, nn.Linear)]
        raise ArchitectureError(
            f"The record {record.family!r} names the projection {name!r} of {pattern!r}, but no such module has it. "
            f"{_there(name, linears, 'Its Linears are')} Mark a projection that some models lack with a {MAYBE} at its "
            "end."
        )
    parameters = inspect.signature(type(reading[0]).forward).parameters if reading else {}
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters.values()):
        return
    for name in pair.inputs if reading else ():
        if name not in parameters:
            raise ArchitectureError(
                f"The record {record.family!r} names the input {name!r} of {pattern!r}, but the forward of "
                f"{type(reading[0]).__name__} takes {', '.join(list(parameters)[1:])}."
            )


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
