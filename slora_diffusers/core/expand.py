"""From the names in a record to the modules and weights of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..records.registry import MAYBE
from .pair import fuse


@dataclass(frozen=True)
class Projection:
    """One weight (out, d) that a pair feeds: `owner.attribute`, at `name` inside the site."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> Tensor:
        """The weight, (out, d), as the module shows it: perhaps a placeholder, or quantized; see `core.offload`."""
        return self.oriented(getattr(self.owner, self.attribute))

    def oriented(self, W: Tensor) -> Tensor:
        """A weight as its module stores it -> as a matrix (out, d), and back."""
        return W.t() if self._transposed else W

    def fused(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W' = W (I + B A) of a weight as its module stores it, stored likewise."""
        return self.oriented(fuse(self.oriented(W), A, B)).contiguous()

    @property
    def _transposed(self) -> bool:
        """Whether the module stores (in, out), as the Conv1D of GPT-2 does; PEFT's LoRA on one has it inside."""
        return type(getattr(self.owner, "base_layer", self.owner)).__name__ == "Conv1D"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers, or below a head."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, getattr(model, "adapted_part", ""), None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def expand(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the submodules that a pattern of path components stands for; `*` is any one component."""
    parts = pattern.removesuffix(MAYBE).split(".") if pattern else []
    return _expand(module, parts, "")


def projection_of(site: nn.Module, name: str) -> Projection | None:
    """The projection at a path inside a site, or None where the site has no such module or parameter."""
    name = name.removesuffix(MAYBE)
    parent, _, attribute = name.rpartition(".")
    try:
        owner = site.get_submodule(parent)
    except AttributeError:
        return None
    target = getattr(owner, attribute, None)
    if isinstance(target, nn.Module):
        return Projection(name, target, "weight")
    return Projection(name, owner, attribute) if isinstance(target, nn.Parameter) else None


def _expand(module: nn.Module, parts: list[str], path: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if not parts:
        yield path, module
        return
    head, *rest = parts
    names = [name for name, _ in module.named_children()] if head == "*" else [head]
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            yield from _expand(child, rest, f"{path}.{name}" if path else name)
