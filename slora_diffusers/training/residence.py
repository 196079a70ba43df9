"""What lies where while a run computes: one part of a pipeline at a time, and frozen weights that come where they work.

Text encoders are on the device while they encode, the VAE while it encodes or decodes, and the transformer while it
trains (see `bring`). With `--offload blocks` the frozen weights of its blocks lie on the CPU, with `--quantize fp8` in
8 bits: each comes, whole, to the module that computes with it, and goes again. Autograd would keep what came until the
backward pass; it keeps a note instead, and the weight comes a second time. So nothing changes but the time it takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.training_utils import free_memory
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import SerialLoraError
from .precision import FP8

if TYPE_CHECKING:
    from .options import PipelineOptions
    from .place import Place

# Of these layers diffusers' layerwise casting keeps the weights in 8 bits; what it skips by name is skipped here, too.
_CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)


@contextmanager
def bring(device: torch.device, *modules: nn.Module | None) -> Iterator[None]:
    """Inside, the modules are on the device; afterwards each is where it was."""
    homes = {module: next(module.parameters()).device for module in modules if module is not None}
    try:
        for module in homes:
            module.to(device)
        yield
    finally:
        for module, home in homes.items():
            module.to(home)
        if any(home != device for home in homes.values()):
            free_memory()


@contextmanager
def in_turns(pipe: Any, device: torch.device) -> Iterator[None]:
    """Inside, the pipeline can be called on the device, and each of its models is there for its part of the call."""
    if device.type == "cpu":
        yield
        return
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipe.remove_all_hooks()
        pipe.to("cpu")
        free_memory()


def settle(model: nn.Module, options: PipelineOptions, place: Place) -> None:
    """Put an adapted model where it trains: on the device, but for what --offload and --quantize fp8 keep elsewhere.

    Args:
        model: The model; what is frozen of it is known.
        options: The options.
        place: The processes and their device.

    Raises:
        SerialLoraError: If the weights are sharded over processes, which keeps them in its own way.
    """
    if options.offload is None and options.quantize != FP8:
        model.to(place.device)
        return
    if place.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise SerialLoraError(
            "--offload and --quantize fp8 keep each process's weights in their own way, and FSDP and DeepSpeed in "
            "another: leave them out, or launch without (ddp.yaml)."
        )
    homes = Homes(model, place.device, blocks=options.offload is not None, narrow=options.quantize == FP8)
    # DDP neither sends these to the other processes, which loaded them too, nor asks that they are on its device.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, homes.names)


@dataclass(frozen=True)
class _Note:
    """What autograd keeps of a weight instead of the weight: which it is, and the view of it that was used."""

    parameter: nn.Parameter
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Homes:
    """Where the frozen weights of a model are while nothing computes with them.

    Args:
        model: The model.
        device: Where it computes.
        blocks: Keep those of its blocks on the CPU.
        narrow: Keep those that diffusers' layerwise casting would in 8 bits.

    Attributes:
        names: The parameters that are elsewhere.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, blocks: bool, narrow: bool) -> None:
        self.device, self.names = device, []
        self._widths: dict[nn.Parameter, torch.dtype] = {}  # of a weight at home -> the format it computes in
        self._away: dict[nn.Module, dict[str, nn.Parameter]] = {}  # a module that computes -> its weights at home
        self._here: dict[int, nn.Parameter] = {}  # storage of a copy on the device -> the weight at home
        inside = {id(part) for block in blocks_of(model) for part in block.modules()} if blocks else set()
        skipped = (*DEFAULT_SKIP_MODULES_PATTERN, *_patterns(model))
        for path, module in model.named_modules():
            frozen = {name: p for name, p in module._parameters.items() if p is not None and not p.requires_grad}
            cast = narrow and isinstance(module, _CAST) and not _matches(path, skipped)
            if frozen and (cast or id(module) in inside):
                for name, parameter in frozen.items():
                    self._send_home(parameter, cast, id(module) in inside)
                    self.names.append(f"{path}.{name}")
                module.register_forward_pre_hook(self._come)
                module.register_forward_hook(self._go, always_call=True)  # recomputation ends in an exception
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor not in self._widths:
                tensor.data = tensor.data.to(device)
        self._noting: list[Any] = []
        model.register_forward_pre_hook(self._note)
        model.register_forward_hook(self._stop_noting, always_call=True)

    def _send_home(self, parameter: nn.Parameter, cast: bool, to_cpu: bool) -> None:
        if parameter in self._widths:  # shared by two modules
            return
        self._widths[parameter] = parameter.dtype
        home = parameter.data.to("cpu" if to_cpu else self.device, torch.float8_e4m3fn if cast else parameter.dtype)
        parameter.data = home.pin_memory() if to_cpu and self.device.type == "cuda" else home

    def _fetch(self, parameter: nn.Parameter) -> Tensor:
        """A weight as it is computed with: always a copy, on the stream that computes."""
        dtype = self._widths[parameter]
        return torch.empty_like(parameter, dtype=dtype, device=self.device).copy_(parameter, non_blocking=True)

    def _come(self, module: nn.Module, args: Any) -> None:
        if module in self._away:  # it calls itself
            return
        away = {name: p for name, p in module._parameters.items() if p is not None and p in self._widths}
        self._away[module] = away  # first: not all of them may fit
        for name, parameter in away.items():
            # Another tensor in its place, not another `.data`: autograd and recomputation hold on to the tensor.
            copy = nn.Parameter(self._fetch(parameter), requires_grad=False)
            self._here[_storage(copy)] = parameter
            module._parameters[name] = copy

    def _go(self, module: nn.Module, args: Any, output: Any) -> None:
        for name, parameter in self._away.pop(module, {}).items():
            copy = module._parameters[name]
            assert copy is not None
            self._here.pop(_storage(copy), None)
            module._parameters[name] = parameter

    def _note(self, module: nn.Module, args: Any) -> None:
        """Until the model has computed, autograd keeps notes of weights. Checkpointed blocks recompute them instead."""

        def pack(tensor: Tensor) -> Tensor | _Note:
            parameter = self._here.get(_storage(tensor))
            if parameter is None or tensor.dtype != self._widths[parameter]:
                return tensor
            return _Note(parameter, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(kept: Tensor | _Note) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return self._fetch(kept.parameter).as_strided(kept.shape, kept.stride, kept.offset)

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        hooks.__enter__()
        self._noting.append(hooks)

    def _stop_noting(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._noting:
            self._noting.pop().__exit__(None, None, None)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: what its lists hold, as in diffusers' group offloading."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return [block for blocks in lists for block in blocks]


def _patterns(model: Any) -> list[str]:
    """Modules of a model of diffusers that it keeps wide."""
    return [*(model._keep_in_fp32_modules or ()), *(model._skip_layerwise_casting_patterns or ())]


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module or one that it is in is called so."""
    parts = path.split(".")
    prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(re.search(pattern, prefix) for pattern in patterns for prefix in prefixes)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
