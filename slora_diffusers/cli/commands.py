"""The subcommands: each checks its options, loads, calls one function of the library, and shows what it reports.

What needs torch is imported by the command that runs, so that `--help` is there at once.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SerialLoraError
from . import checks
from .console import ERR, NOT_VERIFIED, OUT, Debug, Json, PlainErrors, show, track, working
from .train import COMMANDS

app = typer.Typer(
    cls=PlainErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]
WeightName = Annotated[str | None, typer.Option(help="Name of the LoRA's file in its folder.")]


def _command(examples: str, **settings: Any) -> Any:
    # typer keeps what an empty line separates on lines of their own, and nothing else.
    lines = [line.strip() for line in examples.strip().splitlines()]
    return app.command(epilog="\n\n".join(["[bold]Examples[/]", *lines]), **settings)


for _handed_on, (_examples, _settings) in COMMANDS.items():
    _command(_examples, context_settings=_settings)(_handed_on)


def _show_version(value: bool) -> None:
    if value:
        try:
            OUT.print(f"slora {version('slora_diffusers')}")
        except PackageNotFoundError:
            OUT.print("slora (not installed)")
        raise typer.Exit


@app.callback()
def _program(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


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
    checks.folder(output_dir)
    from ..demo.run import run_demo

    chosen = {"style": style} if style is not None else {}
    result = run_demo(output_dir, seed=seed, part=part, console=ERR if json else OUT, **chosen)
    if json:
        show(result, True)


@_command("""slora inspect serial_lora_weights.safetensors
slora inspect lora.safetensors --base my-pipeline
slora inspect my-adapter --base stabilityai/stable-diffusion-3.5-medium --plot spectrum.png
slora inspect facebook/DiT-XL-2-256 --json""")
def inspect(
    source: Annotated[str, typer.Argument(help="An adapter, a LoRA (file, folder, Hub id), or a model or pipeline.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The base: an adapter's LoRA equivalent is counted on it, and what of a "
                     "LoRA pairs would carry."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the singular values here.")] = None,
    weight_name: WeightName = None,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Show an adapter's rank, sites and norms; a LoRA's kind, layout and base; or the sites of a model."""
    checks.picture(plot)
    from ..convert.describe import describe_lora
    from .bases import kind_of, load_base
    from .describe import inspect_adapter, inspect_model, tables

    kind = kind_of(source, weight_name)
    if plot is not None and kind != "adapter":
        raise SerialLoraError(f"--plot draws an adapter's singular values; {source} is a {kind}.")
    if base is not None and kind == "model":
        raise SerialLoraError(f"--base goes with an adapter or a LoRA; {source} is a model itself.")
    if kind == "model":
        report = inspect_model(source, load_base(source))
    elif kind == "LoRA":
        report = describe_lora(source, load_base(base) if base else None, weight_name)
    else:
        report = inspect_adapter(source, load_base(base) if base else None, plot)
    if json:
        show(report, True)
    else:
        for table in tables(report):
            OUT.print(table)


