"""Tiles: what is seen pixel by pixel comes out as if seen whole, at any size; seams are blended."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from slora_diffusers import SerialLoraError
from slora_diffusers.heads.tiling import check_tiles, tiled
from slora_diffusers.recipes import segment_images
from tests.test_vision import CONFIG, PREPARE, segmenter, shaken
from tests.tiny.vision import VISION

SIZES = [(16, 16), (17, 40), (5, 7), (64, 16), (33, 33), (3, 90)]


@pytest.mark.parametrize("overlap", [0, 1, 5, 8, 15])
@pytest.mark.parametrize("size", SIZES)
def test_a_model_of_single_pixels_sees_the_image_whole(size: tuple[int, int], overlap: int):
    torch.manual_seed(1)
    model = torch.nn.Conv2d(3, 4, 1)
    image = torch.randn(3, *size)
    got = tiled(model, image, 16, overlap)
    assert got.shape == (4, *size)
    torch.testing.assert_close(got, model(image[None])[0].detach(), rtol=1e-5, atol=1e-5)


def test_neighbours_fade_into_each_other():
    """The first tile says 0 everywhere, the second 1: between them the logit rises, step by step."""
    answers = iter([0.0, 1.0])
    got = tiled(lambda pixels: torch.full((1, 1, 8, 8), next(answers)), torch.zeros(3, 8, 12), 8, 4)[0, 0]
    assert torch.equal(got[:4], torch.zeros(4)) and torch.equal(got[8:], torch.ones(4))
    torch.testing.assert_close(got[4:8], torch.tensor([0.2, 0.4, 0.6, 0.8]))


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (18, 0), (16, 16), (16, -1)])
def test_tiles_that_cannot_be_are_refused(tile: int, overlap: int):
    with pytest.raises(SerialLoraError, match="A tile must be"):
        check_tiles(tile, overlap, 4)


def test_segment_images_sees_large_images_in_tiles(tmp_path, monkeypatch):
    VISION["Dinov2Model"].build().save_pretrained(tmp_path / "base")
    segmenter_class = type(segmenter())
    model = segmenter_class.from_backbone(tmp_path / "base", 3, CONFIG, preprocessing=PREPARE)
    shaken(model).save_pretrained(tmp_path / "model")
    photo = Image.effect_noise((50, 21), 90).convert("RGB")
    photo.save(tmp_path / "photo.png")
    argv = [str(tmp_path / "photo.png"), "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    segment_images.main([*argv, "--tile", "16", "--overlap", "4"])
    mask = Image.open(tmp_path / "out" / "photo_mask.png")
    assert mask.size == photo.size
    pixels = model.preprocessing.normalize(torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255)
    with torch.no_grad():
        expected = tiled(lambda x: model(x).logits, pixels, 16, 4).argmax(0)
    assert torch.equal(torch.from_numpy(np.array(mask)).long(), expected)
    with pytest.raises(SerialLoraError, match="A tile must be"):
        segment_images.main([*argv, "--tile", "15"])
