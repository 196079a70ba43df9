"""Ray Serve, where one machine is too small: replicas, autoscaling, batching and routing by Ray's own means.

    serve run slora_diffusers.serving.serve_app:build adapters=/shared/adapters max_replicas=4

Every replica holds the base and batches what reaches it. Requests of one adapter go to a replica that has it, as far as
its queue allows. A request whose replica dies is drawn by another: the same request gives the same image anywhere.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from ..cli.bases import load_base
from ..errors import SerialLoraError
from .batcher import Policy
from .errors import RequestError, status_of
from .http import as_json, check_key, encode_png
from .requests import Body, sentence
from .server import api_key, make_batcher

BATCH = 8
_TRIES = 3
Answer = tuple[int, dict[str, Any]]


@serve.deployment(max_ongoing_requests=4 * BATCH)
class Drawer:
    """One replica: a base, its adapters, and a queue that is as long as Ray lets it be."""

    def __init__(self, base: str, adapters: str | None, hub: list[str], megabytes: int, dtype: str) -> None:
        pipe = load_base(base, dtype)
        policy = Policy(BATCH, wait=0.005, queue=8 * BATCH)  # Ray has waited for the batch already
        self.batcher = make_batcher(pipe, adapters, hub, megabytes << 20, policy)
        self.batcher.start()

    @serve.multiplexed(max_num_models_per_replica=256)
    async def route(self, names: str) -> str:
        """Tell Ray that this replica has these adapters; the batcher loads and drops them by their bytes."""
        return names

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.02)
    async def draw(self, bodies: list[dict[str, Any]]) -> list[Answer]:
        """Draw what Ray has batched."""
        return list(await asyncio.gather(*map(self._answer, bodies)))

    async def generate(self, body: dict[str, Any]) -> Answer:
        """Status code and JSON of one request."""
        if names := serve.get_multiplexed_model_id():
            await self.route(names)  # pyright: ignore[reportCallIssue]  Ray's decorator is not typed
        return await self.draw(body)

    async def _answer(self, body: dict[str, Any]) -> Answer:
        try:
            checked = Body.model_validate(body)
            job = self.batcher.submit(self.batcher.studio.request(checked), checked.timeout)
            done = await asyncio.wrap_future(job.future)
        except SerialLoraError as error:
            return status_of(error), {"detail": str(error)}
        return 200, as_json(job, done, await asyncio.to_thread(encode_png, job, done))

    def check_health(self) -> None:
        """Ray replaces a replica that no longer draws."""
        if not self.batcher.alive:
            raise RuntimeError("The drawing thread has ended.")


@serve.deployment(max_ongoing_requests=1024)
class Front:
    """Takes requests over HTTP, as JSON, and answers with the image as base64."""

    def __init__(self, drawer: Any, key: str | None) -> None:
        self.drawer, self.key = drawer, key

    async def __call__(self, http: HttpRequest) -> JSONResponse:
        """Answer one request; where its replica dies, another replica draws it."""
        try:
            check_key(http, self.key)
            body = Body.model_validate_json(await http.body()).model_dump(by_alias=True)
        except ValidationError as error:
            return JSONResponse({"detail": sentence(list(error.errors()))}, 422)
        except RequestError as error:
            return JSONResponse({"detail": str(error)}, status_of(error))
        drawer = self.drawer.options(multiplexed_model_id=",".join(sorted(body["adapters"])))
        for _ in range(_TRIES):
            try:
                status, answer = await drawer.generate.remote(body)
                return JSONResponse(answer, status)
            except RayActorError:
                await asyncio.sleep(0.1)
        return JSONResponse({"detail": f"{_TRIES} replicas ended while they drew this request."}, 503)


def build(args: dict[str, str]) -> Application:
    """The application that `serve run` starts; each argument is `name=value`."""
    given = {"base": "demo", "min_replicas": "1", "max_replicas": "1", "megabytes": "1024", "dtype": "float32"} | args
    known = {"base", "adapters", "hub", "min_replicas", "max_replicas", "megabytes", "dtype"}
    if unknown := sorted(set(given) - known):
        raise SerialLoraError(f"{unknown[0]!r} is not an argument; these are: {', '.join(sorted(known))}.")
    scale = {"min_replicas": int(given["min_replicas"]), "max_replicas": int(given["max_replicas"])}
    adapters = os.path.abspath(given["adapters"]) if "adapters" in given else None
    hub = [name for name in given.get("hub", "").split(",") if name]
    drawer = Drawer.options(autoscaling_config={**scale, "target_ongoing_requests": BATCH}).bind(
        given["base"], adapters, hub, int(given["megabytes"]), given["dtype"]
    )
    return Front.bind(drawer, api_key())