@_command("""slora export my-adapter --base stabilityai/stable-diffusion-3.5-medium -o lora
slora export my-adapter -o lora --format kohya --dtype bfloat16 --rank auto
slora export style subject -w 0.8 -w 0.5 -o lora --rank 16""")
def export(
    adapters: Adapters,
    output: Output,
    base: Base = None,
    format: Annotated[str, typer.Option("--format", "-f", help="diffusers, peft or kohya (ComfyUI).")] = "diffusers",
    weight: Weight = None,
    rank: Annotated[
        str | None, typer.Option(help="Truncate to this rank by SVD; `auto` takes the least that is as good as exact.")
    ] = None,
    dtype: Dtype = "float32",
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the ordinary LoRA that equals one adapter, or several together, for tools that know only LoRA."""
    checks.one_of("format", format, checks.FORMATS)
    checks.one_of("dtype", dtype, checks.DTYPES)
    weights, to = checks.weights_of(adapters, weight), checks.rank_of(rank)
    written = ["pytorch_lora_weights*.safetensors"]
    if format == "peft":
        written = [
            f"{place}{name}" for place in ("", "*/") for name in ("adapter_model.safetensors", "adapter_config.json")
        ]
    checks.nothing_to_overwrite(output, written, force)
    from ..convert import export_lora
    from .bases import dtype_of, load_with_adapters

    model, _ = load_with_adapters(base, adapters, weights)
    report = export_lora(model, output, format=format, rank=to, dtype=dtype_of(dtype), track=track)
    show(report if json else "\n".join([str(report), *map(str, report.files), *report.load]), json)


@_command("""slora compress lora.safetensors --base stabilityai/stable-diffusion-3.5-medium --rank 16 -o serial
slora compress user/lora --base my-pipeline --rank 32 -o serial --keep-rest --plot error.png""")
def compress(
    lora: Annotated[
        str, typer.Argument(help="A LoRA, DoRA, LoHa, LoKr or OFT of any trainer: file, folder or Hub id.")
    ],
    output: Output,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the Serial LoRA.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The base: folder or Hub id, or `demo`.")],
    input: Annotated[
        list[str] | None, typer.Option(help="Name of a pair to use; once for each. All by default.")
    ] = None,
    keep_rest: Annotated[bool, typer.Option(help="Write what no pair carries as a LoRA beside the result.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the error against the rank here.")] = None,
    weight_name: WeightName = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a LoRA into the nearest Serial LoRA of a rank, and say how near."""
    checks.at_least("--rank", rank, 1)
    checks.picture(plot)
    rest = output / "rest" if keep_rest else None
    checks.nothing_to_overwrite(output, ["serial_lora_weights.safetensors", "rest/*"], force, [plot])
    from ..convert import compress_lora
    from ..convert.layouts.read import open_lora, sort_lora
    from ..files.save import save_serial_lora
    from .bases import load_base

    sort_lora(open_lora(lora, weight_name)[0], lora)  # what is not a LoRA needs no base
    model = load_base(base)
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
    rank: Annotated[
        str | None,
        typer.Option(help="Truncate to this rank by SVD, or to the least that is as good as exact (`auto`); else the "
                     "ranks add up."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The base; needed where adapters sit on different "
                    "places.")] = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Merge adapters into one by a weighted sum."""
    if len(adapters) < 2:
        raise SerialLoraError(f"Give at least two adapters; got {len(adapters)}.")
    weights, to = checks.weights_of(adapters, weight), checks.rank_of(rank)
    checks.nothing_to_overwrite(output, ["serial_lora_weights.safetensors"], force)
    from ..convert.merge import merge_files, merge_serial_lora
    from ..files.format import AdapterFile
    from ..files.save import save_serial_lora
    from .bases import load_with_adapters

    if base is None:
        merged, report = merge_files([AdapterFile.read(a) for a in adapters], weights, to, track)
        path = merged.write(output)
    else:
        model, names = load_with_adapters(base, adapters, None)
        report = merge_serial_lora(model, names, weights, "merged", to, track=track)
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
    checks.one_of("dtype", dtype, checks.DTYPES)
    checks.finite("--scale", scale)
    weights = checks.weights_of(adapters, weight)
    checks.folder(output)
    if output.exists() and any(output.iterdir()):
        raise SerialLoraError(f"{output} is not empty: a checkpoint is not written into another. Choose a new folder.")
    from ..adapters.fuse import fuse_serial_lora
    from ..adapters.lifecycle import unload_serial_lora
    from .bases import load_with_adapters

    model, _ = load_with_adapters(base, adapters, weights, dtype)
    with working("Fusing and writing"):
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
    checks.at_least("--tolerance", tolerance, 0)
    checks.at_least("--size", size, 8)
    from ..files.format import AdapterFile
    from ..files.load import load_serial_lora
    from .bases import base_name, load_base
    from .verify import show_verified
    from .verify import verify as verify_adapter

    file = AdapterFile.read(adapter)
    model = load_base(base or base_name(file))
    with working("Running it live, fused and exported"):
        report = verify_adapter(model, lambda: load_serial_lora(model, file), tolerance, size)
    if json:
        show({"passed": report.passed, **vars(report)}, True)
    else:
        show_verified(report)
    if not report.passed:
        raise typer.Exit(NOT_VERIFIED)
