"""The vision recipes from their command line: what they learn, save, resume and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from pipelines import classify_images, segment_images
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.files.storage import WEIGHT_NAME
from slora_diffusers.heads.classification import SerialLoraForImageClassification
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation
from slora_diffusers.recipes import vit_classification as train_vit_classification
from slora_diffusers.training.checkpoint import STATE_NAME
from slora_diffusers.training.data.labelled import Fetch
from slora_diffusers.training.vision import recipe as vision
from tests.tiny.vision import SIZE, VISION
from tests.vision_recipes import QUIET, classify, losses, segment


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_classifier_learns_and_its_file_gives_the_same_scores(vit_base, stripes, tmp_path):
    flags = ["--max_train_steps", "80", "--validation_steps", "80", "--learning_rate", "6e-3", "--pooling", "both"]
    scores = classify(
        vit_base, stripes, tmp_path, *flags, "--smallest_crop", "1", "--validation_data_dir", str(stripes)
    )
    assert scores["top1"] > 85
    model = SerialLoraForImageClassification.from_pretrained(tmp_path)
    assert model.label_names == ("across", "down")
    images = sorted(stripes.glob("*/*.png"))
    pixels = torch.stack([model.preprocessing(Image.open(path)) for path in images])
    predicted = [model.label_names[i] for i in model(pixels).logits.argmax(1).tolist()]
    assert np.mean([name == path.parent.name for name, path in zip(predicted, images, strict=True)]) > 0.85
    report = json.loads((tmp_path / "confusion.json").read_text())
    correct = sum(report["confusion"][i][i] for i in range(2))
    assert 100 * correct / sum(map(sum, report["confusion"])) == pytest.approx(scores["top1"], abs=1e-3)


@pytest.mark.parametrize("adapter", ["serial", "lora", "full", "head"])
def test_every_adapter_trains_what_it_says_from_the_same_first_loss(adapter, vit_base, stripes, tmp_path):
    classify(vit_base, stripes, tmp_path, "--max_train_steps", "3", "--adapter", adapter)
    first = losses(tmp_path)[0]
    assert first == pytest.approx(np.log(2), abs=1e-4)  # the new head knows nothing, whatever the adapter
    names = {"lora": "head.safetensors"}.get(adapter, WEIGHT_NAME)
    keys = load_file(tmp_path / names)
    assert {"head.weight", "head.bias"} <= set(keys)
    assert any(".serial_lora." in key for key in keys) == (adapter == "serial")
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists() == (adapter == "lora")
    assert (tmp_path / "model" / "config.json").exists() == (adapter == "full")


@pytest.mark.parametrize(("adapter", "rate"), [("serial", 6e-3), ("lora", 3e-3), ("head", 1e-2)])
def test_each_adapter_has_its_own_default_rate_after_a_warm_up_of_a_tenth(adapter, rate, vit_base, stripes, tmp_path):
    classify(vit_base, stripes, tmp_path, "--max_train_steps", "20", "--adapter", adapter, "--shots", "2")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[:3] == pytest.approx([0, rate / 2, rate])
    used = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert used["head_learning_rate"] == (1e-2 if adapter == "head" else 3e-3)


def test_epochs_become_steps_and_the_warm_up_is_a_tenth_of_them(vit_base, stripes, tmp_path):
    """20 of the 24 images train, four at a time: five batches an epoch."""
    classify(vit_base, stripes, tmp_path, "--num_train_epochs", "4", "--validation_fraction", "0.2")
    used = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert len(losses(tmp_path)) == used["max_train_steps"] == 20 and used["lr_warmup_steps"] == 2


def test_revision_and_download_folder_reach_all_that_is_opened(vit_base, stripes, tmp_path, monkeypatch):
    opened = []
    for owner, name in ((vision, "open_backbone"), (vision.Preprocessing, "of")):
        original = getattr(owner, name)
        spy = lambda path, original=original, **where: opened.append(where) or original(path, **where)  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    flags = ["--max_train_steps", "1", "--shots", "2", "--cache_dir", str(tmp_path / "hub"), "--revision", "main"]
    classify(vit_base, stripes, tmp_path / "out", *flags)
    assert len(opened) == 2
    assert all(w["cache_dir"] == str(tmp_path / "hub") and w["revision"] == "main" for w in opened)


def test_flags_win_over_the_default_rates(vit_base, stripes, tmp_path):
    flags = ["--max_train_steps", "2", "--learning_rate", "5e-4", "--lr_warmup_steps", "0", "--shots", "2"]
    classify(vit_base, stripes, tmp_path, *flags)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["lr"] == pytest.approx(5e-4)


def test_adapters_see_the_same_images_in_the_same_order(vit_base, stripes, tmp_path, monkeypatch):
    seen = {}
    for adapter in ("serial", "lora"):
        names = seen[adapter] = []
        original = Fetch.__call__

        def spy(self, item, shape, draw, names=names, original=original):
            pixels = original(self, item, shape, draw)
            names.append((item.name, pixels.sum().item()))
            return pixels

        with monkeypatch.context() as patch:
            patch.setattr(Fetch, "__call__", spy)
            classify(
                vit_base, stripes, tmp_path / adapter, "--max_train_steps", "3", "--adapter", adapter, "--shots", "5"
            )
    assert seen["serial"] == seen["lora"]
    assert len({name for name, _ in seen["serial"]}) == 10


def test_fully_trained_model_opens_with_its_own_backbone(vit_base, stripes, tmp_path):
    classify(vit_base, stripes, tmp_path, "--max_train_steps", "2", "--adapter", "full")
    model = SerialLoraForImageClassification.from_pretrained(tmp_path)
    untouched = VISION["Dinov2Model"].build()
    assert not torch.equal(model.backbone.encoder.layer[0].mlp.fc1.weight, untouched.encoder.layer[0].mlp.fc1.weight)


def test_resumed_run_equals_the_uninterrupted_one(vit_base, stripes, tmp_path):
    flags = ["--max_train_steps", "6", "--checkpointing_steps", "3", "--dropout", "0.1", "--random_flip"]
    classify(vit_base, stripes, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "resumed" / "checkpoint-3")
    assert (tmp_path / "resumed" / "checkpoint-3" / STATE_NAME).is_file()
    AcceleratorState._reset_state(reset_partial_state=True)
    classify(vit_base, stripes, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    whole, resumed = (load_file(tmp_path / run / WEIGHT_NAME) for run in ("whole", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]


def test_head_has_its_own_learning_rate(vit_base, stripes, tmp_path):
    flags = ["--max_train_steps", "1", "--learning_rate", "1e-9", "--lr_scheduler", "constant"]
    classify(vit_base, stripes, tmp_path, *flags, "--head_learning_rate", "0.1", "--adam_weight_decay", "0")
    saved = load_file(tmp_path / WEIGHT_NAME)
    assert saved["head.weight"].abs().max() == pytest.approx(0.1, rel=1e-2)  # Adam's first step is the rate itself
    assert all(saved[key].abs().max() < 1e-8 for key in saved if key.endswith("lora_B.weight"))


def test_segmentation_learns_at_the_original_resolution(vit_base, scenes, tmp_path):
    flags = ["--max_train_steps", "40", "--validation_steps", "40", "--learning_rate", "1e-2", "--dice_weight", "1"]
    scores = segment(vit_base, scenes, tmp_path, *flags, "--balance_classes", "--smallest_crop", "1")
    assert scores["miou"] > 75
    assert scores["miou"] == pytest.approx((scores["iou/ground"] + scores["iou/square"]) / 2, abs=1e-3)
    model = SerialLoraForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.label_names == ("ground", "square")


def test_convolutional_head_trains_with_every_option(vit_base, scenes, tmp_path):
    flags = ["--max_train_steps", "2", "--head", "convolutional", "--head_layers", "0", "1", "--head_width", "8"]
    segment(vit_base, scenes, tmp_path, *flags, "--gradient_checkpointing", "--random_flip", "--use_ema")
    assert "head.levels.1.1.weight" in load_file(tmp_path / WEIGHT_NAME)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shots", "11"], "these classes have fewer"),
        (["--resolution", "18"], "multiple of 4"),
        (["--smallest_crop", "0"], "smallest_crop"),
        (["--early_stopping", "2"], "validation_steps"),
        (["--inputs", "latents"], "latents"),
        (["--dataset_name", "somewhere"], "give one of"),
    ],
)
def test_bad_options_are_refused_before_a_step(flags, message, vit_base, stripes, tmp_path):
    with pytest.raises(SerialLoraError, match=message):
        classify(vit_base, stripes, tmp_path, *flags)
    assert not (tmp_path / WEIGHT_NAME).exists()


def test_data_set_of_the_datasets_library(vit_base, stripes, tmp_path):
    import datasets

    paths = sorted(stripes.glob("*/*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["across", "down"])})
    rows = {"image": [str(p) for p in paths], "label": [p.parent.name for p in paths]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    argv = ["--pretrained_model_name_or_path", str(vit_base), "--dataset_name", str(tmp_path / "rows"), *QUIET]
    train_vit_classification.main([*argv, "--max_train_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert SerialLoraForImageClassification.from_pretrained(tmp_path / "out").label_names == ("across", "down")


def test_classify_images_prints_writes_and_fuses(vit_base, stripes, tmp_path, capsys):
    flags = ["--max_train_steps", "5", "--learning_rate", "1e-2"]
    classify(vit_base, stripes, tmp_path, *flags)
    model = SerialLoraForImageClassification.from_pretrained(tmp_path)
    one = sorted(stripes.glob("across/*.png"))[0]
    common = [str(one), str(stripes / "down"), "--model", str(tmp_path), "--batch_size", "5"]
    results = classify_images.main([*common, "--json", str(tmp_path / "out" / "results.json"), "--top", "2"])
    expected = model(model.preprocessing(Image.open(one))[None]).logits.softmax(1)[0]
    found = {entry["label"]: entry["probability"] for entry in results[0]["classes"]}
    assert [found[name] for name in model.label_names] == pytest.approx(expected.tolist(), rel=1e-4)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"] == results
    assert len(results) == 13
    assert one.name in capsys.readouterr().out
    fused = classify_images.main([*common, "--fuse", "--top", "1"])
    assert [r["classes"][0]["label"] for r in fused] == [r["classes"][0]["label"] for r in results]
    base_only = classify_images.main([*common, "--scale", "0", "--top", "1"])
    assert base_only[0]["classes"][0]["probability"] != fused[0]["classes"][0]["probability"]


def test_segment_images_writes_masks_and_overlays(vit_base, scenes, tmp_path):
    segment(vit_base, scenes, tmp_path / "model", "--max_train_steps", "30", "--learning_rate", "1e-2")
    out = tmp_path / "out"
    argv = [str(scenes / "images"), "--model", str(tmp_path / "model"), "--output_dir", str(out)]
    results = segment_images.main(argv)
    mask = np.asarray(Image.open(out / "3_mask.png"))
    assert mask.shape == (2 * SIZE, 2 * SIZE)
    assert set(np.unique(mask)) <= {0, 1}
    areas = next(r["areas"] for r in results if r["mask"] == "3_mask.png")
    assert areas.get("square", 0) == pytest.approx((mask == 1).mean())
    picture = np.asarray(Image.open(out / "3_overlay.png"))[: 2 * SIZE, : 2 * SIZE].astype(int)
    image = np.asarray(Image.open(scenes / "images" / "3.png")).astype(int)
    assert ((picture != image).any(-1) == (mask == 1)).mean() > 0.99  # a pixel may have the palette's colour already
    assert json.loads((out / "results.json").read_text())["labels"] == ["ground", "square"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.png"], "neither a file nor a folder"),
        (["."], "holds no image"),
        (["x.png", "--batch_size", "0"], "batch_size"),
        (["x.png", "--fuse", "--scale", "0.5"], "leave out --scale"),
        (["x.png"], "weights"),
    ],
)
def test_pipelines_refuse_what_they_cannot_do(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    if argv[0] == "x.png":
        Image.new("RGB", (8, 8)).save("x.png")
    with pytest.raises(SerialLoraError, match=message):
        classify_images.main([*argv, "--model", str(tmp_path / "model")])
