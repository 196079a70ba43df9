"""The HTTP side of a server: routes, the API key, and answers as PNG, base64 or a stream of events."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL.PngImagePlugin import PngInfo
from starlette.exceptions import HTTPException

from ..errors import SerialLoraError
from .batcher import Batcher
from .errors import RequestError, Unauthorised, status_of
from .jobs import Done, Job
from .metrics import Metrics
from .requests import Body, sentence

KEY_VARIABLE = "SLORA_API_KEY"
LARGEST_BODY = 1 << 20


def create_app(batcher: Batcher, api_key: str | None = None) -> FastAPI:
    """The server of a batcher, which starts and ends with it.

    Args:
        batcher: Draws.
        api_key: What clients send as `Authorization: Bearer KEY` or `X-API-Key: KEY`; None asks for no key.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    async def authorise(request: HttpRequest) -> None:
        check_key(request, api_key)

    app = FastAPI(title="slora serve", description="Images with adapters of every request's own.", lifespan=lifespan)
    app.add_middleware(BodyLimit)
    guarded = [Depends(authorise)]
    metrics = batcher.metrics

    @app.post("/generate", dependencies=guarded)
    async def generate(body: Body, http: HttpRequest) -> Response:
        """Draw an image: a PNG, JSON, or with `stream` server-sent events."""
        request = batcher.studio.request(body)
        told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(event: dict[str, Any]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it the client
                loop.call_soon_threadsafe(told.put_nowait, event)

        job = batcher.submit(request, body.timeout, on_event, body.id)
        http.state.job = job  # whose end is counted, in whatever way it comes
        job.future.add_done_callback(lambda future: on_event({"event": "end"}))
        job.future.add_done_callback(metrics.count)
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Request-Id": job.name}
            return StreamingResponse(_stream(http, job, told), media_type="text/event-stream", headers=headers)
        done = await _outcome(http, job, told)
        png = await asyncio.to_thread(encode_png, job, done)
        if body.output == "base64":
            return JSONResponse(as_json(job, done, png))
        return Response(png, media_type="image/png", headers=_headers(job, done))

    @app.delete("/requests/{name}", dependencies=guarded)
    async def cancel(name: str) -> dict[str, str]:
        """End a request that waits or is being drawn."""
        batcher.cancel(name)
        return {"cancelled": name}

    _refuse(app, metrics)
    _tell(app, batcher, guarded)
    return app


def _refuse(app: FastAPI, metrics: Metrics) -> None:
    """Answer errors with their status and one sentence."""

    @app.exception_handler(SerialLoraError)
    async def refuse(request: HttpRequest, error: Exception) -> Response:
        if request.url.path == "/generate" and not hasattr(request.state, "job"):
            metrics.requests.labels(str(status_of(error))).inc()
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: HttpRequest, error: RequestValidationError) -> Response:
        return await refuse(request, RequestError(sentence(list(error.errors()))))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: HttpRequest, error: HTTPException) -> Response:
        return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)


def _tell(app: FastAPI, batcher: Batcher, guarded: list[Any]) -> None:
    """Add the routes that tell what the server has and does."""

    @app.get("/adapters", dependencies=guarded)
    async def adapters() -> dict[str, Any]:
        """The adapters that a request may name, and which of them are loaded."""
        listed = await asyncio.to_thread(batcher.adapters.listed)
        return {"adapters": listed, "bytes": batcher.adapters.bytes, "limit": batcher.adapters.limit}

    @app.get("/health")
    async def health() -> Response:
        """Whether the server draws: 200, or 503 while it starts or ends."""
        state = {"waiting": batcher.waiting, "running": batcher.running, "adapters": batcher.adapters.count}
        status = "ok" if batcher.alive else "not drawing"
        return JSONResponse({"status": status, **state}, 200 if batcher.alive else 503)

    @app.get("/metrics", dependencies=guarded)
    async def prometheus() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(batcher.metrics.text(), media_type="text/plain; version=0.0.4")


def check_key(request: HttpRequest, api_key: str | None) -> None:
    """Raise Unauthorised unless a request carries the key, or none is asked for."""
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    given = request.headers.get("x-api-key", bearer)
    if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
        raise Unauthorised("Send the server's API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")


class BodyLimit:
    """Refuses a body that is longer than any request, before it is read whole.

    Args:
        app: The server behind.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, counting what it sends."""
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > LARGEST_BODY:
                raise HTTPException(413, f"A request's body may have {LARGEST_BODY:,} bytes at most.")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


def encode_png(job: Job, done: Done, **more: Any) -> bytes:
    """The image as PNG, with the request, and what else there is to say, as JSON in its text `slora`."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("slora", json.dumps(job.request.described() | more))
    done.picture.image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def as_json(job: Job, done: Done, png: bytes) -> dict[str, Any]:
    """An image as JSON."""
    return {
        "id": job.name,
        "image": base64.b64encode(png).decode("ascii"),
        "request": job.request.described(),
        "batch": done.batch,
        "seconds": round(done.seconds, 4),
        "warnings": list(done.warnings),
    }


def _headers(job: Job, done: Done) -> dict[str, str]:
    headers = {"X-Request-Id": job.name, "X-Seed": str(job.request.seed), "X-Batch": str(done.batch)}
    if done.warnings:
        headers["X-Warning"] = " ".join(" ".join(done.warnings).split()).encode("ascii", "replace").decode()[:1000]
    return headers


def _refusal(error: BaseException) -> JSONResponse:
    status = status_of(error)
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    return JSONResponse({"detail": " ".join(str(error).split())}, status, more.get(status))


async def _events(
    http: HttpRequest, job: Job, told: asyncio.Queue[dict[str, Any]]
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a job until it has ended; a client that leaves ends it, and so does its deadline."""
    left = asyncio.ensure_future(_left(http))
    try:
        while not job.over:
            event = asyncio.ensure_future(told.get())
            await asyncio.wait((event, left), timeout=max(0.0, job.remaining), return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                yield event.result()
            event.cancel()
            if left.done():
                job.cancel()
    finally:
        left.cancel()
        job.cancel()


async def _outcome(http: HttpRequest, job: Job, told: asyncio.Queue[dict[str, Any]]) -> Done:
    async with aclosing(_events(http, job, told)) as events:
        async for _ in events:
            pass
    return job.future.result()


async def _stream(http: HttpRequest, job: Job, told: asyncio.Queue[dict[str, Any]]) -> AsyncIterator[str]:
    """The same as server-sent events: queued, running, progress, and result or error."""
    yield _sent("queued", {"id": job.name, "seed": job.request.seed})
    async with aclosing(_events(http, job, told)) as events:
        async for event in events:
            if event["event"] != "end":
                yield _sent(event["event"], {name: value for name, value in event.items() if name != "event"})
    try:
        done = job.future.result()
    except SerialLoraError as error:
        yield _sent("error", {"status": status_of(error), "detail": " ".join(str(error).split())})
    else:
        yield _sent("result", as_json(job, done, await asyncio.to_thread(encode_png, job, done)))


def _sent(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


async def _left(http: HttpRequest) -> None:
    """Return when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
