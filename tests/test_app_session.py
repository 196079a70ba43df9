"""What the page and `slora compare` draw and write, without a page: sessions and grids on tiny pipelines."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slora_diffusers as sl
from slora_diffusers.app.grid import Grid, by_adapters, by_weights, columns_of, draw_grid, sheet
from slora_diffusers.app.session import Look, Session, Stopped
from slora_diffusers.cli import app
from slora_diffusers.errors import SerialLoraError
from tests.adapters import add_random_adapter
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_sd3_pipeline

WEIGHTS = "serial_lora_weights.safetensors"
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`dit`, a pipeline of classes; `style` and `subject`, adapters of it."""
    folder = tmp_path_factory.mktemp("app")
    tiny_dit_pipeline().save_pretrained(folder / "dit")
    pipe = DiTPipeline.from_pretrained(folder / "dit")
    for name, seed in (("style", 1), ("subject", 2)):
        add_random_adapter(pipe.transformer, name, seed)
        sl.save_serial_lora(pipe, folder / name, name)
    return folder


@pytest.fixture
def session(folder):
    session = Session(DiTPipeline.from_pretrained(folder / "dit"))
    assert [session.open(str(folder / name)) for name in ("style", "subject")] == ["style", "subject"]
    return session


def stock(folder, adapters, seed=0, label=2):
    """Pixels of the pipeline with adapters {path: weight}, loaded and drawn as a user would."""
    pipe = DiTPipeline.from_pretrained(folder / "dit")
    pipe.set_progress_bar_config(disable=True)
    for number, (path, weight) in enumerate(adapters.items()):
        pipe.load_serial_lora(path, adapter_name=f"a{number}", weight=weight)
    generator = torch.Generator().manual_seed(seed)
    return pixels(pipe([label], generator=generator, num_inference_steps=STEPS).images[0])


def pixels(image):
    return np.asarray(image, np.int16)


def number_in(key):
    """The block of a key."""
    return re.search(r"\.(\d+)\.", key)[1]


def alike(one, other):
    return np.abs(pixels(one) - pixels(other)).max() <= 1


def state(session):
    return {key: value.clone() for key, value in session.pipe.transformer.state_dict().items()}


def unchanged(session, before):
    after = session.pipe.transformer.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_live_is_what_the_verbs_draw_with_these_weights_and_this_scale(session, folder):
    look = Look({"style": 0.8, "subject": -0.5}, scale=1.5)
    (image,) = session.draw([(session.request("2", 7, STEPS), look)])
    assert alike(image, stock(folder, {folder / "style": 1.2, folder / "subject": -0.75}, seed=7))


def test_base_live_and_fused_come_from_one_seed_and_the_weights_are_put_back(session, folder):
    before = state(session)
    seen = []
    versus = session.versus(session.request("2", 5, STEPS), Look({"style": 1.0}, 0.5), lambda *at: seen.append(at))
    assert np.array_equal(pixels(versus.base), stock(folder, {}, seed=5))
    assert alike(versus.live, stock(folder, {folder / "style": 0.5}, seed=5))
    pipe = DiTPipeline.from_pretrained(folder / "dit")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_serial_lora(folder / "style")
    pipe.fuse_serial_lora(scale=0.5)
    generator = torch.Generator().manual_seed(5)
    fused = pipe([2], generator=generator, num_inference_steps=STEPS).images[0]
    assert np.array_equal(pixels(versus.fused), pixels(fused))
    assert versus.effect == np.abs(pixels(versus.base) - pixels(versus.live)).max() > 5
    assert versus.apart == np.abs(pixels(versus.fused) - pixels(versus.live)).max() <= 1
    assert unchanged(session, before)
    assert seen == [(n, 3 * STEPS) for n in range(1, 3 * STEPS + 1)]


