"""The subcommands: each loads, calls one function of the library, and shows what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..adapters.fuse import fuse_serial_lora
from ..adapters.lifecycle import unload_serial_lora
from ..convert import compress_lora, export_lora
from ..convert.merge import merge_files, merge_serial_lora
from ..errors import SerialLoraError
from ..files.format import AdapterFile
from ..files.load import load_serial_lora
from ..files.save import save_serial_lora
from .bases import base_name, dtype_of, is_model, load_base, load_with_adapters
from .console import ERR, NOT_VERIFIED, OUT, Debug, Json, PlainErrors, show, track
from .describe import inspect_adapter, inspect_model, tables
from .train import COMMANDS
from .verify import verify as verify_adapter

app = typer.Typer(
    cls=PlainErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Serial LoRA: adapt what an attention reads, x~ = (I + s B A) x. Each command shows examples with --help.",
)

Adapters = Annotated[list[str], typer.Argument(help="Serial LoRA files, folders or Hub ids.", show_default=False)]
Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="The base: folder or Hub id of a pipeline or model, or `demo`. Without it, the "
                 "one that the adapter's file names."),
]  # fmt: skip
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.", show_default=False)]
Weight = Annotated[list[float] | None, typer.Option("--weight", "-w", help="Weight of an adapter; once for each.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]


def _command(examples: str, **settings: Any) -> Any:
    lines = "\n\n".join(f"- {line.strip()}" for line in examples.strip().splitlines())  # typer joins other lines
    return app.command(epilog=f"**Examples**\n\n{lines}", **settings)


for _handed_on, (_examples, _settings) in COMMANDS.items():
    _command(_examples, context_settings=_settings)(_handed_on)


@_command("""slora demo
slora demo --part vision
slora demo --style calligraphic --output-dir outputs/demo --json""")
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write to.")] = Path("outputs/demo"),
    style: Annotated[str | None, typer.Option(help="A style that the built-in bases never saw.")] = None,
    part: Annotated[str, typer.Option(help="generation, vision or all.")] = "all",
    seed: Annotated[int, typer.Option(help="Seed of the adapter, the data order and the noise.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune the built-in DiT and ViT on a new style; write pictures, the adapters and metrics."""
    from ..demo.run import run_demo

    chosen = {"style": style} if style is not None else {}
    result = run_demo(output_dir, seed=seed, part=part, console=ERR if json else OUT, **chosen)
    if json:
        show(result, True)


