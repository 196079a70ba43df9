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
from slora_diffusers.demo import adapt, generation, methods, run
from slora_diffusers.demo.glyphs import NEW_STYLES
from slora_diffusers.demo.sheet import BAD, CELL, GOOD, Cell, contact_sheet


@pytest.fixture
def short(monkeypatch):
    for name, method in methods.METHODS.items():
        setting = replace(method.setting, steps=3, batch_size=4, variations=2)
        monkeypatch.setitem(methods.METHODS, name, replace(method, setting=setting))
    monkeypatch.setattr(generation, "SEEDS", range(1))
    monkeypatch.setattr(adapt, "INFERENCE_STEPS", 2)


def test_demo_makes_what_it_says(tmp_path, short):
    console = Console(file=io.StringIO(), width=160)
    result = run.run_demo(tmp_path / "demo", console=console, part="generation")
    printed = console.file.getvalue()
    assert "Drawing with the base ..." in printed.splitlines()  # no terminal, so a line as each task begins
    assert any(line.startswith("Serial LoRA (loss ") and line.endswith("): 3/3") for line in printed.splitlines())
    assert list(result.files) == ["contact sheet", "adapter", "metrics"] and result.vision is None
    for path in result.files.values():
        assert path.exists() and str(path) in printed
    made = result.generation
    with Image.open(made.sheet) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 500

    metrics = json.loads(result.metrics.read_text())
    base, serial, fused, lora, full = metrics["rows"]
    assert [row["method"] for row in metrics["rows"]] == [row.method for row in made.rows]
    assert serial["quality"]["denoising_loss"] == pytest.approx(fused["quality"]["denoising_loss"], rel=1e-3)
    assert metrics["largest_pixel_difference_live_fused"] < 1e-3
    assert base["trainable_parameters"] == 0 < serial["trainable_parameters"] < full["trainable_parameters"] / 10
    assert lora["trainable_parameters"] == serial["trainable_parameters"]
    assert serial["file_bytes"] == (made.adapter / "serial_lora_weights.safetensors").stat().st_size
    assert full["file_bytes"] > 4 * full["trainable_parameters"]

    pipe = DiTPipeline.from_pretrained(adapt.BASE)
    report = pipe.load_serial_lora(made.adapter)
    assert report["transformer"].parameters == serial["trainable_parameters"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"style": "comic"}, r"calligraphic, .*script.*'comic'"), ({"part": "half"}, r"all, generation, vision.*'half'")],
)
def test_unknown_style_or_part_is_refused_before_anything_is_made(tmp_path, wrong, message):
    with pytest.raises(SerialLoraError, match=message):
        run.run_demo(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


def test_sheet_shows_every_picture_and_caption_where_it_belongs(tmp_path):
    white, black, red = torch.ones(32, 32), torch.zeros(32, 32), torch.zeros(3, 32, 32)
    red[0] = 1
    groups = {
        "one": {"captions": [Cell(black, "A"), Cell(white, "B", right=False)], "none": [Cell(red)]},
        "two": {"row": [Cell(white)]},
    }
    path = contact_sheet(tmp_path / "new" / "sheet.png", "Title", groups, ["text"])
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)

    def cell(x, y):
        return {tuple(map(int, colour)) for colour in pixels[y : y + CELL, x : x + CELL].reshape(-1, 3)}

    assert cell(270, 100) == {(0, 0, 0)} and cell(340, 100) == {(255, 255, 255)}
    assert cell(270, 188) == {(255, 0, 0)}  # 18 lower than without captions
    assert cell(270, 188 + 70 + 14 + 40) == {(255, 255, 255)}
    below = pixels[164:184]
    assert (below[:, 270:334] == GOOD).all(-1).any() and (below[:, 340:404] == BAD).all(-1).any()
    assert not (below[:, 270:334] == BAD).all(-1).any()


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_trains_what_it_saves_and_starts_at_the_base(name, short, tmp_path):
    tuning = methods.fine_tuning(adapt.load_base(), name, seed=0, steps=3, learning_rate=1e-2)
    face, seen = NEW_STYLES["script"], []
    reference = adapt.denoising_loss(adapt.load_base(), face, "A", times=2)
    tuning.pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    losses = list(tuning.run(face))
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert len(seen) == 3 + 2 * methods.BATCHES * tuning.method.gradient_start  # two passes find the start
    assert adapt.denoising_loss(tuning.pipe, face, "A", times=2) != reference
    count = sum(p.numel() for p in tuning.parameters)
    assert 4 * count <= tuning.size() <= 4 * count + 32_000  # fp32 and a header
