"""Checkpoints: one file with everything that a run has to remember, written all or nothing, and limited in number.

Noise, order and dropout come from counters (see randomness.py), so there is no random state to keep: the trained
weights, the optimizer, the schedule and the step are the whole state, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SerialLoraError
from .methods import whole

STATE_NAME = "training_state.pt"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE_NAME).is_file()), key=_step)


def write_checkpoint(
    output_dir: Path, step: int, state: Mapping[str, Any], limit: int | None, extra: Callable[[Path], Any]
) -> Path:
    """Write `checkpoint-<step>` under another name, rename it, then delete the oldest ones beyond `limit`.

    Args:
        output_dir: Folder of the run.
        step: Optimizer steps done.
        state: What `read_checkpoint` gives back: tensors, numbers, strings, lists and dicts.
        limit: How many checkpoints to keep, at least 1; None keeps all.
        extra: Writes further files, such as the adapter, into the folder it is given.
    """
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".{target.name}.{os.getpid()}.tmp"
    for stale in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    with open(temporary / STATE_NAME, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    extra(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    if limit is not None:
        for old in checkpoints(output_dir)[: -max(limit, 1)]:
            shutil.rmtree(old)
    return target


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after `step` to `abandoned-checkpoint-<step>`: a run goes on from before them.

    Else they would be taken for newer than what it writes next. Gives their new paths.
    """
    moved = []
    for path in checkpoints(output_dir):
        if _step(path) > step:
            target = path.with_name(f"abandoned-{path.name}")
            if target.exists():
                shutil.rmtree(target)
            moved.append(path.rename(target))
    return moved


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names: the last one for "latest" (None if there is none yet).

    Raises:
        SerialLoraError: If a folder is named that is no complete checkpoint.
    """
    if name == "latest":
        return (checkpoints(output_dir) or [None])[-1]
    for path in (Path(name), output_dir / name):
        if (path / STATE_NAME).is_file():
            return path
    have = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
    raise SerialLoraError(f"--resume_from_checkpoint {name} is no checkpoint; {output_dir} has: {have}.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; nothing in the file is executed."""
    try:
        return torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SerialLoraError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error


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
    """Load an optimizer's state, sharding each tensor as the parameter that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: _shard_like(value, parameters[index]) if _is_like(value, parameters[index]) else value
            for name, value in entries.items()
        }
        for index, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device_mesh.device_type)  # type: ignore[union-attr]
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _step(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])
