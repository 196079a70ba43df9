"""Start an adapter from the gradient of the loss: A on its leading right singular vectors, in two backward passes.

With M = BA, `x~ = x + s M x` has the gradient dL/dM = s G at M = 0, d x d for a pair. It is never built: with
orthonormal rows in A and B = 0, `B.grad = s G A^T` is a sketch of its columns; with their orthonormal basis Q in B
and A = 0, `A.grad = s Q^T G` is one of its rows, and that one's singular vectors are the start. Further passes go on
in turn, which is subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.calls import ONE_VERB, alone
from ..core.change import changing
from ..core.components import adapted, check_known, components_of, held_by, is_pipeline
from ..core.offload import Storage
from ..core.pair import GRADIENT, gradient_start, orthonormal
from ..core.processes import from_first, is_sharded, mean, put, whole
from ..core.state import check_not_fused, pairs_of, registry_of
from ..core.tensors import is_finite
from ..errors import AdapterStateError, SerialLoraError
from .lifecycle import logger


class NotFiniteError(SerialLoraError):
    """The gradient overflows, or is not a number."""


Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]
"""Name of a pair -> its A (r, d) and B (out, r): a serial pair's own, or those of any LoRA."""


@dataclass(frozen=True)
class InitializeReport:
    """What `initialize_serial_lora` did.

    Args:
        adapter_name: The adapter.
        energies: Norm of the gradient that a pair's start caught, by the pair's place.
        unchanged: The pairs that no gradient reached: they keep the start that they had.
    """

    adapter_name: str
    energies: dict[str, float]
    unchanged: list[str]

    def __str__(self) -> str:
        return f"{self.adapter_name}: {len(self.energies)} pairs start from the gradient" + (
            f"; no gradient reached {', '.join(self.unchanged)}" if self.unchanged else ""
        )


@alone
def initialize_serial_lora(
    model: Any, backward: Callable[[], object], adapter_name: str = "default", passes: int = 2
) -> InitializeReport:
    """Put A of a new adapter on the leading right singular vectors of the loss's gradient; B stays zero.

    The output does not change, to the bit. Dropout is off while `backward` runs, every pass sees the same random
    numbers, and gradients, modes and random states are afterwards what they were. The gradients of several processes
    are averaged: every one of them must call. If `backward` raises, the model is as it was.

    Args:
        model: A model with an adapter that is active and not trained yet, or a pipeline, over its components that
            have the adapter. Give the model that the loss is computed with (with its head, say): gradients that
            `backward` leaves elsewhere stay there. A new head of zeros passes no gradient on, so that it must be
            trained for a few steps first.
        backward: Runs the forward and backward pass of the training loss over the data of one's choice, a few
            batches, and leaves the sum of their gradients; no optimizer step.
        adapter_name: The adapter.
        passes: How often `backward` runs. Two are usual; more of them are more exact.

    Returns:
        How much each pair caught, and which pairs no gradient reached.

    Raises:
        AdapterStateError: If the adapter is unknown, not active, fused or trained already.
        SerialLoraError: If no pair sees a gradient, or one is not finite.

    Example:
        >>> def backward():
        ...     for images, labels in batches[:8]:
        ...         model(images, labels=labels).loss.backward()
        >>> initialize_serial_lora(model, backward)

    Source: LoRA-GA (arXiv 2407.05000) and LoRA-One (arXiv 2502.01235) start LoRA from its gradient.
    """
    check_known(adapted(model), [adapter_name])
    models = {component: one for component, one in adapted(model).items() if held_by(one, [adapter_name])}
    parts = {component: _factors_to_start(one, adapter_name) for component, one in models.items()}
    prefix = {component: f"{component}." if is_pipeline(model) else "" for component in models}
    factors = {f"{prefix[component]}{key}": pair for component, part in parts.items() for key, pair in part.items()}
    starts, energies = gradient_starts(list(components_of(model).values()), factors, backward, passes)
    with ONE_VERB, changing(*models.values()) as change:
        put_starts(factors, starts, change.on_failure)
        for one in models.values():
            record_start(one, adapter_name)
    report = InitializeReport(adapter_name, energies, [name for name in factors if name not in starts])
    if report.unchanged:
        logger.warning("%s", report)
    return report


