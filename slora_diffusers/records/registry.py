"""Where serial pairs sit: one record per family of models, matched by class name and importing nothing.

A *site* is a module whose forward reads the tensors to adapt, almost always an attention. A *pair* belongs to one
site, transforms one or more of its inputs and feeds the named projections. Inject, fuse, export, counting and the
tests are all driven by these records; `register_architecture` adds one for a model of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ArchitectureError
from . import RECORDS
from .base import OPTIONAL_PAIRS, Architecture, Pair, names

__all__ = [
    "ARCHITECTURES",
    "OPTIONAL_PAIRS",
    "REFUSED",
    "Architecture",
    "Pair",
    "check_config",
    "register_architecture",
]

ARCHITECTURES: dict[str, Architecture] = {}
"""Model class name -> its record."""

_SHARED = "the positions go through the same projections as the tokens, past what a pair could transform"
REFUSED: dict[str, str] = {"DebertaV2Layer": _SHARED, "DebertaLayer": _SHARED}
"""Model class name -> why no pair can serve it exactly. Every transformer of diffusers 0.42 has a record."""


_SITES = 'a mapping from paths to tuples of Pair, such as {"blocks.*.attn": (Pair(...),)}'

MAYBE = "?"
"""At the end of a site's path or of a projection in a record: some models of the family lack it."""


def register_architecture(record: Architecture) -> Architecture:
    """Add a record for a family of models, or replace the one its class names have.

    All that the record names must be in a model that it covers, or attaching an adapter is an error that says what is
    missing and what is there; a name that some models lack has a ? at its end: "single_blocks.*?", "add_q_proj?".

    Args:
        record: The family's class names and sites.

    Returns:
        The record, so that the call can stand where it is defined.

    Raises:
        ArchitectureError: If the record names no model, no site, or a site without a pair, or something in it is of
            the wrong kind. Nothing is registered then.
    """
    if not isinstance(record, Architecture):
        raise ArchitectureError(f"register_architecture() takes an Architecture; got {type(record).__name__}.")
    models = names(f"models of the record {record.family!r}", record.models, '("MyTransformer",)')
    if not isinstance(record.sites, Mapping):
        raise ArchitectureError(f"The sites of the record {record.family!r} must be {_SITES}; got {record.sites!r}.")
    if not record.models or not record.sites or not all(record.sites.values()):
        raise ArchitectureError(
            f"The record {record.family!r} needs at least one model class name and one site, and every site a pair; "
            f"got models={record.models!r}, sites={dict(record.sites)!r}."
        )
    for path, pairs in record.sites.items():
        parts = path.removesuffix(MAYBE).split(".") if isinstance(path, str) else [""]
        if path != "" and not all(part == "*" or (part and not {*part} & {"*", MAYBE}) for part in parts):
            raise ArchitectureError(
                f"The record {record.family!r} has the site {path!r}; a site is a path of names, where * stands for a "
                f'whole name, and a {MAYBE} at the end marks a path that some models lack: "blocks.*.attn".'
            )
        if not isinstance(pairs, tuple | list) or not all(isinstance(pair, Pair) for pair in pairs):
            raise ArchitectureError(
                f"The sites of the record {record.family!r} must be {_SITES}; at {path!r} there is {pairs!r}."
            )
    for model in models:
        ARCHITECTURES[model] = record
    return record


def check_config(record: Architecture, config: Any) -> None:
    """Raise ArchitectureError unless a model's config (a mapping or an object) has what its record requires."""
    for key, wanted in record.requires.items():
        given = config.get(key, wanted) if hasattr(config, "get") else getattr(config, key, wanted)
        if given != wanted:
            raise ArchitectureError(
                f"The record {record.family!r} holds for {key}={wanted!r} only, and this model has {key}={given!r}: "
                "its attentions read other inputs. Register a record for it with register_architecture()."
            )


def is_built_in(record: Architecture) -> bool:
    """Whether a record came with the package."""
    return any(record is built_in for built_in in RECORDS)


for _record in RECORDS:
    register_architecture(_record)
