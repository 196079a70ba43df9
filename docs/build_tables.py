"""Write the tables of the documentation, from the records themselves: supported architectures, parameter counts.

python -m docs.build_tables            rewrite the marked regions
python -m docs.build_tables --check    say what is out of date, and fail
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

from benchmarks import front, report, segmentation_heads, starts, training_memory
from benchmarks.published import PUBLISHED, published
from slora_diffusers import SerialLoraConfig, add_serial_lora, unload_serial_lora
from slora_diffusers.adapters.lifecycle import AddReport
from slora_diffusers.loader import VERBS, SerialLoraLoaderMixin
from slora_diffusers.records import audio, image, text, video, vision
from slora_diffusers.records.registry import REFUSED, Architecture, Pair
from tests import loras

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "Image": image.RECORDS,
    "Video": video.RECORDS,
    "Audio and molecules": audio.RECORDS,
    "Vision": vision.RECORDS,
    "Language and speech": text.RECORDS,
}


@cache
def count(name: str, rank: int, inputs: tuple[str, ...] | None = None) -> AddReport:
    """The pairs and parameters that an adapter of this rank has in a published model."""
    model = published(name)
    report = add_serial_lora(model, SerialLoraConfig(rank=rank, inputs=inputs))
    unload_serial_lora(model)
    return report


def counts() -> str:
    """Pairs and parameters at rank 16, beside those of a LoRA on q, k, v and the output projections."""
    rows = ["| | Sites | Pairs | Serial LoRA | LoRA on q, k, v, o | Ratio |", "|---|--:|--:|--:|--:|--:|"]
    for name in PUBLISHED:
        c = count(name, 16)
        rows.append(
            f"| {name} | {c.sites} | {c.pairs} | {c.parameters:,} | {c.lora_parameters:,} "
            f"| {c.parameters / c.lora_parameters:.4f} |"
        )
    return "\n".join(rows)


def front_table() -> str:
    """The README's table."""
    alone, with_outputs = count(front.MODEL, 16), count(front.MODEL, 16, front.WITH_OUTPUTS)
    parameters = {"serial": alone.parameters, "outputs": with_outputs.parameters, "lora": alone.lora_parameters}
    return front.front_table(parameters)


def full_tables() -> str:
    """One table per kind: family, classes, and every pair of every site."""
    parts = []
    for kind, records in KINDS.items():
        rows = "\n".join(_row(record) for record in records)
        parts.append(f"### {kind}\n\n| Family | Classes | Pairs | Note |\n|---|---|---|---|\n{rows}")
    return "\n\n".join(parts)


def verbs() -> str:
    """The signature of every verb of a pipeline."""
    rows = ["| Method | The function's own text |", "| --- | --- |"]
    for name in VERBS:
        parameters = list(inspect.signature(vars(SerialLoraLoaderMixin)[name]).parameters.values())[1:]
        shown = ", ".join(str(p.replace(annotation=p.empty, default=_plain(p.default))) for p in parameters)
        rows.append(f"| `pipe.{name}({shown})` | [{name}](#slora_diffusers.{name}) |")
    return "\n".join(rows)


def _plain(default: object) -> object:
    """A default that is written as code is."""
    return inspect.Parameter.empty if callable(default) else default


def refusals() -> str:
    """The classes that are refused, with the reason."""
    if not REFUSED:
        return "None: every transformer class of diffusers that was looked at has a record."
    return "\n".join(f"- `{name}`: {reason}" for name, reason in sorted(REFUSED.items()))


def families() -> str:
    """One row per kind: how many classes, and their families."""
    rows = (
        f"| {kind} | {sum(len(record.models) for record in records)} | {', '.join(r.family for r in records)} |"
        for kind, records in KINDS.items()
    )
    return "\n".join(["| | Classes | Families |", "|---|---|---|", *rows])