@_command("""slora inspect serial_lora_weights.safetensors
slora inspect my-adapter --base stabilityai/stable-diffusion-3.5-medium --plot spectrum.png
slora inspect facebook/DiT-XL-2-256 --json""")
def inspect(
    source: Annotated[str, typer.Argument(help="An adapter (file, folder, Hub id), or a model or pipeline.")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="The base, to count the LoRA equivalent on.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the singular values here.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show an adapter's rank, alpha, sites, parameters and norms, or the sites of a model."""
    if is_model(source):
        if plot is not None:
            raise SerialLoraError("--plot draws an adapter's singular values; a model without adapter has none.")
        report = inspect_model(source, load_base(source))
    else:
        report = inspect_adapter(source, load_base(base) if base else None, plot)
    if json:
        show(report, True)
    else:
        for table in tables(report):
            OUT.print(table)


@_command("""slora export my-adapter --base stabilityai/stable-diffusion-3.5-medium -o lora
slora export my-adapter -o lora --format kohya --dtype bfloat16
slora export style subject -w 0.8 -w 0.5 -o lora --rank 16""")
def export(
    adapters: Adapters,
    output: Output,
    base: Base = None,
    format: Annotated[str, typer.Option("--format", "-f", help="diffusers, peft or kohya.")] = "diffusers",
    weight: Weight = None,
    rank: Annotated[int | None, typer.Option(help="Truncate to this rank by SVD.")] = None,
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the ordinary LoRA that equals one adapter, or several together, for tools that know only LoRA."""
    kind = dtype_of(dtype)
    model, _ = load_with_adapters(base, adapters, weight)
    report = export_lora(model, output, format=format, rank=rank, dtype=kind, track=track)
    show(report if json else f"{report}\n" + "\n".join(map(str, report.files)), json)


@_command("""slora compress lora.safetensors --base stabilityai/stable-diffusion-3.5-medium --rank 16 -o serial
slora compress user/lora --base my-pipeline --rank 32 -o serial --keep-rest --plot error.png""")
def compress(
    lora: Annotated[str, typer.Argument(help="A LoRA of diffusers, PEFT or kohya: file, folder or Hub id.")],
    output: Output,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the Serial LoRA.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The base: folder or Hub id, or `demo`.")],
    input: Annotated[
        list[str] | None, typer.Option(help="Name of a pair to use; once for each. All by default.")
    ] = None,
    keep_rest: Annotated[bool, typer.Option(help="Write what no pair carries as a LoRA beside the result.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the error against the rank here.")] = None,
    weight_name: Annotated[str | None, typer.Option(help="Name of the LoRA's file in its folder.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a LoRA into the nearest Serial LoRA of a rank, and say how near."""
    model = load_base(base)
    rest = output / "rest" if keep_rest else None
    report = compress_lora(
        model, lora, rank, inputs=input, keep_rest=rest, plot=plot, weight_name=weight_name, track=track
    )
    path = save_serial_lora(model, output, report.adapter_name)
    if json:
        show({"adapter": path, **vars(report)}, True)
    else:
        show(f"{report}\n" + "\n".join(map(str, (path, *report.rest))), False)


@_command("""slora merge style subject -w 0.8 -w 0.5 -o both
slora merge style subject -o both --rank 16""")
def merge(
    adapters: Adapters,
    output: Output,
    weight: Weight = None,
    rank: Annotated[int | None, typer.Option(help="Truncate to this rank by SVD; else the ranks add up.")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The base; needed where adapters sit on different "
                    "places.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Merge adapters into one by a weighted sum."""
    weights = list(weight or [1.0] * len(adapters))
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise SerialLoraError(
            f"Give at least two adapters, and --weight once for each or not at all; got {len(adapters)} and "
            f"{len(weights)}."
        )
    if base is None:
        merged, report = merge_files([AdapterFile.read(a) for a in adapters], weights, rank, track)
        path = merged.write(output)
    else:
        model, names = load_with_adapters(base, adapters, None)
        report = merge_serial_lora(model, names, weights, "merged", rank, track=track)
        path = save_serial_lora(model, output, "merged")
    result = {"file": path, **vars(report), "weights": dict(zip(adapters, weights, strict=True))}
    show(result if json else f"{report}\n{path}", json)


@_command("""slora fuse my-adapter --base stabilityai/stable-diffusion-3.5-medium -o fused
slora fuse style subject -w 0.8 -w 0.5 -o fused --dtype bfloat16""")
def fuse(
    adapters: Adapters,
    output: Output,
    base: Base = None,
    weight: Weight = None,
    scale: Annotated[float, typer.Option(help="Factor on all adapters.")] = 1.0,
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge adapters into the base's weights and write the whole checkpoint, which needs no adapter code."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SerialLoraError(f"{output} is not empty: a checkpoint is not written into another. Choose a new folder.")
    model, _ = load_with_adapters(base, adapters, weight, dtype)
    with ERR.status("Fusing and writing"):
        fuse_serial_lora(model, scale=scale)
        unload_serial_lora(model)
        model.save_pretrained(output)  # pyright: ignore[reportCallIssue]
    show({"checkpoint": output, "adapters": adapters} if json else f"Fused checkpoint: {output}", json)


@_command("""slora verify my-adapter --base stabilityai/stable-diffusion-3.5-medium
slora verify outputs/demo/adapter --base demo --json""")
def verify(
    adapter: Annotated[str, typer.Argument(help="A Serial LoRA: file, folder or Hub id.")],
    base: Base = None,
    tolerance: Annotated[float, typer.Option(help="What counts as equal, relative to the largest output.")] = 1e-5,
    size: Annotated[int | None, typer.Option(help="Height and width of the images to make.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that an adapter gives the same live, fused and exported. Exit code 3 if it does not."""
    file = AdapterFile.read(adapter)
    model = load_base(base or base_name(file))
    with ERR.status("Running it live, fused and exported"):
        report = verify_adapter(model, lambda: load_serial_lora(model, file), tolerance, size)
    if json:
        show({"passed": report.passed, **vars(report)}, True)
    else:
        _show_verified(report)
    if not report.passed:
        raise typer.Exit(NOT_VERIFIED)


def _show_verified(report: Any) -> None:
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
