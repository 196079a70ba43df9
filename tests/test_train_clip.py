"""The recipe for CLIP, from its command line: the classes' names are the prompts, and no head is added."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from pipelines import classify_images
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.files.storage import WEIGHT_NAME
from slora_diffusers.heads.prompts import SerialLoraForPromptClassification
from slora_diffusers.recipes import clip as train_clip
from tests.vision_recipes import QUIET, losses, write_clip

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def train(clip, stripes, out, *flags):
    argv = ["--pretrained_model_name_or_path", str(clip), "--train_data_dir", str(stripes), "--output_dir", str(out)]
    return train_clip.main([*argv, *QUIET, *flags])


def test_prompts_learn_and_the_file_opens_in_the_pipeline(clip, stripes, tmp_path):
    flags = ["--max_train_steps", "60", "--learning_rate", "1e-2", "--validation_steps", "60", "--smallest_crop", "1"]
    scores = train(clip, stripes, tmp_path, *flags, "--template", "stripes {}", "--validation_data_dir", str(stripes))
    assert scores["top1"] > 85 and np.mean(losses(tmp_path)[-5:]) < 0.7 * losses(tmp_path)[0]
    model = SerialLoraForPromptClassification.from_pretrained(tmp_path)
    assert model.label_names == ("across", "down") and model.settings["template"] == "stripes {}"
    results = classify_images.main([str(stripes), "--model", str(tmp_path), "--json", str(tmp_path / "r.json")])
    expected = model(model.preprocessing(Image.open(results[0]["file"]))[None]).logits.softmax(1).max().item()
    assert results[0]["classes"][0]["probability"] == pytest.approx(expected, rel=1e-4)
    right = [result["classes"][0]["label"] in result["file"] for result in results]
    assert 100 * np.mean(right) == pytest.approx(scores["top1"], abs=1e-3)
    assert json.loads((tmp_path / "r.json").read_text())["labels"] == ["across", "down"]


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_pairs_go_into_one_tower_if_asked(tower, clip, stripes, tmp_path):
    train(clip, stripes, tmp_path, "--max_train_steps", "2", "--towers", tower, "--shots", "2")
    keys = [key for key in load_file(tmp_path / WEIGHT_NAME) if ".serial_lora." in key]
    assert keys and all(f".{tower}_model." in key or key.startswith(f"model.{tower}_model") for key in keys)


def test_full_training_opens_with_its_own_model(clip, stripes, tmp_path):
    train(clip, stripes, tmp_path, "--max_train_steps", "2", "--adapter", "full", "--learning_rate", "1e-3")
    model = SerialLoraForPromptClassification.from_pretrained(tmp_path)
    before = CLIPModel.from_pretrained(clip)
    assert not torch.equal(model.backbone.visual_projection.weight, before.visual_projection.weight)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "lora"], "--adapter must be one of serial, full"),
        (["--resolution", "32"], "--resolution"),
        (["--towers", "text", "--targets", "text_model.*"], "--towers"),
        (["--template", "a photo"], "template"),
    ],
)
def test_bad_options_are_refused(flags, message, clip, stripes, tmp_path):
    with pytest.raises(SerialLoraError, match=message):
        train(clip, stripes, tmp_path, *flags)
