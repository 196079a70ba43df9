"""Scores, masks, few shots and augmentation of the vision recipes, against scikit-learn and torchmetrics."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional as tmf
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.training.data.few_shot import k_shot
from slora_diffusers.training.data.images import Item
from slora_diffusers.training.data.labelled import Fetch, hold_out, hub_dataset, image_folder, random_box
from slora_diffusers.training.data.masks import (
    class_names,
    mask_dataset,
    mask_folder,
    mask_of,
    read_label_map,
    read_mask,
)
from slora_diffusers.training.randomness import generator
from slora_diffusers.training.vision.scores import (
    Overlap,
    class_weights,
    confusion_matrix,
    segmentation_loss,
    top_k_accuracy,
)

LABELS = {"background": 0, "cat": 7, "dog": 9, "ignore": 255}


def maps(classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    r = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (3, 9, 7), generator=r), torch.randint(classes, (3, 9, 7), generator=r)


def test_confusion_matrix_is_scikit_learns():
    predicted, truth = maps()
    expected = sklearn_confusion(truth.flatten(), predicted.flatten())
    assert confusion_matrix(predicted, truth, 4).tolist() == expected.tolist()


def test_overlap_is_scikit_learns_and_ignores_255():
    predicted, truth = maps()
    truth[0] = 255
    overlap = Overlap.of(confusion_matrix(predicted, truth, 4))
    kept = (truth[1:].flatten(), predicted[1:].flatten())
    np.testing.assert_allclose(overlap.iou.numpy(), jaccard_score(*kept, average=None))
    np.testing.assert_allclose(overlap.dice.numpy(), 2 * overlap.iou.numpy() / (1 + overlap.iou.numpy()))


@pytest.mark.parametrize("absent", ["in neither", "predicted only", "true only"])
def test_absent_classes_count_as_in_torchmetrics(absent: str):
    predicted, truth = maps(3)
    if absent == "predicted only":
        predicted[0, 0, 0] = 3
    if absent == "true only":
        truth[0, 0, 0] = 3
    expected = tmf.jaccard_index(predicted, truth, task="multiclass", num_classes=4)
    overlap = Overlap.of(confusion_matrix(predicted, truth, 4))
    assert overlap.means()["miou"] == pytest.approx(100 * expected.item(), rel=1e-5)
    assert bool(overlap.iou[3].isnan()) == (absent == "in neither")


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_accuracy_is_torchmetrics(k: int):
    logits, labels = torch.randn(40, 8), torch.randint(8, (40,))
    expected = tmf.accuracy(logits, labels, task="multiclass", num_classes=8, top_k=k, average="micro")
    assert top_k_accuracy(logits, labels, k) == pytest.approx(100 * expected.item())
    assert top_k_accuracy(logits[:, :3], labels.clamp_max(2), 5) == 100


def test_dice_loss_equals_the_formula_over_classes_that_are_there():
    logits, labels = torch.randn(2, 4, 5, 5), torch.randint(3, (2, 5, 5))  # class 3 is not there
    labels[0, 0] = 255
    p, counted = logits.softmax(1), labels != 255
    terms = [1 - 2 * p[:, c][labels == c].sum() / (p[:, c][counted].sum() + (labels == c).sum()) for c in range(3)]
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    expected = F.cross_entropy(logits, labels, weights, ignore_index=255) + 0.7 * torch.stack(terms).mean()
    torch.testing.assert_close(segmentation_loss(logits, labels, weights, 0.7), expected)
    torch.testing.assert_close(segmentation_loss(logits, labels), F.cross_entropy(logits, labels, ignore_index=255))


def test_class_weights_are_inverse_to_counts():
    weights = class_weights(torch.tensor([300.0, 100.0, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5, 0.0]))


def test_shots_are_the_same_for_the_same_seed_and_grow():
    labels = [i % 3 for i in range(60)]
    four = k_shot(labels, 4, seed=1)
    assert sorted(labels[i] for i in four) == [0] * 4 + [1] * 4 + [2] * 4
    assert four == k_shot(labels, 4, seed=1)
    assert four != k_shot(labels, 4, seed=2)
    assert set(four) < set(k_shot(labels, 8, seed=1))
    assert k_shot(labels, 0, seed=1) == list(range(60))
    with pytest.raises(SerialLoraError, match="these classes have fewer"):
        k_shot(labels, 21, seed=1)


def items(count: int, classes: int = 2) -> list[Item]:
    return [Item(f"{i}", lambda: Image.new("RGB", (8, 8)), (8, 8), "", i % classes) for i in range(count)]


def test_hold_out_splits_every_class_and_loses_nothing():
    trained, held = hold_out(items(20), 0.3, seed=0)
    assert [item.label for item in held].count(0) == [item.label for item in held].count(1) == 3
    assert {item.name for item in trained} | {item.name for item in held} == {str(i) for i in range(20)}
    assert len(trained) + len(held) == 20
    with pytest.raises(SerialLoraError, match="one image"):
        hold_out(items(2), 0.5, seed=0)
    with pytest.raises(SerialLoraError, match="between 0 and 1"):
        hold_out(items(9), 1.5, seed=0)


def test_image_folder_names_classes_in_order(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / name / "a.png")
    found, names = image_folder(tmp_path)
    assert names == ["cat", "dog"]
    assert [(item.name, item.label) for item in found] == [("cat/a.png", 0), ("dog/a.png", 1)]
    (tmp_path / "cow").mkdir()
    with pytest.raises(SerialLoraError, match="no class is called cow"):
        image_folder(tmp_path, names)


def test_random_boxes_lie_inside_and_keep_their_share():
    for i in range(200):
        left, top, right, bottom = random_box((50, 30), 0.4, generator(0, i))
        assert 0 <= left < right <= 50
        assert 0 <= top < bottom <= 30
        assert (right - left) * (bottom - top) > 0.3 * 50 * 30  # cut sides and rounding take a little off 0.4
    assert random_box((50, 30), 1.0, generator(0, 1)) == (0, 0, 50, 30)


def test_image_and_mask_are_cut_and_mirrored_alike():
    values = np.random.default_rng(0).integers(0, 3, (16, 16)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    image = Image.fromarray((values * 100).astype(np.uint8)).convert("RGB")
    item = Item("a", image.copy, (64, 64))
    prepare = Preprocessing((64, 64), (0.0,) * 3, (1.0,) * 3)
    fetch = Fetch(prepare, 0.3, True, {"a": lambda: values})
    agreement = []
    for i in range(20):
        x = fetch(item, (64, 64), generator(0, i))
        agreement.append(((x[0] * 255 / 100).round() == x[3]).float().mean().item())
    assert min(agreement) > 0.75  # what interpolation blurs at the edges differs
    assert torch.equal(fetch(item, (64, 64), generator(0, 1)), fetch(item, (64, 64), generator(0, 1)))


def test_masks_of_values_palettes_and_colours_mean_the_same(tmp_path):
    values = np.array([[0, 7, 9], [255, 9, 0]], np.uint8)
    expected = np.array([[0, 1, 2], [255, 2, 0]])
    Image.fromarray(values).save(tmp_path / "grey.png")
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.flatten().tolist())
    palette.save(tmp_path / "palette.png")
    colours = {0: (0, 0, 0), 7: (255, 0, 0), 9: (0, 9, 200), 255: (255, 255, 255)}
    Image.fromarray(np.array([[colours[v] for v in row] for row in values.tolist()], np.uint8)).save(
        tmp_path / "rgb.png"
    )
    named = {name: list(colours[value]) for name, value in LABELS.items()}
    assert (read_mask(tmp_path / "grey.png", LABELS) == expected).all()
    assert (read_mask(tmp_path / "palette.png", LABELS) == expected).all()
    assert (read_mask(tmp_path / "rgb.png", named) == expected).all()
    with pytest.raises(SerialLoraError, match="values 9"):
        read_mask(tmp_path / "grey.png", {"background": 0, "cat": 7, "ignore": 255})


def test_mask_folder_refuses_what_does_not_match(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(SerialLoraError, match=r"no mask for a\.jpg"):
        mask_folder(tmp_path, LABELS)
    Image.new("L", (6, 8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(SerialLoraError, match=r"\(8, 6\) pixels"):
        mask_folder(tmp_path, LABELS)
    Image.new("L", (8, 6), 7).save(tmp_path / "masks" / "a.png")
    found, readers = mask_folder(tmp_path, LABELS)
    assert (readers[found[0].name]() == 1).all()


@pytest.mark.parametrize(
    "text",
    [
        *('{"a": 0}', '{"a": 0, "b": 0}', '["a", "b"]', "{", '{"a": 0, "b": "red"}'),
        *('{"a": 0, "b": 1.7}', '{"a": 0, "b": true}', '{"a": 0, "b": -1}', '{"a": 0, "b": [300, 0, 0]}'),
    ],
)
def test_bad_label_maps_are_refused(text: str, tmp_path):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(SerialLoraError, match="label_map"):
        read_label_map(tmp_path / "labels.json")


def test_masks_are_turned_as_their_images_are(tmp_path):
    """A photo and its mask from one camera, both on their side, of another shape than they show."""
    mask = np.zeros((4, 6), np.uint8)
    mask[0] = 1
    upright = Image.fromarray(mask).transpose(Image.Transpose.ROTATE_90)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.save(tmp_path / "mask.png", exif=turned)
    assert np.array_equal(read_mask(tmp_path / "mask.png", {"background": 0, "cat": 1}), mask)


def test_label_map_keeps_the_order_of_classes(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    assert class_names(read_label_map(tmp_path / "labels.json")) == ["background", "cat", "dog"]


def test_values_beside_colours_are_greys_and_a_palette_gives_its_colours(tmp_path):
    mask = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), "P")
    mask.putpalette([0, 0, 0, 255, 0, 0, 224, 224, 192, 255, 255, 255])  # as Pascal VOC's: borders are cream
    label_map = {"background": 0, "cat": [255, 0, 0], "ignore": 255}
    with pytest.raises(SerialLoraError, match="#e0e0c0"):
        mask_of(mask, label_map, "mask")
    border = {"background": 0, "cat": [255, 0, 0], "white": 255, "ignore": [224, 224, 192]}
    assert mask_of(mask, border, "mask").tolist() == [[0, 1, 255, 2]]
    assert mask_of(Image.new("L", (1, 1), 255), label_map, "mask").tolist() == [[255]]
    blue = Image.new("RGB", (1, 1), (0, 0, 255))
    with pytest.raises(SerialLoraError, match="#0000ff"):
        mask_of(blue, label_map, "mask")


def test_greys_in_any_mode_are_values_and_colours_without_a_map_of_them_are_refused():
    for mode in ("L", "LA", "RGB", "RGBA"):
        grey = Image.new("L", (2, 1), 7).convert(mode)
        assert mask_of(grey, LABELS, "mask").tolist() == [[1, 1]]
    with pytest.raises(SerialLoraError, match="in colour"):
        mask_of(Image.new("RGB", (1, 1), (7, 0, 0)), LABELS, "mask")


def test_label_maps_of_too_many_classes_and_images_of_one_name_are_refused(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({f"c{i}": i for i in range(256)}))
    with pytest.raises(SerialLoraError, match="from 2 to 255"):
        read_label_map(tmp_path / "labels.json")
    for part, names in {"images": ("a.png", "a.bmp"), "masks": ("a.png",)}.items():
        (tmp_path / part).mkdir()
        for name in names:
            Image.new("L", (2, 2)).save(tmp_path / part / name)
    with pytest.raises(SerialLoraError, match="several images called a"):
        mask_folder(tmp_path, LABELS)


def test_a_batch_without_a_pixel_that_counts_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 2.0])
    for labels, w in ((torch.full((1, 2, 2), 255), None), (torch.zeros(1, 2, 2, dtype=torch.long), weights)):
        loss = segmentation_loss(logits, labels, w, dice=1.0 if w is None else 0.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and gradient.abs().max() == 0


def rows(tmp_path, labels, feature):
    image = Image.new("RGB", (4, 4))
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    made = datasets.Dataset.from_dict({"image": [image] * len(labels), "label": labels}, features=features)
    made.save_to_disk(tmp_path / "rows")
    return str(tmp_path / "rows"), "train", "image", "label"


def test_classes_of_another_split_are_matched_by_name(tmp_path):
    source = rows(tmp_path, ["a", "b", "b"], datasets.ClassLabel(names=["b", "a"]))
    items, names = hub_dataset(*source, ["a", "b"])
    assert names == ["a", "b"] and [item.label for item in items] == [0, 1, 1]


def test_classes_that_are_whole_numbers_are_in_their_order(tmp_path):
    items, names = hub_dataset(*rows(tmp_path, [10, 2, 10], datasets.Value("int64")))
    assert names == ["2", "10"] and [item.label for item in items] == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (["a", "q"], datasets.Value("string"), "row 1 of the data set has the class 'q'"),
        (["a", None], datasets.Value("string"), "row 1 of the data set has the class None"),
        ([0, -1], datasets.ClassLabel(names=["a", "b"]), "row 1 of the data set has the class -1"),
    ],
)
def test_rows_without_a_known_class_are_refused(labels, feature, message, tmp_path):
    with pytest.raises(SerialLoraError, match=message):
        hub_dataset(*rows(tmp_path, labels, feature), ["a", "b"])


def test_masks_of_a_data_set_equal_those_of_a_folder(tmp_path):
    r, images, masks = np.random.default_rng(0), [], []
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for index in range(3):
        images.append(Image.fromarray(r.integers(0, 255, (6, 4 + index, 3), np.uint8)))
        masks.append(Image.fromarray(r.choice(np.array([0, 7, 9, 255], np.uint8), (6, 4 + index))))
        images[-1].save(tmp_path / "images" / f"{index}.png")
        masks[-1].save(tmp_path / "masks" / f"{index}.png")
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict({"image": images, "mask": masks}, features=features).save_to_disk(tmp_path / "rows")
    ours, readers = mask_dataset(str(tmp_path / "rows"), "train", "image", "mask", LABELS)
    theirs, others = mask_folder(tmp_path, LABELS)
    for item, other in zip(ours, theirs, strict=True):
        assert item.size == other.size and item.read().tobytes() == other.read().tobytes()
        assert np.array_equal(readers[item.name](), others[other.name]())
