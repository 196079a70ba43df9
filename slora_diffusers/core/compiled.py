"""torch.compile does not guard on hooks: where a compiled model's hooks change, its graphs must be dropped.

PyTorch drops the graphs of a whole process or none, so it is asked to only where something that is compiled runs the
model in question: a change of an eager model leaves the graphs of all others alone.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


def forget_compiled(model: nn.Module) -> None:
    """Drop compiled graphs if one of them may run this model: it would go on with the forward of before."""
    if runs_compiled(model):
        torch.compiler.reset()


def runs_compiled(model: nn.Module) -> bool:
    """Whether a graph that was compiled in this process may run this model."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    if convert_frame is None or not getattr(getattr(convert_frame, "output_codes", None), "seen", True):
        return False  # no graph was compiled in this process, or all have been dropped
    modules = list(model.modules())
    if any(_original(module) is not None for module in modules):
        return True
    own = {id(module) for module in modules}
    state = (convert_frame.FRAME_COUNTER, len(convert_frame.output_codes.seen))
    return any(_runs(compiled, own) for compiled in _compiled().originals(state))


def is_frozen(model: nn.Module) -> bool:
    """Whether inductor's freezing writes this model's weights, and reserved operands, into a graph that runs it."""
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is None:
        return False
    modules = list(model.modules())
    own = {id(module) for module in modules}
    compiled = [vars(module).get("_compiled_call_impl") for module in modules]
    compiled += [wrapper for wrapper in wrappers() if _runs(wrapper, own)]
    return any(_freezes(each, inductor.freezing) for each in compiled if each is not None)


def wrappers() -> list[nn.Module]:
    """What `torch.compile` has made of modules in this process."""
    return list(_compiled().wrappers)


class _Compiled:
    """What was compiled in this process. Wrappers of modules are noted as they are made; for all else the heap is
    searched, once for each state of the compiler: what has no graph yet does not matter."""

    def __init__(self) -> None:
        self.wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._others: list[weakref.ref[Any]] = []
        self._state: tuple[int, int] | None = None
        register_module_module_registration_hook(self._note)
        frames = sys.modules.get("torch._dynamo.eval_frame")
        for thing in gc.get_objects() if frames is not None else ():
            if type(thing) is frames.OptimizedModule:  # pyright: ignore[reportOptionalMemberAccess]
                self.wrappers.add(thing)

    def _note(self, wrapper: nn.Module, name: str, model: nn.Module | None) -> None:
        if name == "_orig_mod":
            self.wrappers.add(wrapper)

    def originals(self, state: tuple[int, int]) -> Iterator[Any]:
        """What torch.compile was called on, and the modules that it was told to compile in place."""
        if state != self._state:
            self._others = [weakref.ref(thing) for thing in gc.get_objects() if _original(thing) is not None]
            self._state = state
        yield from (wrapper._orig_mod for wrapper in list(self.wrappers))
        yield from (_original(thing) for ref in self._others if (thing := ref()) is not None)


_compiled = functools.cache(_Compiled)


def _original(thing: Any) -> Any | None:
    """What a compiled function was made of, or the module itself that was compiled in place; None of other things."""
    kind = type(thing)
    if kind is FunctionType:
        return vars(thing).get("_torchdynamo_orig_callable")
    return thing if issubclass(kind, nn.Module) and getattr(thing, "_compiled_call_impl", None) is not None else None


def _freezes(compiled: Any, by_default: bool) -> bool:
    """Whether something was compiled by inductor with freezing: by its own options, or where that is the default."""
    compiled = getattr(compiled, "compiled", compiled)  # with a model's hooks around it
    settings = getattr(compiled, "get_compiler_config", lambda: None)()  # None of another backend
    return settings is not None and bool(settings.get("freezing") or by_default)


def _runs(compiled: Any, own: set[int]) -> bool:
    """Whether something compiled may run one of these modules, given by their ids."""
    if isinstance(compiled, MethodType):
        return _runs(compiled.__self__, own) if isinstance(compiled.__self__, nn.Module) else True
    if isinstance(compiled, nn.Module):
        return any(id(module) in own for module in compiled.modules())
    if not isinstance(compiled, FunctionType):
        return True  # not known: better one compilation too many than a result of before
    cells = [cell.cell_contents for cell in compiled.__closure__ or () if _is_filled(cell)]
    names = [compiled.__globals__.get(name) for name in compiled.__code__.co_names]
    held = [value for value in (*cells, *names, *(compiled.__defaults__ or ())) if isinstance(value, nn.Module)]
    return any(_runs(module, own) for module in held) or _takes_modules(compiled)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _takes_modules(function: FunctionType) -> bool:
    """Whether the graphs of a function were guarded on modules that it was given."""
    try:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

        entries = _debug_get_cache_entry_list(function.__code__)
        guards = (str(entry.guard_manager) for entry in entries)
        return any("_modules" in guard or "nn.modules" in guard for guard in guards)
    except (ImportError, AttributeError, TypeError):
        return True
