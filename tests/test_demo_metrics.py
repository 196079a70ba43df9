"""The demo's pixel measure, against a brute-force reference in plain numpy."""

import numpy as np
import pytest
import torch

from slora_diffusers.demo.glyphs import PRETRAINING_FACES, glyph_images
from slora_diffusers.demo.metrics import best_iou, nearest_glyph


def brute_force_iou(image, truth, max_shift):
    a, b = image > 0.5, truth > 0.5
    best = 0.0
    height, width = a.shape
    for dy in range(-max_shift, max_shift + 1):
        for dx in range(-max_shift, max_shift + 1):
            shifted = np.zeros_like(a)
            for y in range(height):
                for x in range(width):
                    if 0 <= y - dy < height and 0 <= x - dx < width:
                        shifted[y, x] = a[y - dy, x - dx]
            union = (shifted | b).sum()
            best = max(best, (shifted & b).sum() / union if union else 0.0)
    return best


@pytest.mark.parametrize("max_shift", [0, 1, 2])
def test_best_iou_equals_brute_force(max_shift):
    torch.manual_seed(max_shift)
    images, truth = torch.rand(4, 7, 9), torch.rand(4, 7, 9)
    expected = [brute_force_iou(a, b, max_shift) for a, b in zip(images.numpy(), truth.numpy(), strict=True)]
    assert best_iou(images, truth, max_shift).tolist() == pytest.approx(expected)


def test_best_iou_is_one_for_a_shifted_copy_within_reach_and_less_beyond():
    truth = torch.zeros(1, 20, 20)
    truth[0, 6:12, 8:11] = 1
    assert best_iou(truth.roll((3, -2), (1, 2)), truth, 3).item() == 1
    assert best_iou(truth.roll((4, 0), (1, 2)), truth, 3).item() < 1


def test_best_iou_of_empty_images_is_zero():
    assert best_iou(torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)).tolist() == [0, 0]


def test_nearest_glyph_recognises_the_letters_of_another_face():
    bold, regular = (glyph_images([PRETRAINING_FACES[i]])[0] / 255 for i in (1, 0))
    right = nearest_glyph(regular, bold) == torch.arange(26)
    assert right.float().mean() > 0.8
    assert torch.equal(nearest_glyph(bold, bold), torch.arange(26))
