"""A server's adapters: found by name in one folder, known by their bytes, dropped by least recent use."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slora_diffusers.serving.adapters import Catalogue
from slora_diffusers.serving.errors import NoRoom, RequestError
from slora_diffusers.serving.errors import UnknownAdapter as Unknown
from tests.serving import (
    drawn,
    nbytes,
    new_batcher,
    results,
    started,
    submitted,
    three_adapters,
    tiny_base,
    write_adapter,
)
from tests.tiny.pipelines import tiny_sd3_pipeline


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return three_adapters(tmp_path_factory.mktemp("adapters"))


def test_adapters_are_dropped_by_least_recent_use_and_loaded_again(shelf):
    sizes = [nbytes(shelf / f"a{i}") for i in range(3)]
    batcher = new_batcher(shelf, memory=sizes[1] + sizes[2], wait=0)
    with started(batcher):
        wanted = {}
        for name in ("a0", "a1", "a2", "a0", "a2"):
            latents = drawn(batcher, **{"class": 0}, seed=0, steps=2, adapters={name: 1.0})
            assert torch.allclose(wanted.setdefault(name, latents), latents, atol=1e-5)
            assert batcher.adapters.bytes <= sizes[1] + sizes[2]
    assert batcher.adapters.loads == 5 - 1  # a2 was still there the second time
    assert {a["name"]: a["loaded"] for a in batcher.adapters.listed()} == {"a0": True, "a1": False, "a2": True}


def test_a_batch_whose_adapters_do_not_fit_together_is_drawn_in_parts(shelf):
    size = nbytes(shelf / "a2")
    batcher = new_batcher(shelf, memory=size)
    jobs = [submitted(batcher, seed=i, adapters={f"a{i}": 1.0}) for i in (0, 2, 1)]
    with started(batcher):
        assert [done.batch for done in results(jobs)] == [1, 1, 1]
        assert batcher.adapters.bytes <= size


def test_an_adapter_larger_than_the_memory_is_refused_and_the_others_are_served(shelf):
    size = nbytes(shelf / "a0")
    batcher = new_batcher(shelf, memory=size)
    jobs = [submitted(batcher, seed=0, adapters={"a2": 1.0}), submitted(batcher, seed=1, adapters={"a0": 1.0})]
    with started(batcher):
        with pytest.raises(NoRoom, match="memory limit"):
            jobs[0].future.result(60)
        assert jobs[1].future.result(60).picture


def test_a_file_that_changes_is_another_adapter_even_with_the_old_size_and_time(tmp_path):
    pipe = tiny_base()
    path = write_adapter(pipe, tmp_path / "style", seed=1)
    stamp = path.stat()
    body = {"class": 2, "seed": 5, "steps": 2, "adapters": {"style": 1.0}}
    with started(new_batcher(tmp_path, wait=0)) as batcher:
        first = drawn(batcher, **body)
        shutil.copy(write_adapter(pipe, tmp_path / "other", seed=2), path)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert path.stat().st_size == stamp.st_size
        second = drawn(batcher, **body)
        assert (first - second).abs().max() > 1e-3
        assert torch.equal(second, drawn(batcher, **{**body, "adapters": {"other": 1.0}}))
        assert batcher.adapters.loads == 2  # two names of one content are one adapter
        path.unlink()
        path.parent.rmdir()
        with pytest.raises(Unknown, match="style"):
            drawn(batcher, **body)


NAMES_THAT_LEAD_OUT = (
    "../secret", "a0/../../secret", "/etc/passwd", "..", ".", "", "a0/", "//a0", "a0\x00", "link", "link_file",
    "~", "a0\\..\\secret", "a" * 300, "a0/serial_lora_weights", "./a0", "%2e%2e/secret",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES_THAT_LEAD_OUT)
def test_a_name_never_leads_out_of_the_folder(name, tmp_path):
    secret = write_adapter(tiny_base(), tmp_path / "secret", seed=9)
    folder = tmp_path / "adapters"
    write_adapter(tiny_base(), folder / "a0", seed=0)
    (folder / "link").symlink_to(secret.parent)
    (folder / "link_file.safetensors").symlink_to(secret)
    catalogue = Catalogue(folder)
    if name == "a0/serial_lora_weights":  # the same file by its own name
        assert catalogue.find(name) == catalogue.find("a0")
        return
    with pytest.raises(Unknown):
        catalogue.find(name)
    assert catalogue.names() == ["a0"]


def test_only_ids_of_the_allow_list_are_asked_of_the_hub(monkeypatch, tmp_path):
    from slora_diffusers.serving import adapters

    asked = []
    path = write_adapter(tiny_base(), tmp_path / "cache", seed=0)
    monkeypatch.setattr(adapters, "find_file", lambda source, **hub: asked.append((source, hub)) or path)
    catalogue = Catalogue(None, ["user/style@v2"])
    assert catalogue.names() == ["user/style@v2"]
    assert catalogue.find("user/style@v2") == catalogue.find("user/style@v2") == path
    for name in ("user/style", "user/other", "user/style@v1"):
        with pytest.raises(Unknown):
            catalogue.find(name)
    assert asked == [("user/style", {"revision": "v2"})]


def damage(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(os.urandom(len(content)))
    elif how == "nan":
        with safe_open(path, "pt") as file:
            header = file.metadata()
        save_file({key: tensor * float("nan") for key, tensor in load_file(path).items()}, path, header)
    elif how == "of another model":
        write_adapter(tiny_sd3_pipeline(), path.parent, seed=0)
    elif how == "of another width":
        os.remove(path)
        other = tiny_base()
        other.transformer = tiny_sd3_pipeline().transformer
        write_adapter(other, path.parent, seed=0)
    elif how == "unreadable":
        path.unlink()
        os.mkfifo(path)


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "nan", "of another model", "of another width", "unreadable"])
def test_a_damaged_adapter_refuses_its_own_request_alone(how, shelf, tmp_path):
    shutil.copytree(shelf / "a0", tmp_path / "good")
    damage(write_adapter(tiny_base(), tmp_path / "bad", seed=4), how)
    batcher = new_batcher(tmp_path)
    names = ["good"] if how == "unreadable" else ["good", "bad", None]
    if how == "unreadable":  # a pipe would keep its reader waiting for ever
        with pytest.raises(Unknown):
            submitted(batcher, adapters={"bad": 1.0})
    jobs = [submitted(batcher, seed=i, adapters={name: 1.0} if name else {}) for i, name in enumerate(names)]
    with started(batcher):
        for job, name in zip(jobs, names, strict=True):
            if name == "bad":
                with pytest.raises(RequestError, match="'bad'") as told:
                    job.future.result(60)
                assert str(tmp_path) not in str(told.value) and "/tmp/" not in str(told.value)
            else:
                assert job.future.result(60).picture
        write_adapter(tiny_base(), tmp_path / "bad", seed=4)  # mended
        assert drawn(batcher, **{"class": 0}, seed=0, steps=2, adapters={"good": 1.0}).isfinite().all()
