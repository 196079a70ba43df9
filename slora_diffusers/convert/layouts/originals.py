"""How a table of original module names is written: a name there, and the Linears here that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Names = Mapping[str, tuple[str, ...]]
"""{name there: paths here}, `{}` standing for the index of a block.

A name that stands for several paths is one Linear there, their rows below each other in this order. A path that ends
in `~` has the halves of its rows the other way round there (scale and shift, gate and value); `~2` only where the
Linear is of two such parts, for the last block of SD3 has a modulation of its own.
"""


@dataclass(frozen=True)
class Original:
    """What a family's modules are called in its first code.

    Args:
        names: As ComfyUI keeps them; LoRAs are written under these.
        aliases: Other names that files use, for reading alone.
        same: Whether modules that no name stands for have the same path there as here.
        renamed: {start of a path here: start there}, with `same`.
        encoders: {component: what the tools call it}; ComfyUI has no key for the others.
        requires: {key of the model's config: value} without which the names are others.
    """

    names: Names
    aliases: Names = field(default_factory=dict)
    same: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, object] = field(default_factory=dict)


def block(there: str, here: str, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The names of one block: {name in it there: paths in it here, separated by spaces}."""
    return {_join(there, name): tuple(_join(here, path) for path in paths.split()) for name, paths in names.items()}


def rows(site: str, projections: str) -> str:
    """Projections of a site, whose rows are below each other there."""
    return " ".join(f"{site}.{projection}" for projection in projections.split())


def spelled(names: Names, spellings: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The names that another spelling changes, under it."""
    found = {}
    for name, paths in names.items():
        other = name
        for ours, theirs in spellings.items():
            other = other.replace(ours, theirs)
        if other != name:
            found[other] = paths
    return found


def _join(start: str, rest: str) -> str:
    return f"{start}.{rest}" if start else rest
