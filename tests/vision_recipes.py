"""What the tests of the vision recipes share: a tiny base, images with classes, scenes with masks, running a recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from slora_diffusers.recipes import vit_classification as train_vit_classification
from slora_diffusers.recipes import vit_segmentation as train_vit_segmentation
from tests.tiny.pipelines import CORPUS, clip_tokenizer_on
from tests.tiny.vision import SIZE, VISION

QUIET = ["--validation_steps", "0", "--checkpointing_steps", "0", "--rank", "4", "--train_batch_size", "4"]


@pytest.fixture(scope="session")
def vit_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    VISION["Dinov2Model"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """Horizontal and vertical stripes in noise: the mean colour tells nothing."""
    folder, r = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for index in range(24):
        pattern = np.zeros((SIZE, SIZE, 3), np.int64)
        pattern[index % 4 :: 4] = 180
        image = pattern if index % 2 else pattern.transpose(1, 0, 2)
        place = folder / ("across" if index % 2 else "down")
        place.mkdir(exist_ok=True)
        noisy = np.clip(image + r.integers(0, 60, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(place / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A bright square on a dark ground, and its mask; and the label map."""
    folder, r = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for index in range(12):
        y, x = r.integers(0, 3, 2) * 4
        mask = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
        mask[2 * y : 2 * y + 16, 2 * x : 2 * x + 16] = 200
        image = np.clip(mask[..., None].astype(int) + r.integers(0, 50, (2 * SIZE, 2 * SIZE, 3)), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    (folder / "labels.json").write_text(json.dumps({"ground": 0, "square": 200}))
    return folder


def classify(vit_base, stripes, out, *flags):
    argv = [
        "--pretrained_model_name_or_path",
        str(vit_base),
        "--train_data_dir",
        str(stripes),
        "--output_dir",
        str(out),
    ]
    return train_vit_classification.main([*argv, *QUIET, *flags])


def segment(vit_base, scenes, out, *flags):
    argv = ["--pretrained_model_name_or_path", str(vit_base), "--train_data_dir", str(scenes), "--output_dir", str(out)]
    data = ["--validation_data_dir", str(scenes), "--label_map", str(scenes / "labels.json")]
    return train_vit_segmentation.main([*argv, *data, *QUIET, *flags])


def losses(out) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def write_clip(folder):
    """Save a tiny CLIP with its tokenizer; returns the folder."""
    tokenizer = clip_tokenizer_on(CORPUS)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(tokenizer), "projection_dim": 16, **ends},
        vision_config={**size, "image_size": SIZE, "patch_size": 4, "projection_dim": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