def test_blocks_that_are_off_act_as_if_their_pairs_were_not_there(session, folder, tmp_path):
    blocks = session.blocks()
    assert blocks == ["transformer 0", "transformer 1"]
    for off in ([blocks[0]], [blocks[1]], blocks):
        kept = load_file(folder / "style" / WEIGHTS)
        numbers = {block.split()[1] for block in off}
        for key in kept:
            if "lora_B" in key and number_in(key) in numbers:
                kept[key] = torch.zeros_like(kept[key])
        with safe_open(folder / "style" / WEIGHTS, "pt") as file:
            save_file(kept, tmp_path / WEIGHTS, file.metadata())
        expected = stock(folder, {tmp_path: 0.7})
        versus = session.versus(session.request("2", 0, STEPS), Look({"style": 0.7}, off=off))
        assert alike(versus.live, expected) and alike(versus.fused, expected)
    assert versus.effect == 0  # all are off


def test_the_empty_look_is_the_base(folder):
    session = Session(DiTPipeline.from_pretrained(folder / "dit"))
    versus = session.versus(session.request("2", 0, STEPS), Look({}))
    assert np.array_equal(pixels(versus.live), stock(folder, {})) and versus.effect == versus.apart == 0


def test_a_request_to_stop_counts_also_before_the_first_step_and_once(session):
    request, look = session.request("2", 0, STEPS), Look({"style": 1.0})
    session.stop.set()
    with pytest.raises(Stopped):
        session.versus(request, look)
    assert session.versus(request, look).effect > 0


@pytest.mark.parametrize("stage", [1, 3, 5])
def test_stopping_ends_the_drawing_and_leaves_the_pipeline_as_it_was(session, folder, stage):
    before, request = state(session), session.request("2", 0, STEPS)

    def stop(done, steps):
        if done == stage:
            session.stop.set()

    with pytest.raises(Stopped):
        session.versus(request, Look({"style": 1.0}), stop)
    assert unchanged(session, before)
    (image,) = session.draw([(request, Look({"style": 1.0}))])
    assert alike(image, stock(folder, {folder / "style": 1.0}))


def test_a_grid_of_weights_and_seeds_holds_these_pictures_in_this_order(session, folder):
    rows = by_weights(Look({"style": 1.0}), [0, 0.5, 1])
    columns = columns_of(session, ["2"], [0, 4], STEPS)
    assert list(rows) == ["weight 0: the base", "weight 0.5", "weight 1"] and list(columns) == ["seed 0", "seed 4"]
    image = draw_grid(session, Grid(rows, columns), "style")
    for row, weight in enumerate((0, 0.5, 1)):
        for column, seed in enumerate((0, 4)):
            expected = stock(folder, {folder / "style": weight}, seed)
            left = image.width - 16 - (2 - column) * 136
            top = image.height - 16 - (3 - row) * 136
            cell = image.crop((left, top, left + 128, top + 128))
            enlarged = Image.fromarray(expected.astype(np.uint8)).resize((128, 128), Image.Resampling.LANCZOS)
            assert np.abs(pixels(cell) - pixels(enlarged)).max() <= 3


def test_a_grid_of_adapters_has_the_base_each_adapter_and_all_together(session, folder):
    rows = by_adapters(Look({"style": 0.5, "subject": 1.0}, 2.0))
    assert list(rows) == ["base", "style, weight 0.5", "subject, weight 1", "all together"]
    request = session.request("2", 0, STEPS)
    images = session.draw([(request, look) for look in rows.values()])
    style, subject = folder / "style", folder / "subject"
    for image, adapters in zip(images, ({}, {style: 1.0}, {subject: 2.0}, {style: 1.0, subject: 2.0}), strict=True):
        assert alike(image, stock(folder, adapters))


def test_labels_say_what_differs(session):
    assert list(columns_of(session, ["1", "2"], [0])) == ["1", "2"]
    assert list(columns_of(session, ["1", "2"], [0, 1])) == ["1, seed 0", "1, seed 1", "2, seed 0", "2, seed 1"]


def test_long_labels_fit_the_sheet():
    images = [[Image.new("RGB", (64, 48), colour) for colour in ("red", "lime")]]
    made = sheet(images, ["a prompt of many words " * 9], ["x" * 300, "\N{SNOWMAN} <b>"], "title")
    assert made.width < 900 and made.height < 400
    colours = {made.getpixel((x, y)) for x in range(made.width) for y in range(made.height)}
    assert {(255, 0, 0), (0, 255, 0)} <= colours


