"""The tables of the documentation, from `benchmarks/results/*.json`; `python -m docs.build_tables` puts them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, read_results

Show = Callable[[float], str]
NAMES = {"base": "Base", "serial": "Serial LoRA", "serial_fused": "fused", "peft": "PEFT's LoRA"}


def step_table(folder: Path = RESULTS) -> str:
    """Forward and train step over the base's, and the bytes and operations beside them."""
    results = read_results("step", folder)
    rows = [
        (
            model,
            f"{'train step' if what == 'train' else what}, {precision}",
            _milliseconds(measured[what]["base"]),
            *(_ratio(measured[what].get(name), "over_base") for name in ("serial", "serial_fused", "peft")),
            f"{measured[what]['serial']['over_peft']['median']:.3f}",
        )
        for model, case in results["cases"].items()
        for precision, measured in case["precisions"].items()
        for what in ("forward", "train")
        if what in measured
    ]
    heading = ("", "", "Base", "Serial LoRA / base", "fused / base", "PEFT's LoRA / base", "Serial / PEFT")
    parts = (_step_caption(results), _table(heading, rows, left=2), _cost_table(results))
    return "\n\n".join(parts)


def profile_table(folder: Path = RESULTS) -> str:
    """Milliseconds of a train step by operation."""
    tables = []
    for model, case in read_results("step", folder)["cases"].items():
        for precision, measured in case["precisions"].items():
            if profile := measured.get("train_profile"):
                rows = [
                    (f"`{operation}`" if operation != "other" else "all other", *(f"{t * 1e3:.0f}" for t in times))
                    for operation in profile["base"]
                    for times in [[profile[name][operation] for name in profile]]
                ]
                heading = (f"{model}, {precision}: ms", *(NAMES[name] for name in profile))
                tables.append(_table(heading, rows))
    return "\n\n".join(tables)


def targets_table(folder: Path = RESULTS) -> str:
    """What was aimed at, and what was measured."""
    cases = read_results("step", folder)["cases"]
    rows = [(aim, *(say(case["precisions"]) for case in cases.values())) for aim, say in _TARGETS.items()]
    return _table(("Target", *cases), rows)


def lifecycle_table(folder: Path = RESULTS) -> str:
    """Seconds of every verb beside diffusers' own LoRA."""
    results = read_results("lifecycle", folder)
    rows = [
        (verb, *(_milliseconds(taken[name]) for name in ("serial", "lora")), _ratio(taken["serial"], "over_lora"))
        for verb, taken in results["verbs"].items()
    ]
    sizes = results["file_bytes"]
    rows.append(
        ("file, bf16", *(_megabytes(sizes[n]) for n in ("serial", "lora")), f"{sizes['serial'] / sizes['lora']:.2f}")
    )
    settings = results["settings"]
    caption = (
        f"{settings['parameters'] / 1e9:.2f} billion weights in bf16, {settings['layers']} blocks, adapters of rank "
        f"{settings['rank']}; {_conditions(results)}"
    )
    return f"{caption}\n\n{_table(('', 'Serial LoRA', 'diffusers LoRA', 'Ratio'), rows)}"


def imports_table(folder: Path = RESULTS) -> str:
    """Processor seconds of imports, and over diffusers' own."""
    results = read_results("imports", folder)
    over = f"over_{next(iter(results['imports']))}"
    rows = [
        (name, f"{taken['seconds']['median']:.2f} s", _spread(taken[over]))
        for name, taken in results["imports"].items()
    ]
    return _table(("", "Processor time", "Ratio to `import diffusers`"), rows)


