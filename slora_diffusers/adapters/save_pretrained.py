"""`save_pretrained` of a model with adapters: a folder that stock diffusers and transformers load without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.names import is_of_pair
from ..core.state import Registry, adapter_checksum, pairs_of


class SavePretrained:
    """Stands before an adapted model's `save_pretrained` and leaves the pairs out of what it writes.

    The pairs stay in `state_dict()`, where checkpoints, DDP and FSDP look for them. `save_pretrained` writes the base,
    or the fused weights where adapters are fused; the adapters themselves are written by `save_serial_lora`.

    Args:
        model: A model whose class has `save_pretrained`: the adapted one, or one inside it.
        registry: What is remembered of the adapters.
    """

    def __init__(self, model: nn.Module, registry: Registry) -> None:
        self.model = model
        self.registry = registry
        self.beside: Callable[[Any], Any] | None = None  # writes the adapters into the same folder

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method of the class; `inspect.signature`, which pipelines ask before they call, follows it."""
        return type(self.model).save_pretrained.__get__(self.model)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("state_dict")
        if given is not None:
            kwargs["state_dict"] = {key: tensor for key, tensor in given.items() if not is_of_pair(key)}
        hook = self.model._register_state_dict_hook(_drop_pairs)
        try:
            written = self.__wrapped__(*args, **kwargs)
        finally:
            hook.remove()
        if self.beside is not None and kwargs.get("is_main_process", True):
            self.beside(args[0] if args else kwargs["save_directory"])
        elif unsaved := self._unsaved():
            warnings.warn(
                f"{type(self.model).__name__}.save_pretrained wrote the base without its adapters, and {unsaved} "
                "trained since it was last saved: write it with save_serial_lora(model, folder).",
                stacklevel=2,
            )
        return written

    def _unsaved(self) -> str:
        """The trainable adapters here whose matrices no file has."""
        if self.registry.fused is not None:
            return ""
        pairs = list(pairs_of(self.model).values())
        names = [
            name
            for name in self.registry.configs
            if any(name in pair.scaling and pair.matrices(name)[0].requires_grad for pair in pairs)
            and self.registry.saved.get(name) != adapter_checksum(self.model, name)
        ]
        return " and ".join(map(repr, names))


def _drop_pairs(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if is_of_pair(key)]:
        del state[key]
