"""Requests that share a batch: each image is the one drawn alone, whatever the adapters, files and faults beside it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import slora_diffusers as sl
from slora_diffusers.serving.adapters import Adapters, Catalogue
from slora_diffusers.serving.batcher import Batcher, Policy
from slora_diffusers.serving.errors import Busy, Cancelled, Failed, NoRoom, NotFound, RequestError, TimedOut
from slora_diffusers.serving.errors import UnknownAdapter as Unknown
from slora_diffusers.serving.requests import Body
from slora_diffusers.serving.studio import Guidance, Studio
from tests.serving import drawn, started, tiny_base, write_adapter
from tests.tiny.pipelines import tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline

PIPELINES = {
    "DiT": tiny_base,
    "SD3": tiny_sd3_pipeline,
    "PixArt": lambda: tiny_pixart_pipeline("sigma"),
    "Flux": tiny_flux_pipeline,
}
PROMPTS = ("a red fox", "a photo of a dog on the beach", "0123456789", "a cup of coffee")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of three adapters of different ranks for the tiny DiT."""
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(3):
        write_adapter(tiny_base(), folder / f"a{i}", seed=i, rank=2 + i)
    return folder


def new_batcher(folder, memory=1 << 30, pipe=None, **policy):
    pipe = pipe or tiny_base()
    studio = Studio(pipe)
    studio.rehearse()
    return Batcher(studio, Adapters(pipe, Catalogue(folder), memory), Policy(**{"wait": 0.2, **policy}))


def submitted(batcher, **body):
    return batcher.submit(batcher.studio.request(Body.model_validate({"steps": 3, **body})))


def stock_latents(pipe, request, names):
    """The latents that the stock pipeline gives with these adapters set, by itself."""
    pipe.set_serial_lora(names)
    kept = {}
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: kept.setdefault("out", []).append(step(*a, **k)[0]) or (kept["out"][-1],)
    signature = __import__("inspect").signature(step)
    pipe.scheduler.step.__dict__["__signature__"] = signature
    if "class_labels" in __import__("inspect").signature(pipe.__call__).parameters:

        def as_output(*args, **kwargs):
            output = step(*args, **kwargs)
            kept["last"] = output[0]
            return output

        pipe.scheduler.step = as_output
        pipe([request.condition], request.guidance, torch.Generator().manual_seed(request.seed), request.steps)
        latents = kept["last"][:1]
    else:
        del pipe.scheduler.step
        arguments = {"height": request.size[0], "width": request.size[1], "output_type": "latent"}
        if "PixArt" in type(pipe).__name__:
            arguments["use_resolution_binning"] = False
        latents = pipe(
            request.condition,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            **arguments,
        ).images
    vars(pipe.scheduler).pop("step", None)
    return latents[0]