def gradient_starts(
    models: Sequence[nn.Module], factors: Factors, backward: Callable[[], object], passes: int = 2
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The starts of A that the gradient gives, and the norm that each caught; the model is as it was.

    Args:
        models: What `backward` runs, whose gradients and modes are to be kept.
        factors: The pairs; B is zero.
        backward: As for `initialize_serial_lora`.
        passes: As for `initialize_serial_lora`.

    Raises:
        SerialLoraError: If `passes` is not a number of passes, no pair sees a gradient, or one is not finite.
    """
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise SerialLoraError(f"passes must be a whole number of at least 1; got {passes!r}.")
    usual = {name: whole(A) for name, (A, _) in factors.items()}
    with kept(models, [matrix for pair in factors.values() for matrix in pair]):
        # The last pass reads the gradient of A, the one before it that of B, and so on.
        sketches = {name: _noise(B) for name, (_, B) in factors.items()} if passes % 2 else usual
        for left in range(passes, 0, -1):
            read_A = left % 2 == 1
            bases = {
                name: from_first(orthonormal(sketch), factors[name][0].device) for name, sketch in sketches.items()
            }
            _probe(factors, bases, read_A)
            with same_draws(models), torch.inference_mode(False), torch.enable_grad():
                backward()
            sketches = _sketches(factors, read_A)
    energies = {name: Z.double().norm().item() for name, Z in sketches.items()}
    if not any(energies.values()):
        raise SerialLoraError(
            "No pair of the adapter saw a gradient. Let backward() call loss.backward() and leave the gradients there, "
            "with the adapter's scale not 0; a new head of zeros passes none on until it has been trained a little."
        )
    found = {name: Z for name, Z in sketches.items() if energies[name]}
    starts = {name: from_first(gradient_start(Z, usual[name]), factors[name][0].device) for name, Z in found.items()}
    return starts, {name: energies[name] for name in found}


def record_start(model: nn.Module, adapter_name: str) -> None:
    """Note in an adapter's settings that its start is the gradient's."""
    configs = registry_of(model).configs
    configs[adapter_name] = replace(configs[adapter_name], init=GRADIENT)


def put_starts(factors: Factors, starts: Mapping[str, Tensor], on_failure: Callable[[Callable[[], Any]], Any]) -> None:
    """Write the starts into the A's, having named what puts back the values that they have now."""
    for name, start in starts.items():
        A = factors[name][0]
        on_failure(partial(put, A, A.detach().clone()))
        put(A, start)


def _factors_to_start(model: nn.Module, adapter_name: str) -> Factors:
    """The matrices of an adapter that can be started now."""
    registry = registry_of(model)
    check_not_fused(registry, "start an adapter from the gradient")
    if registry.capacity is not None:
        raise AdapterStateError(
            "The model has capacity reserved for swapping adapters, and its fixed operands see no gradient. Call "
            "unload_serial_lora(), and add the adapter again."
        )
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP2 leaves what it gathered last, and would drop what is written there
            module.reshard()  # type: ignore[operator]
    pairs = {key: pair for key, pair in pairs_of(model).items() if adapter_name in pair.scaling}
    if not any(adapter_name in pair.gains for pair in pairs.values()):
        raise AdapterStateError(
            f"{adapter_name!r} is not active, or its scale is 0, so that no gradient reaches it: make it active with "
            "set_serial_lora() first."
        )
    names = [f"lora_{part}_{adapter_name}" for part in "AB"]
    storage, factors = Storage(model), {}
    for key, pair in pairs.items():
        A, B = (pair.get_parameter(name) for name in names)
        for name in () if is_sharded(A) else names:
            storage.check_writable(pair, name, "start an adapter from the gradient", key)
        if tuple(A.shape[1:]) != (pair.features,):
            raise AdapterStateError(
                f"The matrices at {key!r} are sharded in a way that hides their shape (FSDP1, ZeRO-3): start the "
                "adapter before the model is sharded, or shard it with FSDP2."
            )
        if whole(B).any():
            raise AdapterStateError(
                f"{adapter_name!r} is trained already (B is not zero at {key!r}), and a new start would lose that. Add "
                "a new adapter with add_serial_lora(), and initialize it before training."
            )
        factors[key] = A, B
    return factors


def _probe(factors: Factors, bases: Mapping[str, Tensor], read_A: bool) -> None:
    """Set A = 0 and B = Q to read the gradient of A, or A = Q^T and B = 0 to read that of B."""
    for name, (A, B) in factors.items():
        A.grad = B.grad = None
        zero, base = (A, B) if read_A else (B, A)
        put(zero, torch.zeros(zero.shape, dtype=zero.dtype))
        put(base, bases[name].mT if read_A else bases[name])


def _sketches(factors: Factors, read_A: bool) -> dict[str, Tensor]:
    """The gradient of A, or that of B transposed, averaged over the processes, on the CPU."""
    found = {}
    for name, (A, B) in factors.items():
        probed = A if read_A else B
        gradient = torch.zeros_like(probed) if probed.grad is None else probed.grad.detach()
        # FSDP2 has averaged what it shards.
        gathered = whole(gradient) if is_sharded(gradient) else mean(gradient.float())
        if not is_finite(gathered):
            raise NotFiniteError(
                f"The gradient at {name!r} is not finite: the loss overflows. Compute it in bf16 or fp32, or lower "
                "the factor that it is scaled by."
            )
        found[name] = (gathered if read_A else gathered.mT).cpu()
    return found


@contextmanager
def kept(models: Sequence[nn.Module], probed: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters may take any value and gradient, and dropout is off; afterwards all is as it was."""
    values = [parameter.detach().clone() for parameter in probed]
    parameters = {id(p): p for p in (*_parameters(models), *probed)}.values()
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for parameter, _, _ in gradients:
            parameter.grad = None
        for parameter in probed:
            parameter.requires_grad_(True)
        for module, _ in modes:
            # What recomputes its activations does so only in training mode, in transformers.
            module.training = module.training and bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for parameter, value in zip(probed, values, strict=True):
            put(parameter, value)
        for parameter, gradient, required in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(required)
        for module, mode in modes:
            module.training = mode


@contextmanager
def same_draws(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards the generators stand where they stood."""
    devices = {p.device for p in _parameters(models) if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    indices = sorted({device.index or 0 for device in devices})
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(indices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _parameters(models: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    return (parameter for model in models for parameter in model.parameters())


def _noise(B: Tensor) -> Tensor:
    """Normal noise of B's transposed shape (r, out), the same everywhere."""
    return torch.randn(B.shape[::-1], generator=torch.Generator().manual_seed(0))