def layouts() -> str:
    """One row per family with original names: which layouts of a LoRA are read, and which are written."""
    columns = {column: [name for name in loras.LAYOUTS if name.startswith(column)] for column in _LAYOUT_COLUMNS}
    family_of = {model: record.family for records in KINDS.values() for record in records for model in record.models}
    rows = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for model in loras.FAMILIES:
        read, written = loras.layouts_of(model), loras.written_of(model)
        cells = [_layout_cell(names, read, written) for names in columns.values()]
        rows.append(f"| {family_of[model]}: `{model}` | {' | '.join(cells)} |")
    return "\n".join(rows)


_LAYOUT_COLUMNS = ("diffusers", "PEFT", "kohya", "ComfyUI", "OneTrainer", "LyCORIS", "ai-toolkit", "XLabs")


def _layout_cell(names: list[str], read: Collection[str], written: Collection[str]) -> str:
    if not any(name in read for name in names):
        return "-"
    return "read, written" if any(name in written for name in names) else "read"


REGIONS = {
    ROOT / "docs" / "api.md": {"verbs": verbs},
    ROOT / "docs" / "convert.md": {"layouts": layouts},
    ROOT / "docs" / "architectures.md": {"families": families, "architectures": full_tables, "refusals": refusals},
    ROOT / "docs" / "counts.md": {"counts": counts},
    ROOT / "docs" / "benchmarks.md": {
        "bench-step": report.step_table,
        "bench-targets": report.targets_table,
        "bench-profile": report.profile_table,
        "bench-lifecycle": report.lifecycle_table,
        "bench-imports": report.imports_table,
        "demo-quality": report.quality_table,
    },
    ROOT / "docs" / "serving.md": {"serving": report.serving_table},
    ROOT / "docs" / "training.md": {
        "dreambooth": report.dreambooth_table,
        "training-memory": training_memory.states_table,
        "training-peaks": training_memory.peaks_table,
    },
    ROOT / "docs" / "vision-results.md": {
        "vit-scores": report.vit_scores_table,
        "vit-differences": report.vit_differences_table,
        "vit-variations": report.vit_variations_table,
        "vit-costs": report.vit_costs_table,
        "segmentation-heads": segmentation_heads.heads_table,
    },
    ROOT / "docs" / "choosing.md": {"vit-starts": starts.starts_table},
    ROOT / "README.md": {"front": front_table},
}


def rebuilt(path: Path) -> str:
    """A page's text with its marked regions as they should be.

    Raises:
        ValueError: If the page lacks a marker.
    """
    text = path.read_text(encoding="utf-8")
    for name, build in REGIONS[path].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"{path.relative_to(ROOT)} needs the markers {begin} and {end}, in this order.")
        text = f"{before}{begin}\n{build()}\n{end}{after}"
    return text


def _row(record: Architecture) -> str:
    classes = "<br>".join(f"`{name}`" for name in record.models)
    sites: dict[tuple[Pair, ...], list[str]] = {}
    for pattern, pairs in record.sites.items():
        sites.setdefault(pairs, []).append(f"`{pattern}`" if pattern else "itself")
    cells = (f"{', '.join(patterns)}: {'; '.join(map(_pair, pairs))}" for pairs, patterns in sites.items())
    return f"| {record.family} | {classes} | {'<br>'.join(cells)} | {record.note} |"


def _pair(pair: Pair) -> str:
    inputs = " + ".join(pair.inputs)
    name = f"{pair.name} ({inputs})" if inputs and inputs != pair.name else pair.name
    text = f"{name} → {', '.join(pair.projections)}" + (f" (where there is no {pair.without})" if pair.without else "")
    return f"*{text}*" if pair.optional else text


def main() -> int:
    """Rewrite the pages, or with --check only compare them."""
    stale = [path for path in REGIONS if path.exists() and rebuilt(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(rebuilt(path), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'out of date' if '--check' in sys.argv else 'rewritten'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
