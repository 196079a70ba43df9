"""A server for the tests: the built-in base or a tiny pipeline, adapters that it never saw, real HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import torch
import uvicorn
from diffusers import DiTPipeline
from safetensors.torch import load_file
from torch import Tensor

import slora_diffusers as sl
from slora_diffusers.serving.adapters import Adapters, Catalogue
from slora_diffusers.serving.batcher import Batcher, Policy
from slora_diffusers.serving.http import create_app
from slora_diffusers.serving.requests import Body
from slora_diffusers.serving.studio import Studio
from tests.adapters import add_random_adapter
from tests.tiny.pipelines import tiny_dit_pipeline


def tiny_base(seed: int = 0) -> DiTPipeline:
    """A DiT of two blocks over classes, with weights that are not at their start."""
    pipe = tiny_dit_pipeline("flow_prediction", seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    pipe.transformer.requires_grad_(False)
    return pipe


def write_adapter(pipe: Any, folder: Path, seed: int, std: float = 0.3, **config: Any) -> Path:
    """Save a random adapter that follows from the seed, and leave the pipeline as it was."""
    add_random_adapter(pipe.transformer, "written", seed, std, **config)
    path = sl.save_serial_lora(pipe.transformer, folder, "written")
    sl.delete_serial_lora(pipe.transformer, "written")
    return path


def three_adapters(folder: Path) -> Path:
    """Write a0, a1 and a2, of different ranks, for the tiny DiT."""
    for i in range(3):
        write_adapter(tiny_base(), folder / f"a{i}", seed=i, rank=2 + i)
    return folder


def drawn(batcher: Batcher, **body: Any) -> Tensor:
    """The latents of one request that goes through the queue."""
    job = batcher.submit(batcher.studio.request(Body.model_validate(body)))
    return job.future.result(timeout=60).picture.latents


def new_batcher(folder, memory=1 << 30, pipe=None, **policy):
    pipe = pipe or tiny_base()
    studio = Studio(pipe)
    studio.rehearse()
    return Batcher(studio, Adapters(pipe, Catalogue(folder), memory), Policy(**{"wait": 0.2, **policy}))


def submitted(batcher, **body):
    """A job in the queue."""
    return batcher.submit(batcher.studio.request(Body.model_validate({"class": 0, "steps": 3, **body})))


def nbytes(folder):
    """Bytes of an adapter's tensors."""
    return sum(tensor.nbytes for tensor in load_file(folder / "serial_lora_weights.safetensors").values())


def results(jobs):
    """What jobs gave."""
    return [job.future.result(timeout=60) for job in jobs]


@contextlib.contextmanager
def started(batcher: Batcher) -> Iterator[Batcher]:
    """A batcher that draws, inside."""
    batcher.start()
    try:
        yield batcher
    finally:
        batcher.close()


@contextlib.contextmanager
def listening(batcher: Batcher, api_key: str | None = None) -> Iterator[str]:
    """The address of a server, inside."""
    server = uvicorn.Server(uvicorn.Config(create_app(batcher, api_key), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def events(response: requests.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event, data) of every server-sent event."""
    name = ""
    for line in map(str, response.iter_lines(decode_unicode=True)):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
