"""What adapters a model holds, and their parameters for an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.components import adapted, check_known, components_of, has_adapters, is_pipeline
from ..core.names import split_place
from ..core.sites import unwrap
from ..core.state import modules_of, pairs_of, parameters_of, registry_of


@dataclass(frozen=True)
class SerialLoraStatus:
    """The adapters of one model; `print` shows them as a table.

    Args:
        model: Class name of the model.
        adapters: {name: {"rank", "sites", "pairs", "parameters", "modules", "dtype", "device", "trainable"}}.
        active: Names of the adapters in effect, fused or live.
        weights: {name: weight} of the active ones.
        fused: Names of those that are merged into the weights.
        sites: Number of adapted sites of the model.
        parameters: Number of parameters of all adapters.
        capacity: (largest rank, number of adapters) that room is reserved for, or None.
    """

    model: str
    adapters: dict[str, dict[str, Any]]
    active: list[str]
    weights: dict[str, Any]
    fused: list[str]
    sites: int
    parameters: int
    capacity: tuple[int, int] | None

    def __str__(self) -> str:
        if not self.adapters:
            return f"{self.model}: no Serial LoRA adapter"
        head = ("adapter", "state", "weight", "rank", "sites", "pairs", "parameters", "dtype", "device")
        rows = [head, *(self._row(name) for name in self.adapters)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"{self.model}: {self.parameters:,} parameters on {self.sites} sites", *lines])

    def _row(self, name: str) -> tuple[str, ...]:
        a = self.adapters[name]
        state = "fused" if name in self.fused else "active" if name in self.active else "inactive"
        state += ", trainable" if a["trainable"] else ""
        rank = "-".join(map(str, sorted({min(a["rank"]), max(a["rank"])})))
        cells = (a["sites"], a["pairs"], f"{a['parameters']:,}", ", ".join(a["dtype"]), ", ".join(a["device"]))
        return (name, state, str(self.weights.get(name, "-")), rank, *map(str, cells))


def serial_lora_status(model: Any) -> Any:
    """The adapters of a model, which are active with what weights, what is fused, and where they are.

    Args:
        model: A model, with adapters or without; or a pipeline.

    Returns:
        A `SerialLoraStatus`; of a pipeline {component: status} of every component that has adapters.
    """
    if is_pipeline(model):
        return {component: _status(one) for component, one in adapted(model, required=False).items()}
    (one,) = components_of(model).values()
    return _status(one)


def serial_lora_parameters(model: Any, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters A (r, d) and B (d, r) of one adapter, or of all, of a model or a pipeline, for an optimizer.

    Those of the modules that it saves whole (`modules_to_save`) follow.

    Args:
        model: A model with adapters; or a pipeline, over its components that have some.
        adapter_name: Which one; `None` takes all.

    Raises:
        AdapterStateError: If there is no adapter, or none of that name.
    """
    models = adapted(model)
    check_known(models, [] if adapter_name is None else [adapter_name])
    return [parameter for one in models.values() for parameter in parameters_of(one, adapter_name)]


def _status(model: nn.Module) -> SerialLoraStatus:
    if not has_adapters(model):
        return SerialLoraStatus(type(unwrap(model)).__name__, {}, [], {}, [], 0, 0, None)
    registry, pairs, modules = registry_of(model), pairs_of(model), modules_of(model)
    adapters = {}
    for name in registry.configs:
        held = {key: pair.matrices(name) for key, pair in pairs.items() if name in pair.scaling}
        tensors = list(parameters_of(model, name))
        adapters[name] = {
            "rank": sorted({A.shape[0] for A, _ in held.values()}),
            "sites": len({split_place(key)[0] for key in held}),
            "pairs": len(held),
            "parameters": sum(tensor.numel() for tensor in tensors),
            "modules": modules.get(name, []),
            "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
            "device": sorted({str(tensor.device) for tensor in tensors}),
            "trainable": any(tensor.requires_grad for tensor in tensors),
        }
    active = registry.fused.weights if registry.fused is not None else registry.active
    return SerialLoraStatus(
        type(unwrap(model)).__name__,
        adapters,
        list(active),
        dict(active),
        list(registry.fused.weights) if registry.fused is not None else [],
        len({split_place(key)[0] for key, pair in pairs.items() if pair.scaling}),
        sum(a["parameters"] for a in adapters.values()),
        registry.capacity,
    )
