"""Tiles: what is seen pixel by pixel comes out as if seen whole, at any size; seams are blended, classes averaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from slora_diffusers import SerialLoraError
from slora_diffusers.heads.preprocessing import Preprocessing, pixels_of
from slora_diffusers.heads.tiling import averaged, blended, tiles
from slora_diffusers.recipes import classify_images, segment_images
from tests.test_vision import classifier, segmenter, shaken
from tests.tiny.vision import VISION

SIZES = [(16, 16), (17, 40), (5, 7), (64, 16), (33, 33), (3, 90)]
PHOTO = Image.effect_noise((50, 21), 90).convert("RGB")
IN_TILES = {"size": (16, 16), "resize_mode": "tile", "overlap": 4}


@pytest.mark.parametrize("overlap", [0, 1, 5, 7])
@pytest.mark.parametrize("tile", [(16, 16), (8, 24)])
@pytest.mark.parametrize("size", SIZES)
def test_a_model_of_single_pixels_sees_the_image_whole(size: tuple[int, int], tile: tuple[int, int], overlap: int):
    torch.manual_seed(1)
    model = torch.nn.Conv2d(3, 4, 1).requires_grad_(False)
    image = torch.randn(3, *size)
    got = blended(tiles(lambda pixels, mask: model(pixels), image, tile, overlap), size, tile, overlap)
    assert got.shape == (4, *size)
    torch.testing.assert_close(got, model(image[None])[0], rtol=1e-5, atol=1e-5)


def test_neighbours_fade_into_each_other():
    """The first tile says 0 everywhere, the second 1: between them the logit rises, step by step."""
    answers = iter([0.0, 1.0])
    seen = tiles(lambda pixels, mask: torch.full((1, 1, 8, 8), next(answers)), torch.zeros(3, 8, 12), (8, 8), 4)
    got = blended(seen, (8, 12), (8, 8), 4)[0, 0]
    assert torch.equal(got[:4], torch.zeros(4)) and torch.equal(got[8:], torch.ones(4))
    torch.testing.assert_close(got[4:8], torch.tensor([0.2, 0.4, 0.6, 0.8]))


@pytest.mark.parametrize("size", SIZES)
def test_every_tile_is_as_large_as_it_should_be_and_its_mask_tells_the_image(size: tuple[int, int]):
    seen: list[tuple[Tensor, Tensor]] = []

    def run(pixels: Tensor, mask: Tensor) -> Tensor:
        seen.append((pixels, mask))
        return pixels.sum((2, 3))

    got = averaged(tiles(run, torch.ones(3, *size), (16, 16), 4))
    assert all(pixels.shape == (1, 3, 16, 16) and torch.equal(pixels[:, 0], mask) for pixels, mask in seen)
    assert all(mask.sum() == min(size[0], 16) * min(size[1], 16) for _, mask in seen)
    torch.testing.assert_close(got, torch.stack([pixels.sum((2, 3))[0] for pixels, _ in seen]).mean(0))


@pytest.mark.parametrize(("tile", "overlap"), [((16, 16), 16), ((16, 16), -1), ((16, 8), 8), ((16, 16), 2.0)])
def test_overlaps_that_cannot_be_are_refused(tile: tuple[int, int], overlap: int):
    with pytest.raises(SerialLoraError, match="must share"):
        Preprocessing(tile, resize_mode="tile", overlap=overlap)


def by_hand(model, image: Image.Image) -> list[Tensor]:
    """Logits of the tiles of a 50 x 21 image, of 16 pixels that share 4."""
    pixels = model.preprocessing.normalize(pixels_of(image))[None]
    places = [(top, left) for top in (0, 5) for left in (0, 12, 24, 34)]
    with torch.no_grad():
        return [model(pixels[..., top : top + 16, left : left + 16]).logits[0] for top, left in places]


def test_an_image_has_the_mean_of_its_tiles_logits():
    model = shaken(classifier(pooling="mean"))
    model.preprocessing = replace(model.preprocessing, **IN_TILES)
    torch.testing.assert_close(model.predict(PHOTO), torch.stack(by_hand(model, PHOTO)).mean(0))


def test_a_small_image_is_filled_up_and_what_fills_it_counts_for_nothing_in_the_mean():
    model = shaken(classifier(pooling="mean"))
    model.preprocessing = replace(model.preprocessing, **IN_TILES)
    small = PHOTO.crop((0, 0, 12, 8))
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, :, :8, :12] = model.preprocessing.normalize(pixels_of(small))
    with torch.no_grad():
        patches = model.backbone(pixel_values=pixels).last_hidden_state[:, 1:].unflatten(1, (4, 4))[:, :2, :3]
        expected = model.head(patches.mean((1, 2)))[0]
    torch.testing.assert_close(model.predict(small), expected)


def test_the_pipelines_see_large_images_in_tiles_when_told_or_when_trained_so(tmp_path):
    VISION["Dinov2Model"].build().save_pretrained(tmp_path / "base")
    PHOTO.save(tmp_path / "photo.png")
    for name, make, script in (("segment", segmenter, segment_images), ("classify", classifier, classify_images)):
        told, trained = shaken(make()), shaken(make())
        trained.preprocessing = replace(trained.preprocessing, **IN_TILES)
        common = [str(tmp_path / "photo.png"), "--base", str(tmp_path / "base")]
        found = []
        for model, flags in ((told, ["--tile", "16", "--overlap", "4"]), (trained, [])):
            model.save_pretrained(tmp_path / name)
            out = ["--output_dir", str(tmp_path / "out")] if name == "segment" else ["--top", "3"]
            found.append(script.main([*common, "--model", str(tmp_path / name), *flags, *out]))
            if name == "segment":
                mask = torch.frombuffer(
                    bytearray(Image.open(tmp_path / "out" / "photo_mask.png").tobytes()), dtype=torch.uint8
                )
                assert torch.equal(mask.view(21, 50).long(), trained.predict(PHOTO).argmax(0))
            else:
                best = trained.predict(PHOTO).softmax(0).max().item()
                assert found[-1][0]["classes"][0]["probability"] == pytest.approx(best, abs=1e-5)
        assert found[0] == found[1]
        for wrong, message in (
            ("--tile 15", "multiple of the model's patch"),
            ("--tile 16 --overlap 16", "must share"),
        ):
            with pytest.raises(SerialLoraError, match=message):
                script.main([*common, "--model", str(tmp_path / name), *wrong.split()])
    told.save_pretrained(tmp_path / "told")
    with pytest.raises(SerialLoraError, match="give --tile too"):
        classify_images.main([*common, "--model", str(tmp_path / "told"), "--overlap", "3"])
