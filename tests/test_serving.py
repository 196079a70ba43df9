"""Requests that share a batch: each image is the one drawn alone, whatever the adapters, files and faults beside it."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import slora_diffusers as sl
from slora_diffusers.serving.errors import Busy, Cancelled, Closing, Failed, NotFound, RequestError, TimedOut
from slora_diffusers.serving.requests import Body, Request
from slora_diffusers.serving.studio import Guidance, Studio
from tests.serving import drawn, new_batcher, results, started, submitted, three_adapters, tiny_base, write_adapter
from tests.tiny.pipelines import tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline

PIPELINES = {
    "DiT": tiny_base,
    "SD3": tiny_sd3_pipeline,
    "PixArt": lambda: tiny_pixart_pipeline("sigma"),
    "Flux": tiny_flux_pipeline,
}
PROMPTS = ("a red fox", "a photo of a dog on the beach", "0123456789")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return three_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("name", PIPELINES)
def test_an_image_of_a_mixed_batch_is_the_one_that_the_stock_pipeline_gives_alone(name, tmp_path):
    pipe, stock = PIPELINES[name](), PIPELINES[name]()
    for i in range(2):
        write_adapter(pipe, tmp_path / f"a{i}", seed=i, rank=2 + i)
        stock.load_serial_lora(tmp_path / f"a{i}", f"a{i}")
    batcher = new_batcher(tmp_path, pipe=pipe)
    assert batcher.studio.joins
    assert batcher.studio.mixes_guidance == (name != "Flux")  # Flux embeds one scale for all
    scales = (3.0, 2.0, 4.5) if batcher.studio.mixes_guidance else (3.0,) * 3
    subjects = [{"class": i} for i in range(3)] if name == "DiT" else [{"prompt": p, "size": 32} for p in PROMPTS]
    chosen = ({"a0": 1.0, "a1": -0.4}, {"a1": 0.7}, {})
    bodies = [
        {**subject, "seed": i, "steps": 3, "guidance": g, "adapters": adapters}
        for i, (subject, g, adapters) in enumerate(zip(subjects, scales, chosen, strict=True))
    ]
    jobs = [submitted(batcher, **{"class": None, **body}) for body in bodies]
    with started(batcher):
        together = results(jobs)
        alone = [drawn(batcher, **body) for body in bodies]
    assert [done.batch for done in together] == [3, 3, 3]
    for job, done, latents, adapters in zip(jobs, together, alone, chosen, strict=True):
        scale = max(1.0, latents.abs().max().item())  # an untrained PixArt's latents reach some hundreds
        assert torch.allclose(done.picture.latents, latents, atol=1e-4 * scale)
        stock.set_serial_lora(list(adapters), list(adapters.values()))
        wanted = stock_image(stock, job.request)
        assert np.abs(wanted - np.asarray(done.picture.image, dtype=float)).max() <= 1
    distinct = [done.picture.latents for done in together]
    assert all((x - y).abs().max() > 0.1 for x, y in itertools.pairwise(distinct))


def stock_image(pipe, request: Request):
    """The pixels that the pipeline itself gives."""
    subject = "class_labels" if isinstance(request.condition, int) else "prompt"
    arguments = {subject: [request.condition], "num_inference_steps": request.steps, "guidance_scale": request.guidance}
    if request.size:
        arguments["height"], arguments["width"] = request.size
    if "PixArt" in type(pipe).__name__:
        arguments["use_resolution_binning"] = False
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(**arguments, generator=torch.Generator().manual_seed(request.seed)).images[0], dtype=float)


def test_an_adapter_has_an_effect_and_the_base_stays_the_base(shelf):
    with started(new_batcher(shelf, wait=0)) as batcher:
        base = drawn(batcher, **{"class": 1}, seed=3, steps=3)
        adapted = drawn(batcher, **{"class": 1}, seed=3, steps=3, adapters={"a0": 1.0})
        assert (base - adapted).abs().max() > 0.01
        assert torch.equal(drawn(batcher, **{"class": 1}, seed=3, steps=3), base)
        assert torch.equal(drawn(batcher, **{"class": 1}, seed=3, steps=3, adapters={"a0": 0.0}), base)


def test_where_a_scheduler_draws_noise_for_the_whole_batch_requests_are_drawn_one_by_one(shelf, caplog):
    pipe = tiny_base()
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    batcher = new_batcher(shelf, pipe=pipe)
    assert not batcher.studio.joins and "drawn by itself" in caplog.text
    jobs = [submitted(batcher, seed=i % 2) for i in range(4)]
    with started(batcher):
        first, second, again, also = results(jobs)
    assert {done.batch for done in (first, second)} == {1}
    assert torch.equal(first.picture.latents, again.picture.latents)
    assert torch.equal(second.picture.latents, also.picture.latents)


@pytest.mark.parametrize("other", [{"steps": 4}, {"guidance": 1.0}])
def test_requests_of_another_schedule_do_not_share_a_batch(shelf, other):
    batcher = new_batcher(shelf)
    jobs = [submitted(batcher, seed=0), submitted(batcher, seed=1, **other), submitted(batcher, seed=2)]
    with started(batcher):
        assert [done.batch for done in results(jobs)] == [2, 1, 2]


def test_a_size_of_its_own_makes_a_batch_of_its_own():
    batcher = new_batcher(None, pipe=tiny_sd3_pipeline())
    jobs = [submitted(batcher, **{"class": None}, prompt="a cat", size=size) for size in (32, [32, 48], 32)]
    with started(batcher):
        done = results(jobs)
    assert [d.batch for d in done] == [2, 1, 2]
    assert [d.picture.image.size for d in done] == [(32, 32), (48, 32), (32, 32)]


def test_guidance_of_its_own_for_every_sample_is_a_number_and_a_column():
    scale = Guidance([2.0, 5.0])
    assert scale > 1 and scale == 5.0
    assert torch.equal(scale * torch.ones(2, 1, 2), torch.tensor([[[2.0, 2.0]], [[5.0, 5.0]]]))
    assert scale * 2 == 10.0


def test_an_image_that_is_not_finite_is_an_error_for_its_request_alone(tmp_path):
    write_adapter(tiny_base(), tmp_path / "wild", seed=0, std=1e18)
    batcher = new_batcher(tmp_path)
    jobs = [submitted(batcher, adapters={"wild": 1.0}), submitted(batcher, seed=1)]
    with started(batcher):
        with pytest.raises(RequestError, match="not finite"):
            jobs[0].future.result(60)
        assert jobs[1].future.result(60).picture.latents.isfinite().all()


def test_a_decoder_that_overflows_is_an_error_and_no_black_image(shelf):
    batcher = new_batcher(shelf)
    with torch.no_grad():
        batcher.studio.pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    job = submitted(batcher)
    with started(batcher), pytest.raises(RequestError, match="VAE"):
        job.future.result(60)


def test_a_request_that_breaks_its_batch_takes_no_other_along(shelf, monkeypatch):
    batcher = new_batcher(shelf)
    draw = batcher.studio.draw

    def breaking(requests, entries, on_step):
        if any(request.seed == 13 for request in requests):
            raise RuntimeError("out of memory, on purpose")
        return draw(requests, entries, on_step)

    monkeypatch.setattr(batcher.studio, "draw", breaking)
    jobs = [submitted(batcher, seed=seed) for seed in (1, 13, 2)]
    with started(batcher):
        with pytest.raises(Failed, match="on purpose"):
            jobs[1].future.result(60)
        assert [jobs[i].future.result(60).batch for i in (0, 2)] == [1, 1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_drawing_thread_that_dies_is_replaced_and_nothing_is_lost(shelf, monkeypatch):
    batcher = new_batcher(shelf)
    draw, deaths = batcher.studio.draw, []

    def dying(requests, entries, on_step):
        def step(done, steps):
            if len(deaths) < 2 and done == 2:
                deaths.append(threading.current_thread())
                raise SystemExit  # ends the thread, as a kill of it would, in the middle of a batch
            on_step(done, steps)

        return draw(requests, entries, step)

    monkeypatch.setattr(batcher.studio, "draw", dying)
    bodies = [{"seed": i, "adapters": {f"a{i % 3}": 1.0}} for i in range(5)]
    jobs = [submitted(batcher, **body) for body in bodies]
    with started(batcher):
        pictures = [done.picture.latents for done in results(jobs)]
        assert len(set(deaths)) == 2 and batcher.alive
        for body, latents in zip(bodies, pictures, strict=True):
            assert torch.allclose(drawn(batcher, **{"class": 0}, steps=3, **body), latents, atol=1e-4)


def test_a_full_queue_refuses_and_a_closed_server_too(shelf):
    batcher = new_batcher(shelf, queue=2)
    jobs = [submitted(batcher, seed=i) for i in range(2)]
    with pytest.raises(Busy, match="2 requests"):
        submitted(batcher)
    jobs[0].cancel()
    jobs.append(submitted(batcher, seed=2))  # its place is free again
    batcher.start()
    batcher.close()  # draws what it has accepted
    assert [job.future.done() for job in jobs] == [True] * 3
    assert jobs[1].future.result().picture and jobs[2].future.result().picture
    with pytest.raises(Closing):
        submitted(batcher)


def test_requests_end_at_their_deadline_or_when_cancelled_and_a_batch_for_nobody_stops(shelf, monkeypatch):
    batcher = new_batcher(shelf, timeout=30)
    late = batcher.submit(batcher.studio.request(Body.model_validate({"class": 0})), timeout=0.01)
    time.sleep(0.02)
    seen = []
    job = batcher.submit(
        batcher.studio.request(Body.model_validate({"class": 0, "steps": 150})),
        on_event=lambda event: (seen.append(event), event.get("step") == 3 and batcher.cancel("mine")),
        name="mine",
    )
    with pytest.raises(RequestError, match="'mine'"):
        batcher.submit(job.request, name="mine")
    with started(batcher):
        with pytest.raises(TimedOut):
            late.future.result(60)
        with pytest.raises(Cancelled):
            job.future.result(60)
        assert drawn(batcher, **{"class": 0}, steps=2).isfinite().all()
    assert [event.get("step") for event in seen] == [None, 1, 2, 3]  # of 150
    with pytest.raises(NotFound):
        batcher.cancel("mine")


def test_one_that_leaves_a_batch_does_not_end_it_for_the_others(shelf):
    batcher = new_batcher(shelf)
    leaving = batcher.submit(
        batcher.studio.request(Body.model_validate({"class": 0, "seed": 1, "steps": 5})),
        on_event=lambda event: event.get("step") == 2 and leaving.cancel(),
    )
    staying = submitted(batcher, seed=2, steps=5)
    with started(batcher):
        assert staying.future.result(60).batch == 2
        with pytest.raises(Cancelled):
            leaving.future.result(60)
        alone = drawn(batcher, **{"class": 0}, seed=2, steps=5)
        assert torch.allclose(alone, staying.future.result().picture.latents, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"class": 99}, "class"),
        ({"class": "cow"}, "class"),
        ({"prompt": "a cat"}, "classes"),
        ({}, "classes"),
        ({"class": 0, "prompt": "a cat"}, "classes"),
        ({"class": 0, "steps": 151}, "steps"),
        ({"class": 0, "size": 64}, "size"),
        ({"class": 0, "size": [32]}, "size"),
        ({"class": 0, "negative_prompt": "dogs"}, "negative_prompt"),
        ({"class": 0, "adapters": {f"n{i}": 1.0 for i in range(9)}}, "adapters"),
    ],
)
def test_what_the_base_cannot_draw_is_said_in_one_sentence(body, told):
    with pytest.raises(RequestError, match=told) as error:
        Studio(tiny_base()).request(Body.model_validate(body))
    assert "\n" not in str(error.value)


def test_a_pipeline_that_needs_more_than_a_prompt_is_refused():
    class NeedsImage:
        def __call__(self, prompt, image):
            pass

    with pytest.raises(sl.SerialLoraError, match="image"):
        Studio(NeedsImage())


def test_a_request_gets_defaults_and_a_seed_of_its_own():
    studio = Studio(tiny_base())
    first, second = (studio.request(Body.model_validate({"class": "dog"})) for _ in range(2))
    assert (first.condition, first.steps, first.guidance) == (1, 50, 4.0)
    assert first.seed != second.seed