def test_norms_and_spectra_are_those_of_sBA(session, folder):
    tensors = {key: value.double() for key, value in load_file(folder / "style" / WEIGHTS).items()}
    products = {
        key.removesuffix(".lora_A.weight"): tensors[key.replace("lora_A", "lora_B")] @ A
        for key, A in tensors.items()
        if "lora_A" in key
    }
    spectra, norms = session.spectra("style"), session.norms("style")
    assert len(spectra) == len(products) == 2
    for key, product in products.items():
        block = f"transformer {number_in(key)}"
        s = session.pipe.transformer._serial_lora.configs["style"].scaling_of("any")
        values = torch.linalg.svdvals(s * product)
        (found,) = [v for place, v in spectra.items() if f"transformer {number_in(place)}" == block]
        assert found == pytest.approx(values[: len(found)].tolist(), rel=1e-4, abs=1e-6)
        assert norms[block]["hidden_states"] == pytest.approx(torch.linalg.norm(s * product).item(), rel=1e-4)


def test_export_writes_what_is_shown_with_its_error_and_compress_gives_it_back(session, folder, tmp_path):
    look, request = Look({"style": 0.6}, 1.5, ["transformer 0"]), session.request("2", 0, STEPS)
    said = session.export(look, str(tmp_path / "lora"), "peft", rank=1)
    assert re.search(r"relative error \d\.\d+e", said)
    exact = session.export(look, str(tmp_path / "exact"), "peft")
    assert str(tmp_path / "exact") in exact
    name, said = session.compress(str(tmp_path / "exact" / "transformer"), str(tmp_path / "back"), 4)
    assert name == "back" in session.names and "relative error" in said
    shown, again = session.draw([(request, look), (request, Look({"back": 1.0}))])
    assert alike(shown, again)
    assert alike(stock(folder, {tmp_path / "back": 1.0}), shown)


def test_merge_writes_and_opens_the_sum_of_what_is_shown(session, folder, tmp_path):
    look, request = Look({"style": 0.6, "subject": 0.4}, 1.2, ["transformer 1"]), session.request("2", 0, STEPS)
    name, said = session.merge(look, str(tmp_path / "both"))
    assert name == "both" and "both" in said
    one, other = session.draw([(request, look), (request, Look({"both": 1.0}))])
    assert alike(one, other) and alike(stock(folder, {tmp_path / "both": 1.0}), one)


