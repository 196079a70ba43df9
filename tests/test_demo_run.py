"""`run_demo` makes the sheet, the adapter and the metrics that it names."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from rich.console import Console

from slora_diffusers import SerialLoraError
from slora_diffusers.demo import adapt, run
from slora_diffusers.demo.glyphs import LETTERS
from slora_diffusers.demo.sheet import CELL, contact_sheet


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(run, "SERIAL", replace(run.SERIAL, steps=3, batch_size=4, variations=2))
    monkeypatch.setattr(run, "FULL", replace(run.FULL, steps=2, batch_size=4, variations=2))
    monkeypatch.setattr(run, "SEEDS", range(1))
    monkeypatch.setattr(adapt, "INFERENCE_STEPS", 2)


def test_demo_makes_what_it_says(tmp_path, short):
    console = Console(file=io.StringIO(), width=160)
    result = run.run_demo(tmp_path / "demo", console=console)
    printed = console.file.getvalue()
    for path in (result.sheet, result.adapter, result.metrics):
        assert path.exists() and str(path) in printed
    with Image.open(result.sheet) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 500

    metrics = json.loads(result.metrics.read_text())
    base, serial, fused, full = metrics["rows"]
    assert [row["method"] for row in metrics["rows"]] == [row.method for row in result.rows]
    assert serial["quality"]["denoising_loss"] == pytest.approx(fused["quality"]["denoising_loss"], rel=1e-3)
    assert metrics["largest_pixel_difference_live_fused"] < 1e-3
    assert base["trainable_parameters"] == 0 < serial["trainable_parameters"] < full["trainable_parameters"] / 10
    assert serial["file_bytes"] == (result.adapter / "serial_lora_weights.safetensors").stat().st_size
    assert full["file_bytes"] > 4 * full["trainable_parameters"]

    pipe = DiTPipeline.from_pretrained(adapt.BASE)
    report = pipe.load_serial_lora(result.adapter)
    assert report["transformer"].parameters == serial["trainable_parameters"]


def test_unknown_style_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(SerialLoraError, match=r"calligraphic, .*script.*'comic'"):
        run.run_demo(tmp_path / "demo", style="comic")
    assert not (tmp_path / "demo").exists()


def test_sheet_shows_every_row_and_letter_where_it_belongs(tmp_path):
    images = torch.zeros(26, 32, 32)
    images[LETTERS.index("C")] = 1
    path = contact_sheet(tmp_path / "new" / "sheet.png", "Title", {"one": "AC", "two": "B"}, {"row": images}, ["text"])
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    cells = {name: pixels[y : y + CELL, x : x + CELL] for name, (x, y) in {
        "A": (270, 100), "C": (340, 100), "B": (270, 224),
    }.items()}  # fmt: skip
    assert cells["A"].max() == 0 and cells["B"].max() == 0 and cells["C"].min() == 255
