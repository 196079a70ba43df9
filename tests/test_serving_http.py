"""`slora serve` over real HTTP: answers, limits, the key, streams, and clients that leave."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image

from tests.serving import drawn, events, listening, new_batcher, tiny_base, write_adapter

KEY = "correct horse"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in (("style", 0), ("people/ann", 1)):
        write_adapter(tiny_base(), folder / name, seed=seed)
    write_adapter(tiny_base(), folder.parent / "secret", seed=2)
    (folder / "broken.safetensors").write_bytes(b"no safetensors")
    return folder


@pytest.fixture(scope="module")
def batcher(shelf):
    return new_batcher(shelf, wait=0.05, timeout=60)


@pytest.fixture(scope="module")
def server(batcher):
    with listening(batcher, KEY) as address:
        yield address


def post(server, body, key=KEY, **more):
    return requests.post(
        f"{server}/generate", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60, **more
    )


def get(server, path):
    return requests.get(f"{server}/{path}", headers={"X-API-Key": KEY}, timeout=60)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)), dtype=float)


def test_png_base64_and_stream_give_the_image_of_the_request(server, batcher):
    body = {"class": "dog", "seed": 7, "steps": 3, "adapters": {"style": 1.0}}
    answer = post(server, body)
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-seed"] == "7"
    written = json.loads(Image.open(io.BytesIO(answer.content)).text["slora"])
    assert (written["class"], written["adapters"], written["seed"]) == (1, {"style": 1.0}, 7)
    coded = post(server, {**body, "output": "base64"}).json()
    streamed = list(events(post(server, {**body, "stream": True}, stream=True)))
    assert [name for name, _ in streamed] == ["queued", "running", "progress", "progress", "progress", "result"]
    assert [data["step"] for name, data in streamed if name == "progress"] == [1, 2, 3]
    for image in (coded["image"], streamed[-1][1]["image"]):
        assert np.abs(pixels(base64.b64decode(image)) - pixels(answer.content)).max() <= 1
    other = post(server, {**body, "adapters": {"people/ann": 1.0}})
    assert np.abs(pixels(other.content) - pixels(answer.content)).max() > 1
    assert drawn(batcher, **body).isfinite().all()


def test_requests_at_the_same_time_share_a_batch_whatever_their_adapters(server):
    bodies = [
        {"class": i, "seed": i, "steps": 3, "guidance": 2.0 + i, "adapters": {a: 1.0} if a else {}}
        for i, a in enumerate(("style", "people/ann", None))
    ]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda body: post(server, body), bodies))
    assert {answer.headers["x-batch"] for answer in together} == {"3"}
    for body, answer in zip(bodies, together, strict=True):
        alone = post(server, body)
        assert alone.headers["x-batch"] == "1"
        assert np.abs(pixels(alone.content) - pixels(answer.content)).max() <= 1


BAD = [
    ({"class": 0, "steps": 0}, 422, "steps"),
    ({"class": 0, "steps": 10**6}, 422, "steps"),
    ({"class": 0, "steps": "3"}, 422, "steps"),
    ({"class": 0, "steps": True}, 422, "steps"),
    ({"class": 0, "seed": -1}, 422, "seed"),
    ({"class": 0, "seed": 2**63}, 422, "seed"),
    ({"class": 0, "seed": 1.5}, 422, "seed"),
    ({"class": 0, "guidance": "much"}, 422, "guidance"),
    ({"class": 0, "guidance": float("nan")}, 422, "guidance"),
    ({"class": 0, "guidance": float("inf")}, 422, "guidance"),
    ({"class": 0, "size": 0}, 422, "size"),
    ({"class": 0, "size": [32, 32, 32]}, 422, "size"),
    ({"class": 0, "output": "jpeg"}, 422, "output"),
    ({"class": 0, "timeout": 0}, 422, "timeout"),
    ({"class": 0, "id": "../x"}, 422, "id"),
    ({"class": 0, "sampler": "euler"}, 422, "sampler"),
    ({"class": "cow"}, 422, "class"),
    ({"class": 0, "prompt": "a cat"}, 422, "class"),
    ({"class": None}, 422, "class"),
    ({"class": 0, "adapters": ["style"]}, 422, "adapters"),
    ({"class": 0, "adapters": {"style": "1"}}, 422, "adapters.style"),
    ({"class": 0, "adapters": {"style": float("nan")}}, 422, "adapters.style"),
    ({"class": 0, "adapters": {"broken": 1.0}}, 422, "broken"),
    ({"class": 0, "adapters": {"nobody": 1.0}}, 404, "nobody"),
    ({"class": 0, "adapters": {"../secret": 1.0}}, 404, "secret"),
    ({"class": 0, "adapters": {"/etc/passwd": 1.0}}, 404, "passwd"),
    ([], 422, "body"),
    ("text", 422, "body"),
    (None, 422, "body"),
]


@pytest.mark.parametrize(("body", "status", "told"), BAD, ids=[json.dumps(body) for body, _, _ in BAD])
def test_a_bad_body_gets_its_status_and_one_sentence(server, body, status, told):
    answer = requests.post(
        f"{server}/generate",
        data=json.dumps(body),
        headers={"X-API-Key": KEY, "Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert told.lower() in detail.lower() and detail.endswith(".") and "\n" not in detail and "/tmp" not in detail


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"{", 422), (b"\xff\xfe", 422), (b"[" * 100_000, 400), (b'{"prompt": "' + b"x" * (1 << 21) + b'"}', 413)],
    ids=["cut", "no text", "deep", "long"],
)
def test_what_is_no_json_or_too_long_is_refused(server, data, status):
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    answer = requests.post(f"{server}/generate", data=data, headers=headers, timeout=60)
    assert answer.status_code == status and answer.json()["detail"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}, {"X-API-Key": "\xe9"}])
def test_without_the_key_only_the_health_is_told(server, headers):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("POST", "generate"), ("GET", "adapters"), ("GET", "metrics"), ("DELETE", "requests/r0")):
        answer = requests.request(method, f"{server}/{path}", headers=headers, json={"class": 0}, timeout=60)
        assert answer.status_code == 401 and "API key" in answer.json()["detail"]
    assert requests.get(f"{server}/health", timeout=60).json()["status"] == "ok"


def test_adapters_and_metrics_tell_what_was_done(server):
    post(server, {"class": 0, "steps": 2, "adapters": {"style": 1.0}})
    listed = {a["name"]: a for a in get(server, "adapters").json()["adapters"]}
    assert set(listed) == {"broken", "people/ann", "style"}
    assert listed["style"]["loaded"] and listed["style"]["bytes"] > 0 and not listed["broken"]["loaded"]

    def counted(line):
        lines = dict(row.rsplit(" ", 1) for row in get(server, "metrics").text.splitlines() if row[:1] != "#")
        return float(lines.get(line, 0))

    ok, bad, unknown = (f'slora_requests_total{{status="{status}"}}' for status in (200, 422, 404))
    before = [counted(line) for line in (ok, bad, unknown)]
    post(server, {"class": 0, "steps": 2})
    post(server, {"class": 0, "steps": 0})
    post(server, {"class": 0, "adapters": {"broken": 1.0}})
    post(server, {"class": 0, "adapters": {"nobody": 1.0}})
    assert [counted(line) for line in (ok, bad, unknown)] == [before[0] + 1, before[1] + 2, before[2] + 1]
    assert counted("slora_adapter_bytes") > 0 and counted("slora_queue_requests") == 0
    assert get(server, "openapi.json").json()["paths"].keys() >= {"/generate", "/health", "/adapters", "/metrics"}
    assert get(server, "nowhere").status_code == 404


def wait_until(what, seconds=20):
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def test_cancel_ends_a_request_at_its_next_step(server, batcher):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server, {"class": 0, "steps": 150, "id": "mine"})
        assert wait_until(lambda: batcher.running == 1)
        assert post(server, {"class": 0, "id": "mine"}).status_code == 422
        headers = {"X-API-Key": KEY}
        assert requests.delete(f"{server}/requests/mine", headers=headers, timeout=60).status_code == 200
        assert waiting.result().status_code == 499
    assert wait_until(lambda: batcher.running == 0)
    assert requests.delete(f"{server}/requests/mine", headers=headers, timeout=60).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server, batcher, stream):
    body = json.dumps({"class": 0, "steps": 150, "stream": stream}).encode()
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nX-API-Key: correct horse\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert wait_until(lambda: batcher.running == 1)
    started = time.monotonic()
    assert wait_until(lambda: batcher.running == 0)
    assert time.monotonic() - started < 2  # 150 steps take longer
    assert post(server, {"class": 0, "steps": 2}).status_code == 200


def test_a_deadline_is_answered_504_and_a_full_queue_429(shelf):
    batcher = new_batcher(shelf, wait=0, queue=1, batch=1)
    batcher.studio.pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.02))  # 150 steps take 3 s
    with listening(batcher) as server, ThreadPoolExecutor(4) as pool:
        running = pool.submit(post, server, {"class": 0, "steps": 150, "timeout": 1.0})
        assert wait_until(lambda: batcher.running == 1)
        queued = pool.submit(post, server, {"class": 0, "steps": 2, "timeout": 0.2})
        assert wait_until(lambda: batcher.waiting == 1)
        full = post(server, {"class": 0, "steps": 2})
        assert full.status_code == 429 and full.headers["retry-after"]
        assert queued.result().status_code == 504 and "0.2 seconds" in queued.result().json()["detail"]
        assert running.result().status_code == 504
        assert post(server, {"class": 0, "steps": 2}).status_code == 200


def test_an_end_of_the_server_first_answers_what_it_accepted(shelf):
    batcher = new_batcher(shelf, wait=0)
    with ThreadPoolExecutor(3) as pool:
        with listening(batcher) as server:
            answers = [pool.submit(post, server, {"class": 0, "steps": 20, "seed": i}) for i in range(3)]
            assert wait_until(lambda: batcher.running > 0 and batcher.running + batcher.waiting == 3)
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert not batcher.alive