def quality_table(folder: Path = RESULTS) -> str:
    """What the methods make of the demo's held-out letters, style by style: means over the training seeds."""
    results = read_results("demo_quality", folder)
    rows = []
    for style, base in results["bases"].items():
        rows.append((style, "base", "0", "", *_quality([base])))
        runs: dict[str, list[dict[str, Any]]] = {}
        for run in results["runs"]:
            if run["style"] == style:
                runs.setdefault(run["method"], []).append(run)
        for method, same in runs.items():
            size = f"{same[0]['file_bytes'] / 1024:,.0f} KiB"
            trained = f"{same[0]['trainable_parameters']:,}"
            rows.append(("", method, trained, size, *_quality([run["quality"] for run in same])))
    heading = ("Style", "", "Trained", "File", "Denoising loss", "IoU", "IoU, seen letters", "Right letter")
    return _table(heading, rows)


VIT_TASKS = {
    "1 shot": "vit_classification_1shot",
    "4 shots": "vit_classification_4shot",
    "16 shots": "vit_classification_16shot",
    "all images": "vit_classification_0shot",
    "segmentation": "vit_segmentation_16shot",
}
VIT_KINDS = {"head": "the head alone", "lora": "PEFT's LoRA", "serial": "Serial LoRA", "full": "full fine-tuning"}


def vit_scores_table(folder: Path = RESULTS) -> str:
    """Test scores of every method on a pretrained ViT: mean and deviation over seeds."""
    return _vit_table(folder, lambda row: f"{row['mean']:.1f} ± {row['std']:.1f}")


def vit_differences_table(folder: Path = RESULTS) -> str:
    """The same as differences to the larger LoRA with the same seeds: mean and its standard error."""
    return _vit_table(folder, lambda row: "{:+.1f} ± {:.1f}".format(*row["over_lora"]))


def vit_costs_table(folder: Path = RESULTS) -> str:
    """What every method costs at 16 shots, and the learning rates that it chose."""
    tasks = {task: read_results(name, folder) for task, name in VIT_TASKS.items()}
    results = tasks["16 shots"]
    rows = [
        (
            _vit_method(results["methods"][name]),
            _megabytes(row["bytes"]),
            f"{results['costs'][name]['cpu_seconds_per_step']:.3f} s",
            f"{results['costs'][name]['over_lora']:.2f}",
            _megabytes(row["saved_activations"]),
            ", ".join(f"{r['summary'][name]['rate']:g}" if name in r["summary"] else "-" for r in tasks.values()),
        )
        for name, row in results["summary"].items()
        if name in results["costs"]
    ]
    heading = (
        "",
        "Adapter, fp32",
        "Processor time per step",
        "over LoRA's",
        "Activations kept",
        f"Rates: {', '.join(tasks)}",
    )
    return _table(heading, rows)


def _vit_table(folder: Path, show: Callable[[dict[str, Any]], str]) -> str:
    tasks = {task: read_results(name, folder) for task, name in VIT_TASKS.items()}
    everything = tasks["16 shots"]
    rows = [
        (
            _vit_method(everything["methods"][name]),
            f"{row['parameters']:,}",
            *(show(r["summary"][name]) if name in r["summary"] else "" for r in tasks.values()),
        )
        for name, row in everything["summary"].items()
        if name in everything["costs"]
    ]
    return _table(("", "Trained in the backbone", *tasks), rows)


def vit_variations_table(folder: Path = RESULTS) -> str:
    """Serial LoRA of rank 8 at 16 shots, started or trained in other ways."""
    results = read_results(VIT_TASKS["16 shots"], folder)
    rows = []
    for name, row in results["summary"].items():
        method = results["methods"][name]
        if method["init"] != "gradient" and (name not in results["costs"] or name == "serial-r8"):
            what = f"A ~ {'N(0, 1/r)' if method['init'] == 'gaussian' else 'Kaiming'}, LoRA+ {method['plus']:g}"
            score, difference = f"{row['mean']:.1f} ± {row['std']:.1f}", "{:+.1f} ± {:.1f}".format(*row["over_lora"])
            rows.append((what, f"{row['rate']:g}", score, difference))
    return _table(("", "Rate of A", "16 shots", "over LoRA, r = 8"), rows)