def test_names_are_made_fit_and_free(session, folder, tmp_path):
    assert session.open(str(folder / "style" / WEIGHTS)) == "style_2"
    session.close("style_2")
    assert session.names == ["style", "subject"]
    odd = tmp_path / "my adapter (v2)"
    odd.mkdir()
    (odd / WEIGHTS).write_bytes((folder / "style" / WEIGHTS).read_bytes())
    assert session.open(str(odd)) == "my_adapter_v2"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda s, f, t: s.open("  "), "Give an adapter"),
        (lambda s, f, t: s.open(str(f / "styel")), "styel"),
        (lambda s, f, t: s.request("", 0), "Say what to draw: a class"),
        (lambda s, f, t: s.request("1234567", 0), "class: must be"),
        (lambda s, f, t: s.request("zebra", 0), "zebra"),
        (lambda s, f, t: s.request("2", -1), "seed"),
        (lambda s, f, t: s.request("2", 0, 0), "steps"),
        (lambda s, f, t: s.request("2", 0, 2, -1.0), "guidance"),
        (lambda s, f, t: s.draw([(s.request("2", 0, 1), Look({"none": 1.0}))]), "No adapter 'none' is open"),
        (lambda s, f, t: s.draw([(s.request("2", 0, 1), Look({"style": float("nan")}))]), "finite"),
        (lambda s, f, t: s.draw([(s.request("2", 0, 1), Look({"style": 1.0}, float("inf")))]), "finite"),
        (lambda s, f, t: s.export(Look({"style": 1.0}), ""), "Give a folder"),
        (lambda s, f, t: s.export(Look({"style": 1.0}), str(f)), "nothing is overwritten"),
        (lambda s, f, t: s.export(Look({}), str(t / "x")), "nothing to export"),
        (lambda s, f, t: s.export(Look({"style": 1.0}), str(t / "x"), "zip"), "zip"),
        (lambda s, f, t: s.merge(Look({}), str(t / "x")), "nothing to merge"),
        (lambda s, f, t: s.compress("", str(t / "x"), 4), "Give a LoRA"),
        (lambda s, f, t: s.compress(str(t / "none.safetensors"), str(t / "x"), 4), "none.safetensors"),
        (lambda s, f, t: columns_of(s, [], [0]), "something to draw"),
        (lambda s, f, t: draw_grid(s, Grid(by_weights(Look({}), range(40)), columns_of(s, ["2"], range(40)))), "400"),
        (lambda s, f, t: s.norms("none"), "No adapter 'none' is open"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_changes_nothing(session, folder, tmp_path, wrong, says):
    before = state(session)
    with pytest.raises(SerialLoraError, match=re.escape(says)):
        wrong(session, folder, tmp_path)
    assert unchanged(session, before) and session.names == ["style", "subject"] and not (tmp_path / "x").exists()


def test_a_model_alone_is_refused(folder):
    with pytest.raises(SerialLoraError, match="a model alone"):
        Session(tiny_dit_pipeline().transformer)


def test_a_pipeline_of_prompts_is_drawn_by_its_prompt(tmp_path):
    pipe = tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "style", 1)
    sl.save_serial_lora(pipe, tmp_path / "style", "style")
    session = Session(tiny_sd3_pipeline())
    assert not session.draws_classes and session.subjects() == []
    session.open(str(tmp_path / "style"))
    versus = session.versus(session.request("a cat", 1, STEPS), Look({"style": 1.0}))
    pipe.set_progress_bar_config(disable=True)
    own = pipe("a cat", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1)).images[0]
    assert alike(versus.live, own) and versus.apart <= 1 < versus.effect


def compare(*arguments, code=0):
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_compare_writes_a_grid_of_weights_and_seeds(folder, tmp_path):
    words = [folder / "style", "--base", folder / "dit", "--steps", STEPS, "-o", tmp_path / "new" / "grid.png"]
    said = compare(*words, "--draw", "2", "--seed", "0", "--seed", "4", "-w", "0", "-w", "0.5", "-w", "1", "--json")
    assert json.loads(said)["rows"] == ["weight 0: the base", "weight 0.5", "weight 1"]
    session = Session(DiTPipeline.from_pretrained(folder / "dit"))
    rows = by_weights(Look({session.open(str(folder / "style")): 1.0}), [0, 0.5, 1])
    expected = draw_grid(session, Grid(rows, columns_of(session, ["2"], [0, 4], STEPS)), "style")
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert np.array_equal(pixels(image.convert("RGB")), pixels(expected))
    assert "would be overwritten" in compare(*words, code=1)


def test_compare_of_several_adapters_has_a_row_for_each(folder, tmp_path):
    words = [folder / "style", folder / "subject", "--base", folder / "dit", "--steps", "1", "--json"]
    said = json.loads(compare(*words, "-o", tmp_path / "g.png", "-w", "0.5", "-w", "2"))
    assert said["rows"] == ["base", "style, weight 0.5", "subject, weight 2", "all together"]
    assert said["columns"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "grid.txt"], ".png"),
        (["-o", "grid.png", "--rows", "columns"], "--rows must be one of weights, adapters"),
        (["-o", "grid.png", "-w", "nan"], "finite"),
        (["-o", "grid.png", "--rows", "adapters", "-w", "1", "-w", "2"], "as many --weight"),
        (["-o", "grid.png", "--draw", "zebra", "--base", "DIT"], "zebra"),
    ],
)
def test_compare_says_in_a_line_what_is_wrong(folder, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    words = [str(folder / "dit") if word == "DIT" else word for word in words]
    said = compare(folder / "style", *words, code=1)
    assert says in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_compare_finds_a_mistyped_adapter_before_it_loads_a_base(folder, tmp_path):
    said = compare(folder / "styel", "--base", "no-such-base", "-o", tmp_path / "g.png", code=1)
    assert "styel" in said and "no-such-base" not in said
