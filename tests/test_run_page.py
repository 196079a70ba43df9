"""The page of a run: what metrics.jsonl, the pictures, the settings and the saved adapters hold, in one file."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from slora_diffusers.recipes import dit as train_dit
from slora_diffusers.training import charts, page
from slora_diffusers.training.charts import bar_chart, line_chart, smoothed, thinned
from slora_diffusers.training.page import Page
from tests.tiny_runs import glyph_run
from tests.vision_recipes import classify, segment

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
WEIGHTS = "serial_lora_weights.safetensors"
VALIDATED = ["--validation_steps", "2", "--validation_inference_steps", "1", "--num_validation_images", "1"]


class Parsed(HTMLParser):
    """Tags and attributes, captions and the cells of tables of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.captions, self.cells, self._in = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag in ("figcaption", "th", "td"):
            (self.captions if tag == "figcaption" else self.cells).append("")

    def handle_data(self, data):
        if self._in == "figcaption":
            self.captions[-1] += data
        elif self._in in ("th", "td"):
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self._in = None

    def settings(self):
        return dict(zip(self.cells[::2], self.cells[1::2], strict=False))

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(folder):
    return Parsed((folder / "index.html").read_text(encoding="utf-8"))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder, name):
    return [(line["step"], line[name]) for line in metrics(folder) if name in line]


def caption(parsed, start):
    (found,) = [text for text in parsed.captions if text.startswith(start)]
    return found


def test_a_diffusion_runs_page_tells_what_its_files_hold(dit_base, tmp_path):
    flags = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--lr_scheduler", "linear", *VALIDATED]
    argv = [*glyph_run(dit_base, tmp_path), *flags, "--validation_labels", "0"]
    train_dit.main(argv)
    parsed = read(tmp_path)
    for title, name, unit in (
        ("Loss: ", "loss", 1),
        ("Validation loss: ", "validation_loss", 1),
        ("Learning rate: ", "lr", 1),
        ("Peak memory, GiB: ", "memory", 2**30),
    ):
        values = [value / unit for _, value in series(tmp_path, name)]
        assert caption(parsed, title) == f"{title}{values[-1]:.4g} (from {min(values):.4g} to {max(values):.4g})"
    assert [text for text in parsed.captions if text.startswith("step ")] == ["step 0", "step 2", "step 4"]
    for image, step in zip(parsed.of("img"), (0, 2, 4), strict=True):
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        with (
            Image.open(io.BytesIO(base64.b64decode(data))) as inside,
            Image.open(tmp_path / "validation" / f"images-{step:06d}.png") as own,
        ):
            assert inside.convert("RGB").tobytes() == own.convert("RGB").tobytes()
    assert parsed.settings()["rank"] == parsed.settings()["max_train_steps"] == "4"
    assert "4 in all" in parsed.settings()["steps"]
    assert "ended at step 4 of 4" in (tmp_path / "index.html").read_text()
    assert norms_of(tmp_path) == pytest.approx(by_hand(tmp_path / WEIGHTS), rel=1e-3)


def norms_of(folder):
    """{block: norm} of the bars of a page."""
    titles = re.findall(r"<title>(\S+), hidden_states: ([^<]+)</title>", (folder / "index.html").read_text())
    return {block: float(value) for block, value in titles}


