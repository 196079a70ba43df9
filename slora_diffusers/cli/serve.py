"""`slora serve`: a server on one base, with adapters of every request's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SerialLoraError
from .commands import Dtype, _command, app
from .console import ERR, Debug, working

__all__ = ["app"]  # the command with this one added


@_command("""slora serve --adapters outputs/adapters
slora serve --base stabilityai/stable-diffusion-3.5-medium --dtype bfloat16 --adapters adapters --max-batch 4
slora serve --hub user/style --hub user/subject@v2 --adapter-memory 2048""")
def serve(
    base: Annotated[str, typer.Option("--base", "-b", help="Folder or Hub id of a pipeline, or `demo`.")] = "demo",
    adapters: Annotated[Path | None, typer.Option("--adapters", "-a", help="Folder of adapters.")] = None,
    hub: Annotated[list[str] | None, typer.Option(help="Hub id, or id@revision, that may be used; repeat it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(help="Requests of a batch at most.", min=1)] = 8,
    max_wait: Annotated[float, typer.Option(help="Seconds to wait for others to share a batch.", min=0)] = 0.02,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.", min=1)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is answered 504.", min=0.001)] = 300.0,
    adapter_memory: Annotated[int, typer.Option(help="Megabytes of adapters that are held.", min=1)] = 1024,
    max_steps: Annotated[int, typer.Option(help="Steps of a request at most.", min=1)] = 150,
    max_side: Annotated[int, typer.Option(help="Pixels of a side at most.", min=1)] = 2048,
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default the accelerator.")] = None,
    debug: Debug = False,
) -> None:
    """Serve images over HTTP; requests with different adapters share a batch. `SLORA_API_KEY` asks for a key."""
    import torch

    from .bases import load_base

    try:
        from ..serving.server import Limits, Policy, api_key, make_batcher, run
    except ImportError as error:
        raise SerialLoraError(f"slora serve needs {error.name}: pip install 'slora_diffusers[serve]'.") from error
    api_key()  # a wrong one is found before the base is loaded
    pipe = load_base(base, dtype)
    if isinstance(pipe, torch.nn.Module):
        raise SerialLoraError(f"slora serve draws with a whole pipeline; {base} is a model alone.")
    with working("Preparing it"):
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        policy = Policy(max_batch, max_wait, queue, timeout)
        limits = Limits(max_steps, max_side)
        batcher = make_batcher(pipe, adapters, hub or (), adapter_memory << 20, policy, limits)
    ERR.print(f"Serving {base} at http://{host}:{port} (its page of requests: /docs)")
    run(batcher, host, port)