def _vit_method(method: dict[str, Any]) -> str:
    optional = [name.replace("_", " ") for name in (method["inputs"] or ())[1:]]
    rank = f", r = {method['rank']}" if method["rank"] else ""
    smaller = f" of r = {method['output_rank']}" if method.get("output_rank") else ""
    return f"{VIT_KINDS[method['kind']]}{rank}{', with ' if optional else ''}{' and '.join(optional)}{smaller}"


def dreambooth_table(folder: Path = RESULTS) -> str:
    """A subject learnt by tiny pipelines: loss on unseen images of it, what that cost, and what the class lost."""
    results = read_results("dreambooth", folder)
    names = {
        "none": "Serial LoRA, rate 0", "serial": "Serial LoRA", "serial+output": "Serial LoRA, with attention output",
        "lora": "PEFT's LoRA", "full": "full fine-tuning",
    }  # fmt: skip
    rows, forgotten = [], []
    for family, measured in results["families"].items():
        for method, name in names.items():
            r = measured[method]
            rows.append((
                f"{family}: {name}", f"{r['learning_rate']:g}", f"{r['loss']:.4f}",
                f"{r['peak_memory'] / 1e6:,.0f} MB", f"{r['parameters']:,}", f"{r['file_bytes']:,}",
            ))  # fmt: skip
        before, without, preserved = (measured["class_loss"][key] for key in ("base", "without_prior", "with_prior"))
        forgotten.append(f"{family} {before:.4f}, {without:.4f}, {preserved:.4f}")
    heading = ("", "Rate", "Loss", "Peak memory", "Trained parameters", "File bytes")
    return (
        f"{_table(heading, rows)}\n\nLoss on a class that the base knows, before, after {results['steps']} steps on "
        f"the subject, and with prior preservation: {'; '.join(forgotten)}."
    )


def serving_table(folder: Path = RESULTS) -> str:
    """Requests per second and latency against the number of adapters, by way of serving; one table for each model."""
    parts, cases = [], read_results("serving", folder)["cases"]
    for case, measured in cases.items():
        settings, machine = measured["settings"], measured["machine"]
        blocks = "" if case == "built-in base" else f" ({settings['blocks']} block of its real width)"
        counts = list(next(iter(measured["steps"].values())))
        heading = (f"{case}{blocks}", "Held", *(f"{n} adapter{'s' if n != '1' else ''}" for n in counts))
        rows = [
            (
                f"{steps} steps: {name}",
                _megabytes(measured["bytes_each"][name]),
                *(f"{r['requests_per_cpu_s']:.3g} ({r['p50']:.3g}, {r['p95']:.3g})" for r in by_count),
            )
            for steps, table in measured["steps"].items()
            for name in measured["bytes_each"]
            for by_count in [[row[name] for row in table.values()]]
        ]
        rounds = f"medians of {settings['rounds']} rounds" if settings["rounds"] > 1 else "1 round"
        caption = (
            f"{settings['requests']} requests at once, batches of {settings['batch']} at most, rank "
            f"{settings['rank']}, {rounds} in turns; {machine['threads']} thread of an {machine['processor']} "
            f"({machine['isa']}), torch {machine['torch']}, PEFT {machine['peft']}."
        )
        parts.append(f"{_table(heading, rows)}\n\n{caption}")
    clocks = {"cpu": "processor time", "wall": "wall time"}
    kinds = " or ".join(sorted({clocks[case["settings"]["clock"]] for case in cases.values()}))
    what = (
        f"Requests per second of processor time, and (p50, p95) of the latency in seconds of {kinds}. Held: bytes of "
        "one adapter."
    )
    return "\n\n".join([what, *parts])


def _quality(measured: list[dict[str, float]]) -> tuple[str, ...]:
    shows = {"denoising_loss": "{:.4f}", "iou": "{:.3f}", "iou_seen": "{:.3f}", "right_letter": "{:.0%}"}
    return tuple(show.format(sum(m[name] for m in measured) / len(measured)) for name, show in shows.items())


