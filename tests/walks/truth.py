"""What a model must compute, worked out in float64 from which adapters, weights and scales hold, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import Terms, places

Weights = float | Mapping[str, float]


@dataclass(frozen=True)
class Truth:
    """The base's weights, the adapters, and which of them hold. Every verb gives another `Truth`; none is changed.

    Args:
        net: The architecture in float64; only `output` writes to it.
        base: {name of a parameter or buffer: value}, fused adapters and the neighbours' fused LoRA included.
        adapters: {name: {`<site>.serial_lora.<pair>`: [(s, A, B)]}}.
        whole: {name: {name of a tensor: value}} of the modules that an adapter brings whole.
        active: {name: weight} of what is live.
        fused: {name: weight} of what a fuse merged, or None.
        unfused: The weights that unfuse would put back.
        lora: {path of a Linear: dW} of a neighbour's LoRA that is live.
    """

    net: nn.Module
    base: Mapping[str, Tensor]
    adapters: Mapping[str, Mapping[str, Terms]] = field(default_factory=dict)
    whole: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    active: Mapping[str, Weights] = field(default_factory=dict)
    fused: Mapping[str, Weights] | None = None
    unfused: Mapping[str, Tensor] = field(default_factory=dict)
    lora: Mapping[str, Tensor] = field(default_factory=dict)

    def shifts(self, weights: Mapping[str, Weights], scale: float = 1.0) -> dict[str, Tensor]:
        """{name of a weight: I + sum_i w_i s_i B_i A_i}, what the Linear's input is multiplied with."""
        found: dict[str, Tensor] = {}
        for key, (_, row) in places(self.net, optional=True).items():
            site = key.partition(".serial_lora.")[0]
            for name, weight in weights.items():
                for s, A, B in self.adapters[name].get(key, []):
                    M = scale * weight_at(site, weight) * s * B @ A
                    for projection in row.projections:
                        full = f"{site}.{projection}.weight"
                        found[full] = found.get(full, torch.eye(len(M), dtype=M.dtype)) + M
        return found

    def wholes(self, weights: Mapping[str, Weights]) -> dict[str, Tensor]:
        """{name of a tensor: value} of the modules that adapters with these weights, if they are not 0, bring whole."""
        return {
            tensor: value
            for name, weight in weights.items()
            for tensor, value in self.whole.get(name, {}).items()
            if weight_at(tensor.rpartition(".")[0], weight)
        }

    def clash(self, weights: Mapping[str, Weights]) -> bool:
        """Whether two of these adapters would stand in one module's place."""
        brought = [self.wholes({name: weight}).keys() for name, weight in weights.items()]
        return len(set().union(*brought)) < sum(map(len, brought))

    def without(self, names: Collection[str]) -> Truth:
        """The same without some adapters."""
        adapters, whole, active = (
            {name: value for name, value in held.items() if name not in names}
            for held in (self.adapters, self.whole, self.active)
        )
        return replace(self, adapters=adapters, whole=whole, active=active)

    def plus_adapter(self, name: str, terms: Any, whole: Mapping[str, Tensor], weight: Weights | None) -> Truth:
        """The same with one more, active beside the others if it has a weight."""
        active = self.active if weight is None else {**self.active, name: weight}
        return replace(self, adapters={**self.adapters, name: terms}, whole={**self.whole, name: whole}, active=active)

    @torch.no_grad()
    def output(self, arguments: Mapping[str, Any], weights: Mapping[str, Weights] | None = None) -> Tensor:
        """The model's output, flat: (W + dW) (I + sum_i w_i s_i B_i A_i) in every Linear that a pair feeds."""
        held = self.active if weights is None else weights
        shift, whole = self.shifts(held), self.wholes(held)
        for name, parameter in (*self.net.named_parameters(), *self.net.named_buffers()):
            W = whole.get(name, self.base[name]) + self.lora.get(name.removesuffix(".weight"), 0.0)
            parameter.copy_(W @ shift[name] if name in shift else W)
        given = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        return self.net(**given)[0]

    def fuse(self, weights: Mapping[str, Weights], scale: float) -> Truth:
        """W' = W (I + scale sum_i w_i s_i B_i A_i)."""
        shift, whole = self.shifts(weights, scale), self.wholes(weights) if scale else {}
        base = {name: W @ shift[name] if name in shift else whole.get(name, W) for name, W in self.base.items()}
        return replace(self, base=base, active={}, fused=dict(weights), unfused=self.base)

    def unfuse(self) -> Truth:
        """The weights from before the fuse, and what was fused is live."""
        return replace(self, base=self.unfused, active=self.fused or {}, fused=None, unfused={})

    def plus(self, changes: Mapping[str, Tensor], sign: float = 1.0) -> Truth:
        """The base, and what unfuse would put back, with a neighbour's dW in the weights."""
        base = {n: W + sign * changes.get(n.removesuffix(".weight"), 0.0) for n, W in self.base.items()}
        under = {n: W + sign * changes.get(n.removesuffix(".weight"), 0.0) for n, W in self.unfused.items()}
        return replace(self, base=base, unfused=under)

    def rounded(self, dtype: torch.dtype) -> Truth:
        """All as it is after a change of dtype."""
        adapters = {
            name: {key: [(s, _to(A, dtype), _to(B, dtype)) for s, A, B in terms] for key, terms in pairs.items()}
            for name, pairs in self.adapters.items()
        }
        whole = {name: {n: _to(W, dtype) for n, W in held.items()} for name, held in self.whole.items()}
        base, under = ({n: _to(W, dtype) for n, W in which.items()} for which in (self.base, self.unfused))
        return replace(self, adapters=adapters, whole=whole, base=base, unfused=under)


def weight_at(site: str, weight: Weights) -> float:
    """The weight of an adapter at a site: of the first pattern that matches, else 1."""
    if not isinstance(weight, Mapping):
        return weight
    return next((w for pattern, w in weight.items() if re.fullmatch(pattern, site)), 1.0)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()
