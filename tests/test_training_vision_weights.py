"""Masks of the loss and weights of images in the recipes for vision: by the formula, and from their command lines."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.training.data.images import Item
from slora_diffusers.training.data.labelled import Fetch
from slora_diffusers.training.randomness import generator
from slora_diffusers.training.vision.scores import segmentation_loss
from tests.vision_recipes import classify, losses, segment

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
STEPS = ["--max_train_steps", "3"]


def test_masks_and_weights_of_images_weigh_the_segmentation_loss_by_the_formula():
    r = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(3, 4, 5, 6, generator=r).double(), torch.randint(4, (3, 5, 6), generator=r)
    labels[0, 0] = 255
    masks, images = torch.rand(3, 5, 6, generator=r).double(), torch.tensor([0.5, 3.0, 0.0]).double()
    classes = torch.tensor([1.0, 2.0, 0.5, 1.5]).double()
    above = below = scaled = plain = 0.0
    common, total = torch.zeros(4).double(), torch.zeros(4).double()
    p = logits.softmax(1)
    for b, y, x in np.ndindex(3, 5, 6):
        c, m = int(labels[b, y, x]), float(masks[b, y, x])
        if c == 255:
            continue
        above += float(images[b]) * m * float(classes[c]) * -math.log(p[b, c, y, x])
        below += m * float(classes[c])
        scaled, plain = scaled + float(images[b]) * m, plain + m
        common[c] += 2 * float(images[b]) * m * p[b, c, y, x]
        total += float(images[b]) * m * (p[b, :, y, x] + F.one_hot(torch.tensor(c), 4))
    expected = above / below + 0.7 * scaled / plain * (1 - common / total).mean()
    torch.testing.assert_close(segmentation_loss(logits, labels, classes, 0.7, masks, images), expected)


def test_a_mask_of_the_loss_is_cut_and_mirrored_as_its_image(tmp_path):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (24, 1)))
    item = Item("ramp", lambda: ramp.convert("RGB"), (24, 32), mask=lambda: ramp, floor=0.2)
    fetch = Fetch(Preprocessing((8, 12), (0.0,) * 3, (1.0,) * 3), 0.3, True)
    seen = set()
    for seed in range(12):
        pixels, mask = (read(item, (8, 12), generator(seed, "x")) for read in (fetch, fetch.mask))
        assert mask.shape == (1, 8, 12)
        torch.testing.assert_close(mask, 0.2 + 0.8 * pixels[:1], atol=0.02, rtol=0)
        seen.add(bool(mask[0, 0, 0] < mask[0, 0, -1]))
    assert seen == {False, True}
    assert fetch.mask(replace(item, mask=None), (8, 12), generator(0, "x")).tolist() == torch.ones(1, 8, 12).tolist()


def picture(path):
    with Image.open(path) as image:
        return image.copy()


def trained(run, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    run(*arguments)
    return losses(arguments[2])


def with_other_classes(scenes, out, where):
    """A copy of the scenes in which pixels have the other class where a mask of booleans says so."""
    shutil.copytree(scenes, out)
    for path in (out / "masks").iterdir():
        values = np.array(picture(path))
        Image.fromarray(np.where(where, 200 - values, values)).save(path)
    return out


@pytest.mark.parametrize("way", ["files", "alpha"])
def test_classes_of_pixels_that_a_mask_leaves_out_teach_nothing(way, vit_base, scenes, tmp_path):
    size = picture(next((scenes / "masks").iterdir())).size[0]
    left = np.zeros((size, size), bool)
    left[:, : size // 2] = True
    mask = Image.fromarray(np.where(left, 0, 255).astype(np.uint8))
    flags = ["--alpha_mask"]
    folders = [scenes, with_other_classes(scenes, tmp_path / "other", left)]
    if way == "files":
        (tmp_path / "loss").mkdir()
        for path in (scenes / "images").iterdir():
            mask.save(tmp_path / "loss" / path.name)
        flags = ["--mask_data_dir", str(tmp_path / "loss")]
    else:
        folders[0] = shutil.copytree(scenes, tmp_path / "own")
        for folder in folders:
            for path in (folder / "images").iterdir():
                image = picture(path).convert("RGB")
                image.putalpha(mask)
                image.save(path)
    flags += [*STEPS, "--smallest_crop", "1", "--dice_weight", "0.5", "--validation_fraction", "0.2"]
    found = [trained(segment, vit_base, folder, tmp_path / str(i), *flags) for i, folder in enumerate(folders)]
    plain = [trained(segment, vit_base, folder, tmp_path / f"p{i}", *STEPS) for i, folder in enumerate(folders)]
    # Where the mask's edge is resized, a little of the other half shows.
    np.testing.assert_allclose(*found, rtol=0.02)
    assert plain[0] != pytest.approx(plain[1], rel=0.1)


def weigh(folder, names, weight):
    lines = [{"file_name": name, "weight": weight(name)} for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_weights_of_metadata_multiply_the_loss_of_segmentation(vit_base, scenes, tmp_path):
    plain = trained(segment, vit_base, scenes, tmp_path / "plain", *STEPS, "--dice_weight", "1")
    heavy = shutil.copytree(scenes, tmp_path / "heavy")
    weigh(heavy / "images", sorted(path.name for path in (heavy / "images").iterdir()), lambda name: 3.0)
    found = trained(segment, vit_base, heavy, tmp_path / "weighed", *STEPS, "--dice_weight", "1")
    assert found[0] == pytest.approx(3 * plain[0])


def test_images_of_weight_0_teach_nothing(vit_base, scenes, tmp_path):
    copies = [with_other_classes(scenes, tmp_path / name, where) for name, where in (("a", False), ("b", True))]
    for folder in copies:
        for index in range(0, 12, 2):  # these are the same in both
            shutil.copy(scenes / "masks" / f"{index}.png", folder / "masks" / f"{index}.png")
        weigh(folder / "images", [f"{i}.png" for i in range(12)], lambda name: 1.0 - int(name.split(".")[0]) % 2)
    found = [trained(segment, vit_base, folder, tmp_path / f"o{i}", *STEPS) for i, folder in enumerate(copies)]
    assert found[0] == found[1]


def test_weights_of_metadata_multiply_the_loss_of_classification(vit_base, stripes, tmp_path):
    plain = trained(classify, vit_base, stripes, tmp_path / "plain", *STEPS)
    heavy = shutil.copytree(stripes, tmp_path / "heavy")
    weigh(heavy, sorted(p.relative_to(heavy).as_posix() for p in heavy.rglob("*.png")), lambda name: 2.0)
    assert trained(classify, vit_base, heavy, tmp_path / "weighed", *STEPS)[0] == pytest.approx(2 * plain[0])


@pytest.mark.parametrize("recipe", ["classification", "segmentation"])
def test_a_column_of_a_data_set_holds_weights(recipe, vit_base, stripes, scenes, tmp_path):
    if recipe == "classification":
        flags = ["--label_column", "label"]
        paths = sorted(stripes.glob("*/*.png"))
        rows = {"image": [picture(p) for p in paths], "label": [p.parent.name for p in paths]}
    else:
        flags = ["--mask_column", "mask"]
        paths = sorted((scenes / "images").iterdir())
        rows = {"image": [picture(p) for p in paths], "mask": [picture(scenes / "masks" / p.name) for p in paths]}
    made = datasets.Dataset.from_dict({**rows, "importance": [2.5] * len(paths)})
    made.save_to_disk(tmp_path / "rows")
    flags += ["--dataset_name", str(tmp_path / "rows"), *STEPS, "--weight_column"]
    source = stripes if recipe == "classification" else scenes

    def without_folder(base, folder, out, *more):
        argv = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out), *more]
        argv += ["--validation_steps", "0", "--checkpointing_steps", "0", "--rank", "4", "--train_batch_size", "4"]
        argv += ["--label_map", str(scenes / "labels.json")] if recipe == "segmentation" else []
        importlib.import_module(f"slora_diffusers.recipes.vit_{recipe}").main(argv)

    weighed = trained(without_folder, vit_base, source, tmp_path / "weighed", *flags, "importance")
    plain = trained(without_folder, vit_base, source, tmp_path / "plain", *flags[:-1])
    assert weighed[0] == pytest.approx(2.5 * plain[0])
    with pytest.raises(SerialLoraError, match="no column"):
        trained(without_folder, vit_base, source, tmp_path / "none", *flags, "nothing")


def test_masks_of_the_loss_that_are_the_classes_are_refused(vit_base, scenes, tmp_path):
    with pytest.raises(SerialLoraError, match="these are the classes"):
        segment(vit_base, scenes, tmp_path / "out", "--mask_data_dir", str(scenes / "masks"))
    with pytest.raises(SerialLoraError, match="give one of"):
        segment(vit_base, scenes, tmp_path / "out", "--mask_data_dir", str(scenes / "images"), "--alpha_mask")
    assert not (tmp_path / "out").exists()