def _step_caption(results: dict[str, Any]) -> str:
    blocks = ", ".join(
        f"{case['size']['blocks']} blocks of {model} (width {case['size']['width']}, "
        f"{' + '.join(map(str, case['size']['tokens']))} tokens)"
        for model, case in results["cases"].items()
    )
    return f"{blocks}; rank {results['settings']['rank']}, batch 1; {_conditions(results)}"


def _conditions(results: dict[str, Any]) -> str:
    settings, machine = results["settings"], results["machine"]
    clock = "" if settings["clock"] == "wall" else " of CPU time"
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return (
        f"medians{clock} over {settings['rounds']} rounds in turns (quartiles), {threads} of an {machine['processor']} "
        f"({machine['isa']}), torch {machine['torch']}, diffusers {machine['diffusers']}, PEFT {machine['peft']}."
    )


def _costs(case: dict[str, Any]) -> dict[str, tuple[dict[str, float], Show]]:
    """What varies with the adapter alone: {name: ({library: number}, how to show it)}."""
    measured = case["precisions"]["bf16 autocast"]
    kept, adapter = measured["saved_bytes"], measured["adapter"]
    costs: dict[str, tuple[dict[str, float], Show]] = {
        "kept for the backward pass beyond the base's, bf16": (
            {n: kept[n] - kept["base"] for n in adapter},
            _megabytes,
        ),
        "trained parameters": ({n: a["parameters"] for n, a in adapter.items()}, "{:,}".format),
        "optimizer state": ({n: a["optimizer_bytes"] for n, a in adapter.items()}, _megabytes),
        "file, fp32": ({n: a["file_bytes"] for n, a in adapter.items()}, _megabytes),
    }
    for name, what, precision in (("forward", "forward", "bf16"), ("forward and backward", "train", "bf16 autocast")):
        counts = case["precisions"][precision][f"{what}_kernels"]
        extra = {n: (counts[n] - counts["base"]) / case["size"]["blocks"] for n in adapter}
        costs[f"operations per attention beyond the base's, {name}"] = extra, "{:.0f}".format
    return costs


def _cost_table(results: dict[str, Any]) -> str:
    rows = [
        (model, name, show(values["serial"]), show(values["peft"]), f"{values['serial'] / values['peft']:.2f}")
        for model, case in results["cases"].items()
        for name, (values, show) in _costs(case).items()
    ]
    return _table(("", "", "Serial LoRA", "PEFT's LoRA", "Ratio"), rows, left=2)


def _overhead(measured: dict[str, Any]) -> str:
    texts = []
    for what, precision in (("forward", "bf16"), ("train", "bf16 autocast"), ("forward", "fp32"), ("train", "fp32")):
        serial, peft = (measured[precision][what][n]["over_base"]["median"] for n in ("serial", "peft"))
        met = serial <= 1 or (serial <= 1.01 and 4 * (serial - 1) <= peft - 1 + 1e-9)
        texts.append(f"{what}, {precision}: {_verdict(met)}, {serial - 1:+.1%} against {peft - 1:+.1%}")
    return "<br>".join(texts)


def _fused(measured: dict[str, Any]) -> str:
    ratios = {p: m["forward"]["serial_fused"]["over_base"] for p, m in measured.items()}
    return "<br>".join(f"{p}: {_verdict(r['q1'] <= 1 or r['median'] <= 1.01)}, {_spread(r)}" for p, r in ratios.items())


_TARGETS = {
    "The live adapter's overhead is at most 1 %, and at most a quarter of PEFT's": _overhead,
    "Fused, the base's speed within noise": _fused,
}


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _milliseconds(measured: dict[str, Any]) -> str:
    return f"{measured['seconds']['median'] * 1e3:,.{0 if measured['seconds']['median'] > 0.1 else 1}f} ms"


def _ratio(measured: dict[str, Any] | None, over: str) -> str:
    return "" if measured is None else _spread(measured[over])


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} ({value['q1']:.3f}-{value['q3']:.3f})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["--:"] * (len(heading) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))
