"""Checkpoints: one file with everything that a run has to remember, written all or nothing, and limited in number.

Noise, order and dropout come from counters (see randomness.py), so there is no random state to keep: the trained
weights, the optimizer, the schedule and the step are the whole state, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.processes import whole
from ..errors import SerialLoraError

STATE_NAME = "training_state.pt"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE_NAME).is_file()), key=step_of)


def write_checkpoint(
    output_dir: Path, step: int, state: Mapping[str, Any], limit: int | None, extra: Callable[[Path], Any],
    is_main: bool = True,
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>` under another name, rename it, then delete the oldest ones beyond `limit`.

    Args:
        output_dir: Folder of the run.
        step: Optimizer steps done.
        state: What `read_checkpoint` gives back: tensors, numbers, strings, lists and dicts.
        limit: How many checkpoints to keep, at least 1; None keeps all.
        extra: Writes further files, such as the adapter, into the folder it is given; every process calls it.
        is_main: Whether this process writes.
    """
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".{target.name}.{os.getpid()}.tmp"
    if not is_main:
        extra(temporary)
        return target
    for stale in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    with open(temporary / STATE_NAME, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    extra(temporary)
    old = temporary.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    if target.exists():  # of another run: whole until the new one takes its place
        os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if limit is not None:
        for oldest in checkpoints(output_dir)[: -max(limit, 1)]:
            shutil.rmtree(oldest)
    return target


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after `step` to `abandoned-checkpoint-<step>`: a run goes on from before them.

    Else they would be taken for newer than what it writes next. Gives their new paths.
    """
    moved = []
    for path in checkpoints(output_dir):
        if step_of(path) > step:
            target = path.with_name(f"abandoned-{path.name}")
            if target.exists():
                shutil.rmtree(target)
            moved.append(path.rename(target))
    return moved


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names: the last one for "latest" (None if there is none yet).

    Raises:
        SerialLoraError: If a folder is named that is not a complete checkpoint, or two checkpoints are.
    """
    if name == "latest":
        return (checkpoints(output_dir) or [None])[-1]
    found = {path.resolve(): path for path in (Path(name), output_dir / name) if (path / STATE_NAME).is_file()}
    if len(found) > 1:
        both = " and ".join(str(path) for path in found)
        raise SerialLoraError(f"--resume_from_checkpoint {name} may be {both}: give the whole path of one.")
    if found:
        return next(iter(found.values()))
    have = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
    raise SerialLoraError(f"--resume_from_checkpoint {name} is not a checkpoint; {output_dir} has: {have}.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; nothing in the file is executed.

    Raises:
        SerialLoraError: If it cannot be read, or is not what `write_checkpoint` wrote.
    """
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(state, dict):
        raise _damaged(path, f"it holds a {type(state).__name__}")
    for name, kinds in _FIELDS.items():
        if not isinstance(state.get(name), kinds) or isinstance(state.get(name), bool):
            raise _damaged(path, f"its {name!r} is {type(state.get(name)).__name__}")
    for name, tensor in state["trained"].items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str) or not bool(torch.isfinite(tensor).all()):
            raise _damaged(path, f"its trained weight {name!r} is not a tensor of finite numbers")
    for name, option in state["options"].items():
        entries = [option]
        if isinstance(option, list | dict):
            entries = list(option) if isinstance(option, list) else [*option, *option.values()]
        if not isinstance(name, str) or not all(isinstance(entry, str | int | float | None) for entry in entries):
            raise _damaged(path, f"its option {name!r} is {type(option).__name__}")
    if state["step"] < 0 or state["processes"] < 1:
        raise _damaged(path, f"it counts {state['step']} steps on {state['processes']} processes")
    return state


_FIELDS: dict[str, Any] = {
    **{"step": int, "processes": int, "trained": dict, "optimizer": dict, "schedule": dict, "options": dict},
    **{"ema": dict | None, "scaler": dict | None, "identities": dict | None},
}


def _damaged(path: Path, why: str) -> SerialLoraError:
    return SerialLoraError(f"{path} is damaged ({why}). Resume from an earlier checkpoint.")


def check_like(saved: Any, ours: Any, where: str) -> None:
    """See that a saved state has the form of the one that this run would save: keys, shapes, kinds of values.

    Raises:
        SerialLoraError: If not.
    """
    if isinstance(ours, Mapping):
        fits = isinstance(saved, Mapping) and saved.keys() == ours.keys()
        pairs = [(f"{where}, {key}", saved[key], ours[key]) for key in ours] if fits else []
    elif isinstance(ours, list | tuple):
        fits = isinstance(saved, list | tuple) and len(saved) == len(ours)
        pairs = [(f"{where}, {i}", one, other) for i, (one, other) in enumerate(zip(saved, ours))] if fits else []  # noqa: B905
    else:
        fits, pairs = _is_alike(saved, ours), []
    if not fits:
        raise SerialLoraError(
            f"the checkpoint is damaged, or of another run: {where} is {str(saved)[:60]!r}, where this run has "
            f"{str(ours)[:60]!r}. Resume from an earlier checkpoint, with the options that wrote it."
        )
    for name, one, other in pairs:
        check_like(one, other, name)


def _is_alike(saved: Any, ours: Any) -> bool:
    """Whether a leaf can stand for another: tensors of one shape, numbers for numbers."""
    if isinstance(ours, Tensor):
        return isinstance(saved, Tensor) and saved.shape == ours.shape and bool(torch.isfinite(saved).all())
    if isinstance(ours, bool):
        return isinstance(saved, bool)
    if ours is None or isinstance(ours, str):
        return isinstance(saved, type(ours) | int | float | None) or saved is None
    if isinstance(saved, Tensor):
        return saved.numel() == 1 and bool(torch.isfinite(saved).all())
    return isinstance(saved, int | float) and math.isfinite(saved)


def gathered(tree: Any) -> Any:
    """A nested state with every sharded tensor made whole, on the CPU; every process must call."""
    if isinstance(tree, Tensor):
        return whole(tree.detach()).cpu().clone()
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    return tree


def load_parameters(named: Sequence[tuple[str, Tensor]], saved: Mapping[str, Tensor]) -> None:
    """Copy saved weights into parameters of the same names, sharding them where the parameters are.

    Raises:
        SerialLoraError: If names or shapes differ; nothing is copied then.
    """
    ours = {name: tuple(parameter.shape) for name, parameter in named}
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if ours != theirs:
        wrong = sorted(set(ours.items()) ^ set(theirs.items()))[:4]
        raise SerialLoraError(
            f"the checkpoint does not fit this run: {wrong} differ. Resume with the options (adapter, rank, inputs, "
            "model) that wrote it."
        )
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(_shard_like(saved[name], parameter))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load an optimizer's state, sharding each tensor as the parameter that it belongs to.

    Raises:
        SerialLoraError: If it is damaged, or of another optimizer; nothing is loaded then.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    check_like(saved.get("param_groups"), optimizer.state_dict()["param_groups"], "the optimizer's groups")
    entries = saved.get("state")
    if not isinstance(entries, Mapping) or (entries and set(entries) != set(range(len(parameters)))):
        raise SerialLoraError(
            f"the checkpoint is damaged: its optimizer's state is not that of {len(parameters)} parameters. Resume "
            "from an earlier checkpoint."
        )
    for index, entry in entries.items():
        check_like(entry, _form_of(entries[0], parameters[0], parameters[index]), f"the optimizer's state {index}")
    state = {
        index: {
            name: _shard_like(value, parameters[index]) if _is_like(value, parameters[index]) else value
            for name, value in entries.items()
        }
        for index, entries in saved["state"].items()
    }
    groups = [
        {**theirs, **{name: ours[name] for name in _OF_THE_MACHINE if name in ours}}
        for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups, "state": state})


_OF_THE_MACHINE = ("capturable", "differentiable", "foreach", "fused")
"""Fields of an optimizer's groups that say how a step is computed here, not what: another machine has others."""


def _form_of(first: Any, its: Tensor, parameter: Tensor) -> Any:
    """The state of the first parameter as it has to be for another: what has the shape of the one has that of it."""
    if not isinstance(first, Mapping):
        return {}
    return {name: parameter.detach() if _is_like(value, its) else value for name, value in first.items()}


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device_mesh.device_type)  # type: ignore[union-attr]
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])
