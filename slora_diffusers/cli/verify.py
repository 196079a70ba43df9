"""Check an adapter on a base: live == fused == exported, and the base as it was."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..adapters.fuse import fuse_serial_lora, unfuse_serial_lora
from ..adapters.lifecycle import unload_serial_lora
from ..convert import export_lora
from ..convert.export import equivalent_lora
from ..convert.layouts.write import Target, unread_by_diffusers
from ..core.components import adapted
from ..core.sites import find_slots, unwrap
from ..core.state import pairs_of, registry_of
from ..errors import SerialLoraError
from .console import OUT

PROMPT = "a photo of a cat"


@dataclass(frozen=True)
class VerifyReport:
    """Largest differences, relative to the largest value of the live output (at least 1).

    Args:
        pairs: {"fused" and "exported": difference} of the projections' outputs on random inputs, over all pairs.
        outputs: The same of the whole model's or pipeline's output; empty if it cannot be run here.
        effect: How far the live output is from the base's.
        base_restored: Whether the base gives its first output to the bit again after unloading; None if not run.
        tolerance: What counts as equal.
        skipped: What was not checked, and why.
    """

    pairs: dict[str, float]
    outputs: dict[str, float]
    effect: float | None
    base_restored: bool | None
    tolerance: float
    skipped: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything that was checked holds."""
        differences = (*self.pairs.values(), *self.outputs.values())
        return all(d <= self.tolerance for d in differences) and self.base_restored is not False


@torch.no_grad()
def verify(model: Any, load: Callable[[], None], tolerance: float, size: int | None = None) -> VerifyReport:
    """Run a base with an adapter live, fused, and as the LoRA that stock diffusers or PEFT loads.

    Args:
        model: The base, a model or a pipeline, without adapters.
        load: Loads the adapter into it.
        tolerance: What counts as equal, relative to the largest value of the live output (at least 1).
        size: Height and width of the images that a pipeline makes; `None` is its own.
    """
    run = _runner(model, size)
    base = run() if run is not None else None
    load()
    pairs = _compare_pairs(model)
    if run is None or base is None:
        why = "the whole forward: a bare diffusers model has no inputs of its own; verify with its pipeline"
        return VerifyReport(pairs, {}, None, None, tolerance, (why,))
    live = run()
    models = adapted(model)
    fuse_serial_lora(model)
    outputs = {"fused": _difference(run(), live)}
    unfuse_serial_lora(model)
    outputs["unfused"] = _difference(run(), live)
    with tempfile.TemporaryDirectory() as folder:
        loaded = _stock_lora(model, models, Path(folder))
        unload_serial_lora(model)
        restored = torch.equal(run(), base)
        skipped = loaded() if loaded is not None else "the exported LoRA: PEFT is not installed (pip install peft)"
        if skipped is None:
            outputs["exported"] = _difference(run(), live)
    return VerifyReport(pairs, outputs, _difference(live, base), restored, tolerance, (skipped,) if skipped else ())


def _compare_pairs(model: Any) -> dict[str, float]:
    """W (x + sBA x) against W' x and W x + B_m A x, for random x, over all pairs."""
    worst = {"fused": 0.0, "exported": 0.0}
    generator = torch.Generator().manual_seed(0)
    for m in adapted(model).values():
        pairs, lora = pairs_of(m), equivalent_lora(m, registry_of(m).active, "peft")
        for slot in find_slots(m):
            pair = pairs.get(slot.key)
            for projection in slot.projections if pair is not None and pair.gains else ():
                assert pair is not None
                W = projection.weight.data.float()
                x = torch.randn(8, slot.features, generator=generator).to(W.device)
                part = lora.get(slot.called(projection)) or lora[slot.path]
                live = F.linear(pair(x), W)
                fused = F.linear(x, pair.fused_weight(W, pair.gains))
                exported = F.linear(x, W) + F.linear(F.linear(x, part.A.float()), part.B.float())
                worst["fused"] = max(worst["fused"], _difference(fused, live))
                worst["exported"] = max(worst["exported"], _difference(exported, live))
    return worst


def _stock_lora(model: Any, models: dict[str, nn.Module], folder: Path) -> Callable[[], str | None] | None:
    """Write the exported LoRA; returns what loads it with stock code, or None without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    pipeline = None if isinstance(model, nn.Module) else model
    if pipeline is not None and not unread_by_diffusers(Target(models, pipeline, {})):
        export_lora(model, folder, format="diffusers")
        return lambda: pipeline.load_lora_weights(folder)
    export_lora(model, folder, format="peft")

    def load() -> None:
        for component, m in models.items():  # PEFT puts its layers into the model itself
            peft.PeftModel.from_pretrained(m, folder / component if pipeline is not None else folder).eval()

    return load


def _difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1)).item()


def _runner(model: Any, size: int | None) -> Callable[[], Tensor] | None:
    """What runs a model or a pipeline on inputs that are the same every time; None if nothing is known."""
    if not isinstance(model, nn.Module):
        return lambda: _run_pipeline(model, size)
    inputs = _model_inputs(unwrap(model))
    return None if inputs is None else lambda: _flat(model(**inputs))


def _run_pipeline(pipe: Any, size: int | None) -> Tensor:
    known = inspect.signature(pipe.__call__).parameters
    wanted: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
        "class_labels": [0],
        "prompt": PROMPT,
        **({"height": size, "width": size, "use_resolution_binning": False} if size else {}),
    }
    output = pipe(**{name: value for name, value in wanted.items() if name in known})
    made = getattr(output, "images", None)
    made = output.frames if made is None else made
    return torch.from_numpy(np.asarray(made, dtype=np.float32))


def _model_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    name, config = getattr(model, "main_input_name", None), cast("Any", getattr(model, "config", None))
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(model, "dtype", torch.float32)
    if name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        shape = (1, getattr(config, "num_channels", 3), *size)
        return {name: torch.randn(shape, generator=generator).to(dtype)}
    if name == "input_ids" and getattr(config, "vocab_size", None):
        return {name: torch.randint(config.vocab_size, (1, 8), generator=generator)}
    return None


def _flat(output: Any) -> Tensor:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    tensors = [v for v in values if isinstance(v, Tensor)] if isinstance(values, tuple) else [values]
    if not tensors:
        raise SerialLoraError("The model's output holds no tensor, so there is nothing to compare.")
    return torch.cat([t.float().flatten() for t in tensors])


def show_verified(report: VerifyReport) -> None:
    """Print a table of what was compared."""
    table = Table("compared with live", "largest difference", "", title=f"tolerance {report.tolerance:g}")
    rows = [(f"each pair, {what}", d) for what, d in report.pairs.items()]
    rows += [(f"whole output, {what}", d) for what, d in report.outputs.items()]
    for what, difference in rows:
        table.add_row(what, f"{difference:.2e}", "equal" if difference <= report.tolerance else "[red]DIFFERS[/]")
    if report.base_restored is not None:
        table.add_row("base after unloading", "", "equal to the bit" if report.base_restored else "[red]DIFFERS[/]")
    OUT.print(table)
    if report.effect is not None:
        OUT.print(f"The adapter changes the output by {report.effect:.2e}.")
    for what in report.skipped:
        OUT.print(f"Not checked: {what}.")
    OUT.print("passed" if report.passed else "[red]failed[/]")
