"""A file of requests on one process and on two: the same images, what is there is kept, what fails is told."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import slora_diffusers as sl
from slora_diffusers.recipes.generate_text_to_image import main as generate
from tests.serving import tiny_base, write_adapter
from tests.test_training_distributed import ENVIRONMENT, ROOT, TORCHRUN
from tests.tiny.pipelines import tiny_sd3_pipeline

SCRIPT = str(ROOT / "pipelines" / "generate_text_to_image.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of classes, two adapters, and a file of eight requests that use them."""
    folder, pipe = tmp_path_factory.mktemp("many"), tiny_base()
    pipe.save_pretrained(folder / "base")
    for i in range(2):
        write_adapter(pipe, folder / "adapters" / f"a{i}", seed=i)
    lines = [{"class": i % 3, "steps": 2 + i % 2, "adapters": {f"a{i % 2}": 0.5 + i / 10}} for i in range(8)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(folder, out, **more):
    options = {"base": folder / "base", "requests": folder / "requests.jsonl", "adapters": folder / "adapters"}
    options |= {"output": folder / out, **more}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def images(folder):
    return {p.name: np.asarray(Image.open(p), dtype=float) for p in sorted(folder.glob("*.png"))}


def test_every_line_becomes_its_image_and_what_is_there_is_not_drawn_again(folder):
    out = generate(command(folder, "one"))
    drawn = images(out)
    assert list(drawn) == [f"{number:05d}.png" for number in range(1, 9)]
    pipe = tiny_base()
    for i in range(2):
        pipe.load_serial_lora(folder / "adapters" / f"a{i}", f"a{i}")
    for number, line in enumerate((folder / "requests.jsonl").read_text().splitlines(), 1):
        request = json.loads(line)
        pipe.set_serial_lora(list(request["adapters"]), list(request["adapters"].values()))
        generator = torch.Generator().manual_seed(number)
        wanted = pipe([request["class"]], 4.0, generator, request["steps"]).images[0]
        assert np.abs(np.asarray(wanted, dtype=float) - drawn[f"{number:05d}.png"]).max() <= 1
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "00003.png").write_bytes(b"cut off")
    content = (folder / "adapters" / "a1" / "serial_lora_weights.safetensors").read_bytes()
    generate(command(folder, "one"))
    again = [path.name for path in sorted(before) if path.stat().st_mtime_ns != before[path]]
    assert again == ["00003.png"] and np.array_equal(images(out)["00003.png"], drawn["00003.png"])
    try:
        write_adapter(tiny_base(), folder / "adapters" / "a1", seed=5)
        generate(command(folder, "one"))
    finally:
        (folder / "adapters" / "a1" / "serial_lora_weights.safetensors").write_bytes(content)
    again = [path.name for path in sorted(before) if path.stat().st_mtime_ns != before[path]]
    assert again == ["00002.png", "00003.png", "00004.png", "00006.png", "00008.png"]  # a1's, besides the mended one


def test_what_cannot_be_drawn_is_told_after_all_others_are(folder, tmp_path):
    lines = [{"class": 0, "adapters": {"a0": 1}}, {"class": 0, "adapters": {"nobody": 1}}, {"class": 1, "steps": 2}]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(sl.SerialLoraError, match=r"1 of 3 .*line 2 .*'nobody'"):
        generate(command(folder, tmp_path / "out", requests=tmp_path / "requests.jsonl", steps=2))
    assert list(images(tmp_path / "out")) == ["00001.png", "00003.png"]


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", "Line 2"), ("[]", "JSON object"), ('{"class": 0, "steps": 0}', "steps"), ('{"class": 7777}', "class"),
     ('{"class": 0, "sampler": 1}', "sampler"), ('{"class": 0, "seed": 1e999}', "seed")],
)  # fmt: skip
def test_a_line_that_is_no_request_is_told_before_anything_is_drawn(folder, tmp_path, line, told):
    (tmp_path / "requests.jsonl").write_text('{"class": 0, "steps": 2}\n' + line)
    with pytest.raises(sl.SerialLoraError, match=told) as error:
        generate(command(folder, tmp_path / "out", requests=tmp_path / "requests.jsonl"))
    assert "Line 2" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_the_lines_and_the_prompts_and_draw_what_one_draws(folder, tmp_path):
    one = generate(command(folder, "single"))
    run = {"env": ENVIRONMENT, "cwd": ROOT, "timeout": 300, "capture_output": True, "text": True}
    two = subprocess.run([sys.executable, *TORCHRUN, SCRIPT, *command(folder, "two")], **run)
    assert two.returncode == 0, two.stderr[-3000:]
    ours, theirs = images(folder / "two"), images(one)
    assert ours.keys() == theirs.keys()
    assert all(np.abs(ours[name] - theirs[name]).max() <= 1 for name in ours)
    tiny_sd3_pipeline().save_pretrained(tmp_path / "sd3")
    prompts = ["--base", str(tmp_path / "sd3"), "--prompts", "a red fox", "a cat", "a dog", "--steps", "2"]
    prompts += ["--height", "32", "--width", "32"]
    both = subprocess.run([sys.executable, *TORCHRUN, SCRIPT, *prompts, "--output", str(tmp_path / "two.png")], **run)
    assert both.returncode == 0, both.stderr[-3000:]
    generate([*prompts, "--output", str(tmp_path / "one.png")])
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=float) for name in ("two", "one"))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
