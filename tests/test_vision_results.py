"""What the vision recipes keep and report, against scikit-learn and torchmetrics, and what the pipelines make of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from torchmetrics.segmentation import MeanIoU

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.files.storage import WEIGHT_NAME
from slora_diffusers.heads.classification import SerialLoraForImageClassification
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation
from slora_diffusers.recipes import classify_images, inference, segment_images
from slora_diffusers.recipes import vit_segmentation as train_vit_segmentation
from slora_diffusers.training.data.labelled import Fetch
from slora_diffusers.training.vision import classification
from slora_diffusers.training.vision import recipe as vision
from slora_diffusers.training.vision.pictures import overlay
from tests.vision_recipes import classify, segment

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
QUICK = ["--max_train_steps", "3", "--learning_rate", "1e-2"]


@pytest.mark.parametrize("flags", [[], ["--use_ema", "--ema_decay", "0.5"], ["--optimizer", "schedulefree"]])
def test_early_stopping_saves_the_weights_that_scored_best_and_gives_their_scores(
    flags, vit_base, stripes, tmp_path, monkeypatch
):
    judged, given = [], iter([10.0, 30.0, 20.0, 20.0, 99.0])
    make = classification.logits_of

    def watched(model, *arguments):
        judged.append({key: tensor.clone() for key, tensor in model.head.state_dict().items()})
        return make(model, *arguments)

    monkeypatch.setattr(classification, "logits_of", watched)
    monkeypatch.setattr(classification, "top_k_accuracy", lambda *_: next(given) if _[2] == 1 else 50.0)
    common = ["--max_train_steps", "30", "--validation_steps", "1", "--learning_rate", "1e-2", "--lr_warmup_steps", "0"]
    scores = classify(vit_base, stripes, tmp_path, *common, "--early_stopping", "2", *flags)
    assert len(judged) == 4 and scores["top1"] == 30.0
    saved = load_file(tmp_path / WEIGHT_NAME)
    for key in ("weight", "bias"):
        torch.testing.assert_close(saved[f"head.{key}"], judged[1][key], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(judged[1][key], judged[3][key], rtol=1e-3)


def test_confusion_is_scikit_learns_on_the_predictions_of_the_file(vit_base, stripes, tmp_path):
    flags = [*QUICK, "--validation_steps", "3", "--validation_data_dir", str(stripes)]
    classify(vit_base, stripes, tmp_path, *flags)
    model = SerialLoraForImageClassification.from_pretrained(tmp_path)
    images = sorted(stripes.glob("*/*.png"))
    pixels = torch.stack([model.preprocessing(Image.open(path)) for path in images])
    truth = [model.label_names.index(path.parent.name) for path in images]
    expected = confusion_matrix(truth, model(pixels).logits.argmax(1).tolist())
    assert json.loads((tmp_path / "confusion.json").read_text())["confusion"] == expected.tolist()
    assert expected[0, 1] != expected[1, 0]  # else a transposed matrix would pass


def test_miou_is_torchmetrics_at_every_masks_own_size(vit_base, scenes, tmp_path):
    data, r = tmp_path / "data", np.random.default_rng(1)
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    for index, (height, width) in enumerate([(40, 24), (16, 48), (33, 31)]):
        mask = np.zeros((height, width), np.uint8)
        mask[3 : height // 2, 5 : width - 4] = 200
        noise = r.integers(0, 50, (height, width, 3))
        Image.fromarray(np.clip(mask[..., None] + noise, 0, 255).astype(np.uint8)).save(data / f"images/{index}.png")
        Image.fromarray(mask).save(data / f"masks/{index}.png")
    flags = [*QUICK, "--max_train_steps", "20", "--validation_steps", "20", "--validation_data_dir", str(data)]
    scores = segment(vit_base, scenes, tmp_path / "out", *flags)
    model = SerialLoraForSemanticSegmentation.from_pretrained(tmp_path / "out")
    both = []
    for path in sorted((data / "images").iterdir()):
        truth = torch.from_numpy(np.asarray(Image.open(data / "masks" / path.name)) == 200).long()
        logits = model(model.preprocessing(Image.open(path))[None]).logits
        resized = torch.nn.functional.interpolate(logits, truth.shape, mode="bilinear").argmax(1)[0]
        both.append((resized.flatten(), truth.flatten()))
    predicted, truth = (torch.cat(part)[None] for part in zip(*both, strict=True))
    metric = MeanIoU(num_classes=2, input_format="index")
    assert scores["miou"] == pytest.approx(100 * metric(predicted, truth).item(), abs=1e-3)


def test_options_reach_the_loss_and_the_augmentation(vit_base, stripes, scenes, tmp_path, monkeypatch):
    seen = SimpleNamespace(fetch=[], loss=[], entropy=[])

    def spy_fetch(*arguments):
        seen.fetch.append(arguments)
        return Fetch(*arguments)

    def spy_loss(logits, labels, weights, dice, masks, images):
        seen.loss.append((weights, dice))
        return logits.sum() * 0

    entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(train_vit_segmentation, "Fetch", spy_fetch)
    monkeypatch.setattr(classification, "Fetch", spy_fetch)
    monkeypatch.setattr(train_vit_segmentation, "segmentation_loss", spy_loss)
    monkeypatch.setattr(
        classification.F, "cross_entropy", lambda *a, **more: seen.entropy.append(a[2]) or entropy(*a, **more)
    )
    flags = ["--max_train_steps", "1", "--smallest_crop", "0.7", "--random_flip", "--balance_classes"]
    segment(vit_base, scenes, tmp_path / "a", *flags, "--dice_weight", "0.3")
    AcceleratorState._reset_state(reset_partial_state=True)
    rare = tmp_path / "rare"
    for path in sorted(stripes.glob("across/*.png"))[:4] + sorted(stripes.glob("down/*.png")):
        (rare / path.parent.name).mkdir(parents=True, exist_ok=True)
        (rare / path.parent.name / path.name).write_bytes(path.read_bytes())
    validation = ["--validation_data_dir", str(stripes)]
    classify(vit_base, rare, tmp_path / "b", *flags, *validation)
    assert [arguments[1:3] for arguments in seen.fetch] == [(0.7, True)] * 2
    ((weights, dice),) = seen.loss
    assert dice == 0.3 and weights[1] > weights[0]  # squares cover less than the ground
    assert seen.entropy[0].tolist() == pytest.approx([1.5, 0.5])  # 4 and 12 images


def test_a_flip_mirrors_image_and_mask_together():
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))).convert("RGB")
    mask = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
    item = SimpleNamespace(name="a", read=image.copy)
    fetch = Fetch(Preprocessing((16, 16), (0, 0, 0), (1, 1, 1)), 1.0, True, {"a": lambda: mask})
    made = [fetch(item, (16, 16), torch.Generator().manual_seed(seed)) for seed in range(8)]
    straight = [x for x in made if x[3, 0, 0] == 0]
    mirrored = [x for x in made if x[3, 0, 0] == 15]
    assert straight and mirrored and len(straight) + len(mirrored) == 8
    assert torch.equal(mirrored[0], straight[0].flip(-1))


def test_fully_trained_model_opens_where_its_folder_was_moved(vit_base, stripes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classify(vit_base, stripes, "out", *QUICK, "--adapter", "full")
    before = SerialLoraForImageClassification.from_pretrained("out")
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    after = SerialLoraForImageClassification.from_pretrained(tmp_path / "moved")
    x = torch.randn(1, 3, *before.preprocessing.size)
    assert torch.equal(after(x).logits, before(x).logits)


def test_pipelines_open_what_was_trained_with_peft_and_a_head_alone_is_refused(
    vit_base, stripes, tmp_path, monkeypatch
):
    trained = []
    finish = vision.Run.finish
    monkeypatch.setattr(vision.Run, "finish", lambda run, w=None: trained.append(run.models["model"]) or finish(run, w))
    classify(vit_base, stripes, tmp_path, *QUICK, "--max_train_steps", "20", "--adapter", "lora")
    path = sorted(stripes.glob("*/*.png"))[0]
    model = trained[0].eval()
    expected = model(model.preprocessing(Image.open(path))[None]).logits.softmax(1)[0]
    (result,) = classify_images.main([str(path), "--model", str(tmp_path)])
    found = {entry["label"]: entry["probability"] for entry in result["classes"]}
    assert [found[name] for name in model.label_names] == pytest.approx(expected.tolist(), rel=1e-4)
    for flags in (["--fuse"], ["--scale", "0.5"]):
        with pytest.raises(SerialLoraError, match="PEFT's LoRA"):
            classify_images.main([str(path), "--model", str(tmp_path), *flags])
    with pytest.raises(SerialLoraError, match="pytorch_lora_weights"):
        SerialLoraForImageClassification.from_pretrained(tmp_path, weight_name="head.safetensors")


def test_fuse_leaves_plain_models_whose_results_are_the_live_ones(vit_base, stripes, scenes, tmp_path, monkeypatch):
    opened = []
    predictions = inference.predictions

    def watched(model, *arguments):
        opened.append([name for name, _ in model.named_modules() if "serial_lora" in name])
        return predictions(model, *arguments)

    monkeypatch.setattr(classify_images, "predictions", watched)
    monkeypatch.setattr(segment_images, "predictions", watched)
    classify(vit_base, stripes, tmp_path / "classes", *QUICK)
    AcceleratorState._reset_state(reset_partial_state=True)
    segment(vit_base, scenes, tmp_path / "masks", *QUICK, "--max_train_steps", "20")
    common = [str(scenes / "images"), "--model", str(tmp_path / "masks")]
    for flags in ([], ["--fuse"]):
        classify_images.main([str(stripes), "--model", str(tmp_path / "classes"), *flags])
        segment_images.main([*common, "--output_dir", str(tmp_path / "".join(["live", *flags])), *flags])
    assert opened[0] and opened[1] and not opened[2] and not opened[3]
    live, fused = (np.asarray(Image.open(tmp_path / name / "3_mask.png")) for name in ("live", "live--fuse"))
    assert (live == fused).mean() > 0.999 and 0 < live.mean() < 1


def test_damaged_files_are_left_out_and_named_and_no_result_is_written_over(vit_base, scenes, tmp_path):
    segment(vit_base, scenes, tmp_path / "model", *QUICK)
    photos = tmp_path / "photos"
    for name in ("a.png", "a_2.png", "inside/a.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes((scenes / "images" / "0.png").read_bytes())
    (photos / "broken.png").write_bytes(b"no image")
    argv = [str(photos), "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    results = segment_images.main(argv)
    assert len({result["mask"] for result in results}) == len(results) == 3
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [entry["file"] for entry in report["skipped"]] == [str(photos / "broken.png")]
    with pytest.raises(SerialLoraError, match="none of the 1 files is an image"):
        segment_images.main([str(photos / "broken.png"), *argv[1:]])
    with pytest.raises(SerialLoraError, match="--opacity"):
        segment_images.main([*argv, "--opacity", "7"])


@pytest.mark.parametrize("side", [30, 1600])
def test_legend_fits_and_grows_with_the_image(side):
    names = ["background", "a rather long name of a class"]
    picture = overlay(Image.new("RGB", (side, side)), np.ones((side, side), np.uint8), names)
    legend = np.asarray(picture)[side:]
    assert len(legend) >= side // 40
    dark: Any = (legend < 100).all(-1)
    assert dark.any() and not dark[:, -1].any()  # the text ends before the picture does
    assert dark.any(0).nonzero()[0].max() > 100
