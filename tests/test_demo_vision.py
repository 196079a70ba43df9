"""The demo's second part: scenes are what they say, and what a tiny ViT learns on them is saved, loaded and fused."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModel, ViTModel

from slora_diffusers import SerialLoraForImageClassification, SerialLoraForSemanticSegmentation
from slora_diffusers.demo import scenes as scenes_module
from slora_diffusers.demo import vision
from slora_diffusers.demo.glyphs import LETTERS, NEW_STYLES, glyph_images
from slora_diffusers.demo.run import STYLE as DEFAULT
from slora_diffusers.demo.run import run_demo
from slora_diffusers.demo.scenes import backgrounds, compose, fresh_scenes, scenes
from slora_diffusers.heads.preprocessing import Preprocessing
from train_scripts.pretrain_demo_vit import PREPARE

STYLE = NEW_STYLES["script"]


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_scenes_follow_from_the_seed_and_their_labels_and_masks_from_the_glyphs():
    one, same, other = (scenes([STYLE], 2, seed, held_out=False) for seed in (3, 3, 4))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)
    assert one.images.shape == (52, 3, 32, 32) and one.images.min() >= 0 and one.images.max() <= 1
    glyphs, labels = glyph_images([STYLE], LETTERS, 2, 3)
    assert torch.equal(one.labels, labels)
    assert torch.equal(one.masks, (glyphs > 127).long())


def test_fresh_scenes_show_every_drawing_once_a_round_and_never_the_same_scene_twice():
    batches = list(fresh_scenes([STYLE], 2, 13, steps=8, seed=0))
    assert [len(batch.labels) for batch in batches] == [13] * 8
    labels, images = torch.cat([b.labels for b in batches]), torch.cat([b.images for b in batches])
    assert labels[:52].bincount().tolist() == labels[52:].bincount().tolist() == [2] * 26
    assert len(images.unique(dim=0)) == 104
    again = next(iter(fresh_scenes([STYLE], 2, 13, steps=8, seed=0)))
    assert torch.equal(again.images, batches[0].images) and torch.equal(again.masks, batches[0].masks)


def test_training_and_judging_never_share_a_pixel_of_the_photograph(monkeypatch):
    halves = torch.cat([torch.zeros(3, 200, 150), torch.ones(3, 200, 150)], dim=2)
    monkeypatch.setattr(scenes_module, "_photograph", lambda: halves)
    assert backgrounds(40, draw(), held_out=False).max() == 0
    assert backgrounds(40, draw(), held_out=True).min() == 1


def test_a_scene_is_its_background_where_there_is_no_ink_and_one_colour_where_there_is():
    glyphs = torch.zeros(30, 32, 32, dtype=torch.uint8)
    glyphs[:, 8:20, 8:20] = 255
    behind = backgrounds(30, draw(), held_out=False)
    images = compose(glyphs, behind, draw(1))
    inked = glyphs.bool()[:, None].expand_as(images)
    assert torch.equal(images[~inked], behind[~inked])
    letters = images[:, :, 8:20, 8:20].flatten(2)
    assert torch.equal(letters, letters[:, :, :1].expand_as(letters))
    contrast = (letters[:, :, 0] - behind.mean((2, 3))).abs().amax(1)
    assert contrast.min() >= scenes_module._CONTRAST - 1e-6


def test_the_base_is_a_stock_model_of_two_megabytes_at_most():
    model = AutoModel.from_pretrained(vision.VIT_BASE, dtype=torch.float32)
    assert isinstance(model, ViTModel)
    files = [path for path in vision.VIT_BASE.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in files) <= 2e6
    assert Preprocessing.of(vision.VIT_BASE) == PREPARE  # what it was pretrained with


def test_the_base_tells_letters_apart_that_it_was_not_trained_on():
    """Its features separate the letters of an unseen face: nearest class mean, scenes over the other half."""
    model = AutoModel.from_pretrained(vision.VIT_BASE, dtype=torch.float32)
    prepare = SerialLoraForImageClassification.from_backbone(model, 26, None).preprocessing

    @torch.inference_mode()
    def features(chosen):
        return model(prepare.normalize(chosen.images)).last_hidden_state.mean(1)

    train, test = (scenes([STYLE], 4, seed, held_out=bool(seed)) for seed in (0, 1))
    means = features(train).view(26, 4, -1).mean(1)
    right = (torch.cdist(features(test), means).argmin(1) == test.labels).float().mean()
    assert right > 0.25  # chance is 0.04


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=160)
    before = {path.name: path.read_bytes() for path in vision.VIT_BASE.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "TRAINING", replace(vision.TRAINING, steps=80, drawings=2, test=2))
        result = run_demo(folder, part="vision", console=console)
    assert {path.name: path.read_bytes() for path in vision.VIT_BASE.iterdir()} == before
    return result, console.file.getvalue()


def test_vision_makes_what_it_says(made):
    result, printed = made
    assert list(result.files) == ["vision sheet", "classification", "segmentation", "metrics"]
    for path in result.files.values():
        assert path.exists() and str(path) in printed
    with Image.open(result.vision.sheet) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 500
    metrics = json.loads(result.metrics.read_text())["vision"]
    assert [row["method"] for row in metrics["rows"]] == 2 * ["head alone", "Serial LoRA"]
    head, serial = metrics["rows"][:2]
    assert head["trainable_parameters"] == 0
    # Three pairs of rank 16 in each of four blocks of width 96.
    assert serial["trainable_parameters"] == 3 * 2 * 16 * 96 * 4
    assert metrics["largest_logit_difference_live_fused"] < 1e-3


def test_training_learns_more_than_chance_and_the_files_give_the_reported_scores(made):
    result, _ = made
    test = scenes([NEW_STYLES[DEFAULT]], 2, 1, held_out=True)
    classes = {"classification": SerialLoraForImageClassification, "segmentation": SerialLoraForSemanticSegmentation}
    for task, row in zip(vision.TASKS, result.vision.rows[1::2], strict=True):
        folder: Path = result.vision.models[task.name]
        model = classes[task.name].from_pretrained(folder)  # the base that the file names
        score = task.score(vision.predict(model, test), task.truth(test))
        assert score == pytest.approx(row.score)
    accuracy, miou = (row.score for row in result.vision.rows[1::2])
    assert accuracy > 3 * 100 / 26
    assert miou > task.score(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(52, 2, 32, 32), test.masks)
