"""A server under load and faults: 1,000 requests, 64 adapters, broken files, clients that leave, dead threads, Ray."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load_file

from slora_diffusers.serving.adapters import Adapters, Catalogue
from slora_diffusers.serving.batcher import Batcher, Policy
from slora_diffusers.serving.errors import RequestError
from slora_diffusers.serving.requests import Body
from slora_diffusers.serving.studio import Studio
from tests.serving import listening, tiny_base, write_adapter

ADAPTERS, REQUESTS, KINDS = 64, 1000, 160
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("adapters"), tiny_base()
    for i in range(ADAPTERS):
        write_adapter(pipe, folder / f"a{i}", seed=i, rank=1 + i % 8)
    return folder


def bodies():
    """Different requests, each with its own adapter, seed, class and guidance."""
    return [
        {"class": i % 3, "seed": i, "steps": 2, "guidance": 2.0 + i % 5, "adapters": {f"a{i % ADAPTERS}": 1.0}}
        for i in range(KINDS)
    ]


def rehearsed(folder, memory, **policy):
    pipe = tiny_base()
    studio = Studio(pipe)
    studio.rehearse()
    return Batcher(studio, Adapters(pipe, Catalogue(folder), memory), Policy(**policy))


@pytest.mark.slow
def test_a_thousand_requests_of_64_adapters_with_faults_lose_nothing_mix_nothing_and_keep_memory_flat(
    shelf, monkeypatch
):
    """The room is for a quarter of the adapters, so that they come and go all the time."""
    (shelf / "broken.safetensors").write_bytes(b"nothing of the kind")
    room = sum(t.nbytes for i in range(16) for t in load_file(next((shelf / f"a{i}").glob("*"))).values())
    alone = rehearsed(shelf, 1 << 30, batch=1, wait=0)
    alone.start()
    wanted = [submit(alone, body).future.result(60).picture.latents for body in bodies()]
    alone.close()

    batcher = rehearsed(shelf, room, wait=0.01, queue=REQUESTS)
    draw, begun = batcher.studio.draw, []

    def dying(drawn, entries, on_step):
        begun.append(len(drawn))
        if len(begun) % 40 == 7:
            raise SystemExit  # the thread ends with a batch in its hands
        return draw(drawn, entries, on_step)

    monkeypatch.setattr(batcher.studio, "draw", dying)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    batcher.start()
    rng = random.Random(0)
    process, resident, wrong, served, refused, left = psutil.Process(), [], [], 0, 0, 0
    for _ in range(10):
        jobs = []
        for _ in range(REQUESTS // 10):
            i = rng.randrange(KINDS)
            jobs.append((i, submit(batcher, bodies()[i])))
            if rng.random() < 0.05:
                jobs.append((None, submit(batcher, {**bodies()[i], "adapters": {"broken": 1.0}})))
            if rng.random() < 0.05:
                leaving = submit(batcher, bodies()[i])
                leaving.cancel()
                left += 1
        for i, job in jobs:
            if i is None:
                with pytest.raises(RequestError, match="broken"):
                    job.future.result(120)
                refused += 1
            else:
                latents = job.future.result(120).picture.latents
                wrong += [i] if (latents - wanted[i]).abs().max() > 1e-4 * max(1, wanted[i].abs().max()) else []
                served += 1
        assert batcher.adapters.bytes <= room
        resident.append(process.memory_info().rss)
    batcher.close()
    assert (wrong, served) == ([], REQUESTS)
    assert refused > 20 and left > 20 and sum(size > 1 for size in begun) > 50
    assert batcher.adapters.drops > 100  # adapters came and went
    assert resident[-1] - resident[2] < 64 << 20, [r >> 20 for r in resident]


def submit(batcher, body):
    return batcher.submit(batcher.studio.request(Body.model_validate(body)))


@pytest.mark.slow
def test_requests_over_http_while_files_change_get_a_version_that_was_there(tmp_path):
    """A file is replaced again and again; every image is one of its versions', none a mixture."""
    pipe, versions = tiny_base(), []
    for seed in range(4):
        versions.append(write_adapter(pipe, tmp_path / f"version{seed}", seed=seed).read_bytes())
    shelf = tmp_path / "shelf"
    path = write_adapter(pipe, shelf / "style", seed=0)
    batcher = rehearsed(shelf, 1 << 30, wait=0.005, queue=512)
    body = {"class": 1, "seed": 3, "steps": 2, "adapters": {"style": 1.0}}

    def image(server):
        answer = requests.post(f"{server}/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return np.asarray(Image.open(io.BytesIO(answer.content)), dtype=float)

    with listening(batcher) as server:
        known = []
        for content in versions:
            replace(path, content)
            known.append(image(server))
        assert min(np.abs(x - y).max() for i, x in enumerate(known) for y in known[:i]) > 2
        stop = threading.Event()

        def change():
            while not stop.is_set():
                replace(path, random.choice(versions))
                time.sleep(0.002)

        writer = threading.Thread(target=change)
        writer.start()
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(lambda _: image(server), range(100)))
        stop.set()
        writer.join()
    distances = [min(np.abs(x - y).max() for y in known) for x in images]
    assert max(distances) <= 1


