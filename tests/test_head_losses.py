"""The losses of the heads against formulas in float64, and labels that would give a wrong number in silence."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from slora_diffusers import SerialLoraError, SerialLoraForImageClassification, SerialLoraForSemanticSegmentation
from slora_diffusers.errors import AdapterFileError
from slora_diffusers.heads.losses import PROBLEMS, mask_loss
from slora_diffusers.training.vision.scores import segmentation_loss
from tests.test_heads import rewrite
from tests.test_vision import CONFIG, PREPARE, classifier, pixels, segmenter, shaken
from tests.test_vision_promptable import batch, make
from tests.tiny.vision import SIZE, VISION

NAN = math.nan


def by_hand(problem: str, logits: Tensor, labels: Tensor) -> float:
    z, t = logits.double(), labels.double()
    if problem == "regression":
        return ((z - t) ** 2).mean().item()
    if problem == "multi_label_classification":
        p = 1 / (1 + torch.exp(-z))
        return -(t * p.log() + (1 - t) * (1 - p).log()).mean().item()
    rows = [i for i, label in enumerate(labels.tolist()) if label != -100]
    return -sum((z[i] - z[i].exp().sum().log())[int(labels[i])].item() for i in rows) / max(len(rows), 1)


GOOD = {
    "single_label_classification": [torch.tensor([0, 3]), torch.tensor([1, -100]), torch.tensor([2, 1]).int()],
    "multi_label_classification": [torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]), torch.rand(2, 4)],
    "regression": [torch.randn(2, 4), torch.randint(-5, 5, (2, 4))],
}


@pytest.mark.parametrize(("problem", "index"), [(name, i) for name, labels in GOOD.items() for i in range(len(labels))])
def test_loss_is_the_formula(problem: str, index: int):
    labels = GOOD[problem][index]
    model = shaken(classifier(problem_type=problem))
    output = model(pixels(), labels=labels)
    assert output.loss.item() == pytest.approx(by_hand(problem, output.logits, labels), rel=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_loss_is_transformers_own(problem: str):
    labels = GOOD[problem][0]
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    stock = ViTForImageClassification(
        ViTConfig(**config, image_size=SIZE, patch_size=4, id2label={i: str(i) for i in range(4)})
    )
    stock.config.problem_type = problem
    logits = torch.randn(2, 4)
    given = labels.float() if problem != "single_label_classification" else labels
    expected = stock.loss_function(given, logits, stock.config)
    torch.testing.assert_close(PROBLEMS[problem](logits, labels), expected)


def test_probabilities_of_classes_are_labels_too():
    model = shaken(classifier())
    labels = torch.tensor([[0.2, 0.3, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    output = model(pixels(), labels=labels)
    z = output.logits.double()
    expected = -(labels.double() * (z - z.exp().sum(1, keepdim=True).log())).sum(1).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_batches_in_which_nothing_counts_give_zero_and_gradients_that_are_numbers():
    for model, labels in (
        (shaken(classifier()), torch.tensor([-100, -100])),
        (shaken(segmenter()), torch.full((2, SIZE, SIZE), 255)),
    ):
        loss = model(pixels(), labels=labels).loss
        assert loss.item() == 0
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


BAD: list[tuple[str, Any, str]] = [
    ("single_label_classification", torch.tensor([0, 4]), r"in \[0, 3\].*got 0 to 4"),
    ("single_label_classification", torch.tensor([-1, 2]), r"got -1 to 2"),
    ("single_label_classification", torch.tensor([0]), r"of the shape \(2,\); got \(1,\)"),
    ("single_label_classification", torch.tensor([[0], [1]]), r"got \(2, 1\)"),
    ("single_label_classification", torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 2), 'problem_type="multi_label_classif'),
    ("single_label_classification", torch.tensor([0.0, 1.0]), "probabilities"),
    ("single_label_classification", torch.tensor([[NAN, 0.0, 1.0, 0.0]] * 2), "got nan"),
    ("multi_label_classification", torch.tensor([1, 2]), r"shape \(2, 4\); got \(2,\)"),
    ("multi_label_classification", torch.tensor([[0, 2, 0, 0]] * 2), r"in \[0, 1\]"),
    ("multi_label_classification", torch.tensor([[0, -100, 0, 0]] * 2), r"in \[0, 1\]"),
    ("multi_label_classification", torch.tensor([[0.0, NAN, 0.0, 0.0]] * 2), "nan"),
    ("regression", torch.randn(2), r"shape \(2, 4\)"),
    ("regression", torch.randn(4), r"shape \(2, 4\)"),
    ("regression", torch.full((2, 4), math.inf), "NaN or infinity"),
]


@pytest.mark.parametrize(("problem", "labels", "message"), BAD)
def test_labels_that_do_not_fit_are_refused(problem: str, labels: Tensor, message: str):
    model = shaken(classifier(problem_type=problem))
    with pytest.raises(SerialLoraError, match=message):
        model(pixels(), labels=labels)


def test_one_number_is_regressed_as_transformers_does_it():
    base = VISION["Dinov2Model"].build()
    model = shaken(
        SerialLoraForImageClassification.from_backbone(
            base, 1, CONFIG, problem_type="regression", preprocessing=PREPARE
        )
    )
    labels = torch.tensor([0.5, -2.0])
    output = model(pixels(), labels=labels)
    assert output.loss.item() == pytest.approx(((output.logits[:, 0] - labels) ** 2).mean().item(), rel=1e-5)


def test_problem_goes_into_the_file_and_an_unknown_one_is_refused(tmp_path):
    model = shaken(classifier(problem_type="multi_label_classification"))
    path = model.save_pretrained(tmp_path)
    base = VISION["Dinov2Model"]
    back = SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=base.build())
    labels = GOOD["multi_label_classification"][0]
    assert torch.equal(back(pixels(), labels=labels).loss, model(pixels(), labels=labels).loss)
    with pytest.raises(SerialLoraError, match="problem_type must be one of"):
        classifier(problem_type="multilabel")
    rewrite(path, lambda tensors, header: header["head"]["settings"].update(problem_type="other"))
    with pytest.raises(SerialLoraError, match="problem_type must be one of"):
        SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=base.build())
    rewrite(path, lambda tensors, header: header["head"]["settings"].pop("problem_type"))  # written by an older version
    old = SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=base.build())
    assert old.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.randint(3, (2, 1, SIZE, SIZE)), r"take \[:, 0\]"),
        (torch.randint(3, (SIZE, SIZE)), r"\(B, H, W\)"),
        (torch.randint(3, (3, SIZE, SIZE)), "a batch of 2"),
        (torch.rand(2, SIZE, SIZE), "whole numbers"),
        (torch.full((2, SIZE, SIZE), 3), r"in \[0, 2\]"),
        (torch.full((2, SIZE, SIZE), 254), "got 254"),
        (torch.full((2, SIZE, SIZE), -1), "got -1"),
        (torch.empty(2, 0, 0).long(), r"\(B, H, W\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(labels: Tensor, message: str):
    with pytest.raises(SerialLoraError, match=message):
        shaken(segmenter())(pixels(), labels=labels)


def test_a_mask_of_0_and_255_for_two_classes_is_warned_of():
    base = VISION["Dinov2Model"].build()
    model = SerialLoraForSemanticSegmentation.from_backbone(base, 2, CONFIG, preprocessing=PREPARE)
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[:, :4] = 255
    with pytest.warns(UserWarning, match="labels // 255"):
        model(pixels(), labels=masks)
    masks[0, 8] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(pixels(), labels=masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m * 255, "divide masks of 0 and 255 by 255"),
        (lambda m: m - 1, "must lie in"),
        (lambda m: m * NAN, "must lie in"),
        (lambda m: m[:, 0], r"\(2, 1, h, w\)"),
        (lambda m: m[:1], r"\(2, 1, h, w\)"),
        (lambda m: m.repeat(1, 3, 1, 1), r"\(2, 1, h, w\)"),
    ],
)
def test_prompted_masks_that_do_not_fit_are_refused(change: Any, message: str):
    given = batch()
    with pytest.raises(SerialLoraError, match=message):
        make()(**{**given, "masks": change(given["masks"])})


def test_losses_stay_finite_and_dice_between_0_and_1():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        scale = float(torch.randint(1, 200, (), generator=draw))
        logits = torch.randn(2, 3, 6, 6, generator=draw) * scale
        labels = torch.randint(0, 4, (2, 6, 6), generator=draw)
        labels[labels == 3] = 255
        masks = (torch.rand(2, 3, 6, 6, generator=draw) > torch.rand((), generator=draw)).float()
        cross = segmentation_loss(logits, labels)
        dice = segmentation_loss(logits, labels, dice=1.0) - cross
        assert torch.isfinite(cross) and -1e-4 <= dice <= 1 + 1e-4
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks)
        assert torch.isfinite(bce) and -1e-4 <= mask_loss(logits, masks) - bce <= 1 + 1e-4


def test_a_file_with_an_unknown_pooling_is_refused(tmp_path):
    path = shaken(classifier()).save_pretrained(tmp_path)
    rewrite(path, lambda tensors, header: header["head"]["settings"].update(pooling="max"))
    with pytest.raises((AdapterFileError, SerialLoraError), match="pooling"):
        SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=VISION["Dinov2Model"].build())
