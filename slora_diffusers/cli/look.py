"""`slora compare` and `slora app`: adapters to look at, in a picture or on a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SerialLoraError
from . import checks
from .commands import Adapters, Dtype, Force, Weight, _command
from .console import ERR, Debug, Json, drawing, show
from .serve import app

__all__ = ["app"]  # the command with these two added

ROWS = ("weights", "adapters")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
STEPS = 25
DEFAULT_WEIGHTS, DEFAULT_CLASSES = (0.0, 0.5, 1.0), 4

Base = Annotated[str, typer.Option("--base", "-b", help="Folder or Hub id of a pipeline, or `demo`.")]


@_command("""slora compare outputs/demo/adapter -o grid.png
slora compare outputs/demo/adapter -w 0 -w 0.5 -w 1 -w 1.5 --draw B --seed 0 --seed 1 --seed 2 -o grid.png
slora compare style subject --base my-pipeline --draw "a cat" --draw "a dog in the snow" -o grid.png""")
def compare(
    adapters: Adapters,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.", show_default=False)],
    base: Base = "demo",
    rows: Annotated[
        str | None,
        typer.Option(help="`weights` of all adapters, or `adapters` one by one; by default adapters where there are "
                     "several."),
    ] = None,
    weight: Weight = None,
    draw: Annotated[list[str] | None, typer.Option("--draw", "-d", help="A prompt, or a class by name or number; "
                    "once for each column.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the noise; once for each column.")] = None,
    scale: Annotated[float, typer.Option(help="Factor on all adapters.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = STEPS,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own by default.")] = None,
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the accelerator.")] = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Draw a grid: weights or adapters in rows, prompts (or classes) and seeds in columns, each cell from its seed.

    With --rows weights, each --weight is a row (0, 0.5 and 1 by default); with --rows adapters, each is an adapter's.
    """
    chosen = rows or ("adapters" if len(adapters) > 1 else "weights")
    checks.one_of("--rows", chosen, ROWS)
    checks.one_of("dtype", dtype, checks.DTYPES)
    checks.one_of("--output's ending", output.suffix.lower(), PICTURES)
    checks.finite("--scale", scale)
    for number in weight or ():
        checks.finite("--weight", number)
    each = checks.weights_of(adapters, weight if chosen == "adapters" else None)
    checks.nothing_to_overwrite(output.parent, [output.name], force)
    grids, session_of = _needs("slora compare")
    from ..files.format import AdapterFile

    for adapter in adapters:
        AdapterFile.read(adapter)  # what is none needs no base
    session = session_of(base, dtype, device)
    names = [session.open(adapter) for adapter in adapters]
    subjects = draw or session.subjects()[:DEFAULT_CLASSES]
    if not subjects:
        raise SerialLoraError(f'{base} draws prompts: say which, with --draw "a photo of a cat".')
    look = grids.Look(dict(zip(names, each, strict=True)), scale)
    lines = grids.by_adapters(look) if chosen == "adapters" else grids.by_weights(look, weight or DEFAULT_WEIGHTS)
    grid = grids.Grid(lines, grids.columns_of(session, subjects, seed or [0], steps, guidance))
    with drawing("Drawing the grid") as on_step:
        image = grids.draw_grid(session, grid, ", ".join(names), on_step)
    output.parent.mkdir(parents=True, exist_ok=True)
    image.save(output)
    made = {"picture": output, "rows": list(grid.rows), "columns": list(grid.columns)}
    show(made if json else f"{output}: {len(grid.rows)} x {len(grid.columns)} pictures", json)


def _needs(command: str) -> tuple[Any, Callable[[str, str, str | None], Any]]:
    """The module of grids, and what opens a session on a base."""
    try:
        from ..app import grid, session
    except ModuleNotFoundError as error:
        if error.name != "pydantic":
            raise
        raise SerialLoraError(f"{command} needs pydantic: pip install 'slora_diffusers[cli]'.") from error

    def open_session(base: str, dtype: str, device: str | None) -> Any:
        import torch

        from .bases import load_base

        pipe = load_base(base, dtype)
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return session.Session(pipe)

    return grid, open_session


@_command(
    """slora app
slora app outputs/demo/adapter
slora app style subject --base stabilityai/stable-diffusion-3.5-medium --dtype bfloat16""",
    name="app",
)
def look(
    adapters: Annotated[list[str] | None, typer.Argument(help="Adapters to open.", show_default=False)] = None,
    base: Base = "demo",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 7860,
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the accelerator.")] = None,
    debug: Debug = False,
) -> None:
    """Open a page to look at adapters: base, live and fused side by side, grids, blocks, spectra, export, merge."""
    checks.one_of("dtype", dtype, checks.DTYPES)
    _, session_of = _needs("slora app")
    try:
        from ..app.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SerialLoraError("slora app needs gradio: pip install 'slora_diffusers[app]'.") from error
    ERR.print(f"The page is at http://{host}:{port} (Ctrl-C ends it)")
    serve(lambda name: session_of(name, dtype, device), base, adapters or [], host, port)