def by_hand(path):
    """||s B A|| of every block, with s = 1, in float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    names = {key.rpartition(".lora_")[0] for key in tensors}
    products = {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}
    return {re.search(r"\.(\d+)\.", n)[1]: torch.linalg.norm(product).item() for n, product in products.items()}


def test_the_page_asks_for_nothing_else_and_follows_light_and_dark(dit_base, tmp_path):
    train_dit.main([*glyph_run(dit_base, tmp_path), "--max_train_steps", "1", "--checkpointing_steps", "0"])
    text, parsed = (tmp_path / "index.html").read_text(), read(tmp_path)
    assert not parsed.of("script") and not parsed.of("link") and "http:" not in text and "https:" not in text
    assert "url(" not in text and "@import" not in text
    assert all(attrs["src"].startswith("data:") for attrs in parsed.of("img"))
    assert "prefers-color-scheme: dark" in text


def test_a_vision_runs_page_has_its_scores(vit_base, stripes, tmp_path):
    classify(vit_base, stripes, tmp_path, "--max_train_steps", "3", "--validation_steps", "1")
    parsed, scores = read(tmp_path), [value for _, value in series(tmp_path, "top1")]
    assert len(scores) == 4
    assert caption(parsed, "Top1: ") == f"Top1: {scores[-1]:.4g} (from {min(scores):.4g} to {max(scores):.4g})"
    assert any(text.startswith("By block, at step 3") for text in parsed.captions)
    assert [attrs["alt"] for attrs in parsed.of("img")] == [f"predictions at step {step}" for step in range(4)]
    with Image.open(tmp_path / "validation" / "predictions-000003.png") as picture:
        assert picture.size == (4 * 160, 180)  # two to a class are held out: four in a row, each with its caption


def test_a_segmentation_runs_page_shows_images_masks_and_predictions(vit_base, scenes, tmp_path):
    flags = ["--max_train_steps", "2", "--validation_steps", "1", "--validation_data_dir", str(scenes)]
    segment(vit_base, scenes, tmp_path, *flags)
    assert [attrs["alt"] for attrs in read(tmp_path).of("img")] == [f"predictions at step {step}" for step in range(3)]
    with Image.open(tmp_path / "validation" / "predictions-000002.png") as whole:
        picture = np.asarray(whole).astype(int)
    height = picture.shape[0] // 4  # of four images, those that are evenly spread by name, with a legend each
    assert height > 240 and picture.shape[1] == 3 * 240
    for row, name in enumerate(["0", "11", "4", "7"]):
        with Image.open(scenes / "masks" / f"{name}.png") as image:
            mask = np.asarray(image.resize((240, 240), Image.Resampling.NEAREST)) > 0
        image, truth = (picture[row * height : row * height + 240, 240 * i : 240 * i + 240] for i in (0, 1))
        assert ((image != truth).any(-1) == mask).mean() > 0.99


def test_a_loras_norms_are_shown_too(vit_base, stripes, tmp_path):
    classify(vit_base, stripes, tmp_path, "--max_train_steps", "2", "--adapter", "lora")
    assert any(text.startswith("By block, at step 2") for text in read(tmp_path).captions)
    file = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    total = sum(
        torch.linalg.matrix_norm(file[key.replace("lora_A", "lora_B")].double() @ A.double()).square().item()
        for key, A in file.items()
        if "lora_A" in key
    )
    (title,) = re.findall(r"<title>step 2: ([^<]+)</title>", (tmp_path / "index.html").read_text())[-1:]
    assert float(title) == pytest.approx(total**0.5, rel=1e-3)


def test_a_resumed_run_continues_the_curves_and_leaves_out_what_it_abandoned(dit_base, tmp_path):
    argv = [*glyph_run(dit_base, tmp_path), *VALIDATED, "--validation_labels", "0", "--lr_scheduler", "constant"]
    argv += ["--checkpointing_steps", "2"]
    train_dit.main([*argv, "--max_train_steps", "6"])
    train_dit.main([*argv, "--max_train_steps", "8", "--resume_from_checkpoint", "checkpoint-4"])
    text, parsed = (tmp_path / "index.html").read_text(), read(tmp_path)
    assert [step for step, _ in series(tmp_path, "loss")] == list(range(1, 9))
    chart = text[text.index('aria-label="Loss"') :].partition("</svg>")[0]
    assert re.findall(r"<title>step (\d+):", chart) == [str(step) for step in range(1, 9)]
    assert [t for t in parsed.captions if t.startswith("step ")] == ["step 0", "step 2", "step 4", "step 6", "step 8"]
    norms = text[text.index('aria-label="norm of the adapter"') :].partition("</svg>")[0]
    assert re.findall(r"<title>step (\d+):", norms) == ["2", "4", "6", "8"]


def test_the_page_is_written_while_it_trains(dit_base, tmp_path, monkeypatch):
    seen = []
    write = Page.write

    def watch(self, ended=False):
        path = write(self, ended)
        text = path.read_text()
        seen.append((re.search(r"at step (\d+) of 3", text)[1], ended, 'http-equiv="refresh"' in text))
        self._next = 0.0
        return path

    monkeypatch.setattr(Page, "write", watch)
    train_dit.main([*glyph_run(dit_base, tmp_path), "--max_train_steps", "3", "--checkpointing_steps", "0"])
    assert seen == [("1", False, True), ("2", False, True), ("3", False, True), ("3", True, False)]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_page_that_cannot_be_written_is_one_warning_and_the_run_goes_on(dit_base, tmp_path, caplog):
    (tmp_path / "index.html").mkdir(parents=True)
    argv = [*glyph_run(dit_base, tmp_path), "--max_train_steps", "3", "--checkpointing_steps", "0"]
    assert train_dit.main(argv).is_file()
    assert len(series(tmp_path, "loss")) == 3
    assert sum("index.html failed" in record.getMessage() for record in caplog.records) == 1


def test_a_slow_page_waits_a_hundred_times_as_long_as_it_took(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(page.time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 2.0
        return {}

    made = Page(tmp_path, slow)
    made.refresh()
    assert now[0] == 102
    now[0] = 301.9
    made.refresh()
    assert now[0] == 301.9
    now[0] = 302
    made.refresh()
    assert now[0] == 304


def test_everything_that_is_shown_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>'
    folder = tmp_path / "<b>run & co"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"instance_prompt": evil, f"x{evil}": [evil]}))
    line = {"step": 1, "loss": 0.5, evil: 1.0, f"iou/{evil}": 2.0, "iou/other": 1.0, "note": evil}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    picture = folder / "a&'b-000001.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    made = Page(folder, lambda: {evil: {1: picture}})
    made.about = {"prompt": evil}
    text = made.write().read_text()
    assert "<script" not in text and "<b>" not in text
    assert Parsed(text).settings()["instance_prompt"] == evil
    assert text.count("&lt;script&gt;") >= 5


def test_numbers_that_are_not_finite_and_a_line_that_is_being_written_are_left_out(tmp_path):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    made = Page(tmp_path, dict)
    assert "Loss: 1 (from 1 to 1)" in made.write().read_text()
    with open(file, "a") as more:
        more.write('ss": 3.0}\n')
    text = made.write().read_text()
    assert "Loss: 3 (from 1 to 3)" in text and "nan" not in text and "inf" not in text.replace("info", "")


def test_a_wide_picture_is_scaled_down_and_links_to_itself(tmp_path):
    (tmp_path / "validation").mkdir()
    path = tmp_path / "validation" / "images-000001.png"
    Image.effect_noise((1000, 500), 50).save(path)
    (image,) = Parsed(Page(tmp_path, lambda: {"images": {1: path}}).write().read_text()).of("img")
    with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as inside:
        assert inside.size == (480, 240)
    (link,) = read(tmp_path).of("a")
    assert (tmp_path / link["href"]).is_file()


def test_a_long_curve_keeps_its_peaks_and_its_end():
    points = [(step, 1.0) for step in range(50_000)]
    points[12_345], points[40_000] = (12_345, 9.0), (40_000, -3.0)
    kept = thinned(points)
    assert len(kept) <= charts.MOST_POINTS + 1 and {points[12_345], points[40_000], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_the_moving_average_of_a_constant_is_the_constant_and_lags_by_its_window():
    assert [y for _, y in smoothed([(n, 2.0) for n in range(100)])] == pytest.approx([2.0] * 100)
    decay, expected, weight = 1 - 30 / 300, 0.0, 0.0
    points = [(n, math.sin(n)) for n in range(300)]
    for (_, y), (_, found) in zip(points, smoothed(points), strict=True):
        expected, weight = decay * expected + (1 - decay) * y, decay * weight + 1 - decay
        assert found == pytest.approx(expected / weight)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 2.0], [1e-12, 1e12], [math.nan], [0.3, math.inf, 0.1]])
def test_any_numbers_make_a_chart_inside_its_frame(values):
    text = line_chart({"loss": list(enumerate(values))}, "loss")
    for x, y in re.findall(r"[ML]([-\d.e]+) ([-\d.e]+)", text):
        assert 0 <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT
    assert "nan" not in text and "inf" not in text.replace("no finite", "")


def test_bars_are_as_high_as_their_numbers():
    text = bar_chart({"0": {"a": 1.0, "b": 2.0}, "1": {"a": 4.0}}, "norms")
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', text)]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 2, 4], rel=0.01)


@pytest.mark.parametrize("count", [1, 6, 24, 200])
@pytest.mark.parametrize("name", ["{}", "transformer {}", "text_encoder_2 {}"])
def test_labels_of_bars_do_not_lie_over_each_other(count, name):
    text = bar_chart({name.format(n): {"a": 1.0} for n in range(count)}, "norms")
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)</text>', text)
    assert labels
    ends = [(float(x) - 3 * len(label), float(x) + 3 * len(label)) for x, label in labels]
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ends))
