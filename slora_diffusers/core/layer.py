"""The adapters at one place of a model: which are active, with what gains, and the operands of their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterStateError
from . import pair
from .calls import Call, CallState, Sample
from .offload import Storage, tensor_here
from .reserved import Reserved, is_recording


class SerialLoraPair(nn.Module):
    """The low-rank pairs (A_i, B_i) of every adapter for one input of one attention.

    Args:
        features: Width d of the input.
        call: Per-call state of the model that the pair belongs to.

    Source: Zhong et al., arXiv 2503.17750, equation 3.
    """

    def __init__(self, features: int, call: CallState) -> None:
        super().__init__()
        self.features = features
        self.call = call
        self.scaling: dict[str, float] = {}  # s_i of every adapter
        self.dropout: dict[str, float] = {}
        self.weights: dict[str, float] = {}  # w_i of the active adapters
        self.gains: dict[str, float] = {}  # w_i s_i of those that have an effect
        self.reserved: Reserved | None = None  # what compiled graphs read, once capacity is reserved
        self._merged: tuple[object, Tensor, Tensor] | None = None

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, d) and B (d, r) of one adapter: the parameters themselves, wherever they are kept."""
        return tensor_here(self, f"lora_A_{name}"), tensor_here(self, f"lora_B_{name}")

    def add(self, name: str, A: Tensor, B: Tensor, scaling: float, dropout: float, trainable: bool) -> None:
        """Register one adapter's A (r, d), B (d, r), scale s and dropout; it is not active yet."""
        self.register_parameter(f"lora_A_{name}", nn.Parameter(A, requires_grad=trainable))
        self.register_parameter(f"lora_B_{name}", nn.Parameter(B, requires_grad=trainable))
        self.scaling[name], self.dropout[name] = scaling, dropout

    def remove(self, name: str) -> None:
        """Forget one adapter."""
        delattr(self, f"lora_A_{name}")
        delattr(self, f"lora_B_{name}")
        del self.scaling[name], self.dropout[name]
        self.activate({n: w for n, w in self.weights.items() if n != name})

    def activate(self, weights: dict[str, float]) -> None:
        """Make exactly these adapters active, w_i given; adapters that the pair does not hold are skipped."""
        # Sorted, so that the sum, and its rounding, does not depend on the order in which adapters came.
        self.weights = {name: weights[name] for name in sorted(weights) if name in self.scaling}
        self.gains = {name: w * self.scaling[name] for name, w in self.weights.items() if w * self.scaling[name]}
        self._merged = None
        if self.reserved is not None:
            self.reserved.placed.clear()  # copied again, whatever was written to the matrices
            self.fill_reserved(self.call.current())

    def forward(self, x: Tensor) -> Tensor:
        """x~ = x + sum_i w_i s_i B_i A_i x for x of shape (..., d)."""
        # With reserved capacity a graph reads neither adapters nor the call: torch.compile would guard on what it read.
        if self.reserved is not None and is_recording(x):
            return self.reserved(x, self.call.batch)
        call = self.call.current()
        if call.samples is not None:
            return self._forward_per_sample(x, call)
        if call.scale == 0 or not self.gains:
            return x
        A, B, s = self._operands(x)  # (r, d), (d, r)
        if self.training and any(self.dropout[name] for name in self.gains):
            return pair.shift_from(x, self._dropped(x, A), B, s * call.scale)
        return pair.shift(x, A, B, s * call.scale)

    def _dropped(self, x: Tensor, A: Tensor) -> Tensor:
        """A x (..., r), each adapter reading x with its own dropout."""
        parts = A.split([self.matrices(name)[0].shape[0] for name in self.gains])
        dropped = (F.dropout(x, self.dropout[name]) for name in self.gains)
        return torch.cat([F.linear(x_i, A_i) for x_i, A_i in zip(dropped, parts, strict=True)], dim=-1)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """A, B and s such that x~ = x + s B A x: the parameters themselves wherever no move or stacking is needed."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        # A trainable adapter is cast on every call, gradients or not: what writes to it often goes through `.data`, as
        # diffusers' EMAModel does, and no version counter sees that.
        training = any(self.matrices(name)[0].requires_grad for name in self.gains)
        if len(self.gains) == 1:
            (name, gain), *_ = self.gains.items()
            A, B = self.matrices(name)
            # Under autocast a trained parameter is cast, and the cast remembered, by autocast itself.
            if A.device == x.device and (A.dtype == dtype or (training and autocast)):
                return A, B, gain
            if training:
                return A.to(x.device, dtype), B.to(x.device, dtype), gain
        if training or torch.compiler.is_compiling():
            A, B = self.stack(self.gains)
            return A.to(x.device, dtype), B.to(x.device, dtype), 1.0
        return *self._merge_once(x.device, dtype), 1.0

    def _merge_once(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The active adapters stacked, moved and cast, remembered until one of them changes."""
        matrices = [matrix for name in self.gains for matrix in self.matrices(name)]
        versions = (0 if matrix.is_inference() else matrix._version for matrix in matrices)
        # Not what inference_mode left: autograd refuses to go through it.
        key = (device, dtype, torch.is_inference_mode_enabled(), *versions, *(matrix.data_ptr() for matrix in matrices))
        if self._merged is None or self._merged[0] != key:
            with torch.no_grad():
                A, B = self.stack(self.gains)
                self._merged = (key, A.to(device, dtype), B.to(device, dtype).contiguous())
        return self._merged[1], self._merged[2]

    def stack(self, gains: Mapping[str, float], storage: Storage | None = None) -> tuple[Tensor, Tensor]:
        """One pair A (R, d), B (d, R) for the sum of these adapters, with these gains.

        Args:
            gains: {adapter: g_i}.
            storage: Where to read the matrices from, for a verb; None takes them as a forward does.
        """
        read = self.matrices if storage is None else partial(self.kept, storage)
        return pair.stack([(*read(name), gain) for name, gain in gains.items()])

    def _forward_per_sample(self, x: Tensor, call: Call) -> Tensor:
        """x~_b = x_b + s_b B_b A_b x_b, with the adapters of each sample b."""
        assert call.samples is not None and call.stacks is not None
        if len(x) != len(call.rows or call.samples):
            raise AdapterStateError(
                f"serial_lora_batch was given {len(call.samples)} adapter names, but an attention reads a batch of "
                f"{len(x)}, which is not the model's own: a model that folds frames or views into its batch is not "
                "supported. Run it once per adapter."
            )
        key = (id(self), x.dtype, x.device)
        if key not in call.stacks:
            A, B = self._stack_samples(call.samples)  # (p, R, d), (p, d, R)
            rows = torch.tensor(call.rows or range(len(call.samples)), device=x.device)
            call.stacks[key] = A.to(x)[rows], B.to(x)[rows]
        A, B = call.stacks[key]  # (b, R, d), (b, d, R)
        return pair.shift_per_sample(x, A, B, call.scale)

    def _stack_samples(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """A (p, R, d) and B (p, d, R) of the sum of each sample's adapters, padded with zeros to the largest rank."""
        stacked = [self.stack(g) if g else None for g in map(self._gains_of, samples)]
        R = max((both[0].shape[0] for both in stacked if both is not None), default=1)
        reference = next((both[0] for both in stacked if both is not None), torch.zeros(()))
        A = reference.new_zeros(len(samples), R, self.features)
        B = reference.new_zeros(len(samples), self.features, R)
        for i, both in enumerate(stacked):
            if both is not None:
                A[i, : both[0].shape[0]], B[i, :, : both[1].shape[1]] = both
        return A, B

    def _gains_of(self, sample: Sample) -> dict[str, float]:
        """{adapter: w s} of a sample, of those that this pair holds."""
        weighed = {n: self.weights.get(n, 1.0) if w is None else w for n, w in sample if n in self.scaling}
        return {n: w * self.scaling[n] for n, w in weighed.items()}

    def reserve(self, rank: int, samples: int, like: Tensor) -> None:
        """Hold room for adapters of a summed rank, so that later changes of adapters change values, never shapes."""
        self.reserved = Reserved(rank, samples, self.features, like)
        self.fill_reserved(self.call.current())

    def fill_reserved(self, call: Call, each: int = 1) -> bool:
        """Write what a call asks for into the reserved operands; False where they have no room for it."""
        if self.reserved is None:
            return True
        self.call.written = None
        samples = [self.gains] if call.samples is None else [self._gains_of(sample) for sample in call.samples]
        gains = [{name: call.scale * gain for name, gain in sample.items()} for sample in samples]
        return self.reserved.fill(gains, each, self.matrices)

    def kept(self, storage: Storage, name: str) -> tuple[Tensor, Tensor]:
        """A (r, d) and B (d, r) of one adapter, from wherever they are kept between forwards.

        Raises:
            AdapterStateError: If their owner does not give them.
        """
        A, B = (storage.peek(self, f"lora_{matrix}_{name}") for matrix in "AB")
        if A is None or B is None:
            raise AdapterStateError(f"The matrices of {name!r} are offloaded and cannot be read. Take the hooks off.")
        return A, B

    def fused_weight(self, W: Tensor, gains: Mapping[str, float], storage: Storage | None = None) -> Tensor:
        """W' = W (I + sum_i g_i B_i A_i) for W of shape (out, d)."""
        return pair.fuse(W, *self.stack(gains, storage))

    def as_lora(self, W: Tensor, gains: Mapping[str, float], storage: Storage | None = None) -> tuple[Tensor, Tensor]:
        """The equivalent LoRA on W (out, d): lora_A (R, d) and lora_B (out, R), the gains in lora_B."""
        return pair.as_lora(W, *self.stack(gains, storage))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SerialLoraPair:
        self._merged = None  # made again where the parameters went
        if getattr(fn, "__qualname__", "").startswith("Module.to_empty"):  # the base has no numbers yet; these have
            return super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t.new_empty(0)).device), recurse)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_merged": None}

    def extra_repr(self) -> str:
        ranks = {name: self.matrices(name)[0].shape[0] for name in self.scaling}
        return f"features={self.features}, ranks={ranks}, active={list(self.gains)}"
