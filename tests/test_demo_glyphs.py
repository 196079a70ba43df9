"""The demo's glyphs: every face draws every letter, and what is held out is held out."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from slora_diffusers.demo.glyphs import (
    HELD_OUT_LETTERS,
    LETTERS,
    NEW_STYLES,
    PRETRAINING_FACES,
    SEEN_LETTERS,
    Jitter,
    glyph_images,
    render_glyph,
    to_pixels,
)

# matplotlib has cmti10 since 3.11; the demo's own styles need no such font.
HERE = [
    face for face in PRETRAINING_FACES if (Path(matplotlib.get_data_path()) / f"fonts/ttf/{face.font}.ttf").exists()
]
ALL_FACES = (*HERE, *NEW_STYLES.values())


def test_letters_are_split_into_two_disjoint_halves():
    assert len(SEEN_LETTERS) == len(HELD_OUT_LETTERS) == 13
    assert set(SEEN_LETTERS).isdisjoint(HELD_OUT_LETTERS)
    assert set(SEEN_LETTERS) | set(HELD_OUT_LETTERS) == set(LETTERS)


def test_new_styles_draw_no_character_that_pretraining_draws():
    drawn = {(face.font, face.character(letter)) for face in PRETRAINING_FACES for letter in LETTERS}
    for style in NEW_STYLES.values():
        assert drawn.isdisjoint((style.font, style.character(letter)) for letter in LETTERS), style.name


def test_no_pretraining_glyph_equals_a_glyph_of_a_new_style():
    known = glyph_images(HERE)[0].flatten(1)
    for style in NEW_STYLES.values():
        distance = torch.cdist(glyph_images([style])[0].flatten(1).float(), known.float(), p=1) / 255
        assert distance.min() > 20, style.name  # pixels of ink; a letter has about 150


@pytest.mark.parametrize("face", ALL_FACES, ids=lambda face: face.name)
def test_face_draws_26_distinct_letters_inside_the_frame(face):
    images, labels = glyph_images([face])
    assert images.shape == (26, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == list(range(26))
    ink = (images > 127).flatten(1).sum(1)
    assert ink.min() >= 30 and ink.max() <= 500
    assert len({image.numpy().tobytes() for image in images}) == 26
    border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    assert border.max() <= 64  # nothing is cut off


def test_glyph_is_what_pillow_draws():
    from PIL import Image, ImageDraw

    from slora_diffusers.demo.glyphs import load_font

    font = load_font("DejaVuSans-Bold", 27 * 4)
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((64, 64), "H", font=font, fill=255, anchor="mm")
    canvas = canvas.crop(canvas.getbbox())
    drawn = render_glyph(next(face for face in PRETRAINING_FACES if face.name == "DejaVuSans-Bold"), "H")
    rows, columns = np.nonzero(drawn > 127)
    assert abs((rows.max() - rows.min() + 1) - canvas.height / 4) <= 1
    assert abs((columns.max() - columns.min() + 1) - canvas.width / 4) <= 1
    assert abs(drawn.sum() - np.asarray(canvas).sum() / 16) / drawn.sum() < 0.02


def test_jitter_moves_and_thickens_as_it_says():
    face = PRETRAINING_FACES[0]
    plain = render_glyph(face, "H").astype(float)
    moved = render_glyph(face, "H", Jitter(shift=(2.0, -1.0))).astype(float)
    np.testing.assert_allclose(moved[:-1, 2:], plain[1:, :-2], atol=2)
    assert render_glyph(face, "H", Jitter(weight=2)).sum() > 1.2 * plain.sum()
    assert render_glyph(face, "H", Jitter(scale=(0.8, 0.8))).sum() == pytest.approx(0.64 * plain.sum(), rel=0.05)


def test_variations_repeat_from_the_seed_and_differ_from_each_other():
    face = PRETRAINING_FACES[:1]
    first, labels = glyph_images(face, "AB", variations=3, seed=1)
    assert torch.equal(first, glyph_images(face, "AB", variations=3, seed=1)[0])
    assert not torch.equal(first, glyph_images(face, "AB", variations=3, seed=2)[0])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len({image.numpy().tobytes() for image in first}) == 6


def test_pixels_span_minus_one_to_one_in_three_equal_channels():
    pixels = to_pixels(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert pixels.shape == (1, 3, 1, 2)
    assert torch.equal(pixels[0, :, 0], torch.tensor([[-1.0, 1.0]] * 3))
