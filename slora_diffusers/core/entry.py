"""Where Python runs before a graph of the whole model does.

`torch.compile` takes the hooks of a model into its graph. With reserved capacity they have work to do that no graph
can: wait for a verb, ask the pipeline for its layout, write the operands. So they run once more around the graph.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .compiled import wrappers
from .hooks import ModelCall
from .sites import unwrap


def watch(model: nn.Module) -> None:
    """Have the hooks of a model run around what `torch.compile` made of it, too, if it is compiled as a whole.

    Args:
        model: The model, or the wrapper that `torch.compile` gave for it; for a bare model the wrapper is looked for.
    """
    root = unwrap(model)
    compiled = vars(root).get("_compiled_call_impl")
    if compiled is not None and not isinstance(compiled, _Entered):
        vars(root)["_compiled_call_impl"] = _Entered(root, compiled)
    for wrapper in _wrappers(root) if model is root else [model]:
        if not any(isinstance(getattr(hook, "__self__", None), _Entry) for hook in wrapper._forward_hooks.values()):
            entry = _Entry(root)
            wrapper.register_forward_pre_hook(entry.before, with_kwargs=True)
            wrapper.register_forward_hook(entry.after, always_call=True)


def _wrappers(root: nn.Module) -> list[nn.Module]:
    return [wrapper for wrapper in wrappers() if unwrap(wrapper) is root]


class _Entry:
    """The hooks of a model, as hooks of its wrapper; as long as the model has any."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def _hooks(self) -> ModelCall | None:
        registry = vars(self.root).get("_serial_lora")
        return None if registry is None or registry.capacity is None else ModelCall(registry)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks = self._hooks()
        return (args, kwargs) if hooks is None else hooks.before(self.root, args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if (hooks := self._hooks()) is not None:
            hooks.after(self.root, args, output)


class _Entered:
    """What `module.compile()` left on a model, with its hooks around it."""

    def __init__(self, root: nn.Module, compiled: Any) -> None:
        self.entry, self.compiled = _Entry(root), compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.entry.before(self.entry.root, args, kwargs)
        try:
            return self.compiled(*args, **kwargs)
        finally:
            self.entry.after(self.entry.root, args, None)