def replace(path, content):
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own future
def test_two_replicas_of_ray_serve_share_the_work_and_outlive_a_killed_one(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray import serve

    from slora_diffusers.demo.adapt import load_base
    from slora_diffusers.serving.serve_app import build

    pipe = load_base()
    for i in range(3):
        write_adapter(pipe, tmp_path / f"a{i}", seed=i, std=0.1)
    monkeypatch.setenv("SLORA_API_KEY", "secret")
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        port = free_port()
        serve.start(http_options={"port": port})
        serve.run(build({"adapters": str(tmp_path), "min_replicas": "2", "max_replicas": "2"}))

        def ask(i, **more):
            body = {"class": i % 26, "seed": i, "steps": 4, "adapters": {f"a{i % 3}": 1.0}, **more}
            return requests.post(
                f"http://127.0.0.1:{port}/", json=body, headers={"Authorization": "Bearer secret"}, timeout=120
            )

        first = [ask(i) for i in range(6)]
        assert [answer.status_code for answer in first] == [200] * 6
        assert ask(0, adapters={"nobody": 1.0}).status_code == 404
        assert ask(0, steps=0).status_code == 422
        assert requests.post(f"http://127.0.0.1:{port}/", json={"class": 0}, timeout=60).status_code == 401
        drawers = [
            p for p in psutil.process_iter(["cmdline"]) if "ServeReplica:default:Drawer" in " ".join(p.cmdline())
        ]
        assert len(drawers) == 2
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, i % 6) for i in range(48)]
            time.sleep(0.5)
            os.kill(drawers[0].pid, signal.SIGKILL)
            answers = [answer.result() for answer in answers]
        assert [answer.status_code for answer in answers] == [200] * 48
        for i, answer in enumerate(answers):
            assert np.abs(pixels(answer) - pixels(first[i % 6])).max() <= 2
        assert max(answer.json()["batch"] for answer in answers) > 1
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_the_pages_commands_run_and_an_end_of_the_process_first_answers(tmp_path):
    """`slora serve` as docs/serving.md has it, in a process of its own."""
    from slora_diffusers.demo.adapt import load_base

    write_adapter(load_base(), tmp_path / "adapter", seed=0, std=0.1)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^slora serve --adapters outputs/demo --port 8000$", page, re.MULTILINE)
    address = f"http://127.0.0.1:{(port := free_port())}"
    words = line.replace("outputs/demo", str(tmp_path)).replace("8000", str(port)).split()[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-m", "slora_diffusers.cli", *words], env=environment, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not answers(address) and time.monotonic() < deadline:
            time.sleep(0.2)
        bodies = [json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", page)]
        assert len(bodies) == 2
        drawn, streamed = (requests.post(f"{address}/generate", json=body, timeout=120) for body in bodies)
        assert drawn.status_code == 200 and drawn.content.startswith(b"\x89PNG")
        assert "event: result" in streamed.text
        with ThreadPoolExecutor(4) as pool:
            late = [
                pool.submit(requests.post, f"{address}/generate", json={**bodies[0], "seed": i}, timeout=120)
                for i in range(4)
            ]
            while requests.get(f"{address}/health", timeout=60).json()["running"] == 0:
                time.sleep(0.005)
            server.terminate()
            assert [answer.result().status_code for answer in late] == [200] * 4
        assert server.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends as it was told to, once all is answered
    finally:
        server.kill()


def answers(address):
    try:
        return requests.get(f"{address}/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pixels(answer):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["image"]))), dtype=float)


def test_the_reference_is_of_different_images(shelf):
    """Else the tests above could not see a mixture."""
    batcher = rehearsed(shelf, 1 << 30, wait=0.05)
    jobs = [submit(batcher, body) for body in bodies()[:8]]
    batcher.start()
    latents = [job.future.result(60).picture.latents for job in jobs]
    batcher.close()
    assert min((x - y).abs().max().item() for i, x in enumerate(latents) for y in latents[:i]) > 0.1
    assert all(torch.isfinite(x).all() for x in latents)
