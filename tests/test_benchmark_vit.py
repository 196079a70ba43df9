"""benchmarks/vit.py on a tiny backbone: every method runs, costs what it says, and is not done twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import segmentation_heads, vit, vit_tasks
from slora_diffusers.errors import SerialLoraError
from tests.tiny.vision import VISION

METHODS = ["head", "lora-r2", "serial-r8", "serial-r4+output", "full"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, r = tmp_path_factory.mktemp("vit"), np.random.default_rng(0)
    VISION["Dinov2Model"].build().save_pretrained(folder / "base")
    labels = np.arange(300) % 10
    images = (r.integers(0, 60, (300, 28, 28)) + 15 * labels[:, None, None]).astype(np.uint8)
    np.savez(folder / "digits.npz", images=images, labels=labels.astype(np.uint8))
    return folder


def run(files, out, *flags) -> dict:
    common = ["--model", str(files / "base"), "--data", str(files / "digits.npz"), "--output_dir", str(out)]
    sizes = [
        "--size",
        "16",
        "--steps",
        "3",
        "--batch_size",
        "8",
        "--validation_images",
        "20",
        "--test_images",
        "40",
        "--cost_rounds",
        "2",
    ]
    vit.main(
        [*common, *sizes, "--shots", "2", "--seeds", "0", "1", "--tuning_seeds", "7", "--rates", "1e-3", "1e-2", *flags]
    )
    return json.loads(next(out.glob("*.json")).read_text())


@pytest.mark.slow
def test_methods_cost_what_they_say_and_runs_are_kept(files, tmp_path, capsys):
    results = run(files, tmp_path, "--methods", *METHODS)
    d, blocks = 16, 2
    parameters = {name: row["parameters"] for name, row in results["summary"].items()}
    assert parameters["head"] == 0
    assert parameters["lora-r2"] == 8 * d * 2 * blocks
    assert parameters["serial-r8"] == 2 * d * 8 * blocks
    assert parameters["serial-r4+output"] == 2 * parameters["serial-r8"] / 2
    assert parameters["full"] == sum(p.numel() for p in VISION["Dinov2Model"].build().parameters())
    assert results["summary"]["head"]["saved_activations"] < results["summary"]["full"]["saved_activations"]
    assert all(row["cpu_seconds_per_step"] > 0 for row in results["costs"].values())
    assert set(results["costs"]) == set(vit.METHODS) and results["costs"]["lora-r8"]["over_lora"] == 1
    assert len(results["runs"]) == len(METHODS) * 4  # two rates at the tuning seed, the better one at two seeds
    for name, row in results["summary"].items():
        tuned = {r["rate"]: r["score"] for r in results["runs"] if r["method"] == name and r["tuning"]}
        assert tuned[row["rate"]] == max(tuned.values())
        test = [r["score"] for r in results["runs"] if r["method"] == name and not r["tuning"]]
        assert row["test"] == test and row["mean"] == pytest.approx(sum(test) / 2)
    differences = np.subtract(results["summary"]["serial-r8"]["test"], results["summary"]["lora-r2"]["test"])
    assert results["summary"]["serial-r8"]["over_lora"][0] == pytest.approx(differences.mean())
    capsys.readouterr()
    assert run(files, tmp_path, "--methods", *METHODS)["runs"] == results["runs"]
    assert capsys.readouterr().out == ""


def test_methods_are_added_to_those_that_are_there_and_other_settings_refused(files, tmp_path):
    run(files, tmp_path, "--methods", "lora-r2")
    results = run(files, tmp_path, "--methods", "serial-r8")
    assert list(results["methods"]) == list(results["summary"]) == ["lora-r2", "serial-r8"]
    with pytest.raises(SerialLoraError, match=r"other settings, .*warmup"):
        run(files, tmp_path, "--methods", "serial-r8", "--warmup", "0.5")


def test_segmentation_scores_masks(files, tmp_path):
    results = run(files, tmp_path, "--task", "segmentation", "--methods", "serial-r8")
    assert 0 < results["summary"]["serial-r8"]["mean"] < 100


def test_mean_iou_is_the_mean_over_classes():
    predicted, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert vit_tasks.mean_iou(predicted, truth) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_heads_are_compared_at_the_rate_that_validation_chose():
    def run(head, rate, seed, validation, test):
        return {"head": head, "rate": rate, "seed": seed, "parameters": 1, "validation": validation, "test": test}

    runs = [run("convolutional", 1.0, seed, 50 + seed, 40 + seed) for seed in range(3)]
    runs += [
        run("upernet", rate, seed, value, value - 10 + seed) for seed in range(3) for rate, value in ((1, 60), (2, 70))
    ]
    found = segmentation_heads.summarise(runs)
    assert (found["upernet"]["rate"], found["upernet"]["test"], found["upernet"]["validation"]) == (2, 61.0, 70.0)
    assert found["upernet"]["over_convolutional"] == 20.0 and found["upernet"]["over_convolutional_error"] == 0.0
    assert found["convolutional"]["test_error"] == pytest.approx(1 / 3**0.5)
