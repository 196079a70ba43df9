"""Every recipe through `accelerate launch`, in a fresh folder, on photographs: trained, resumed and opened again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from matplotlib import cbook
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from sklearn.datasets import load_sample_images

from slora_diffusers import (
    SerialLoraForImageClassification,
    SerialLoraForPromptClassification,
    SerialLoraForSemanticSegmentation,
    load_serial_lora,
)
from slora_diffusers.recipes.catalog import training_recipes
from tests.tiny.flows import FLOWS
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline
from tests.tiny.vision import VISION
from tests.vision_recipes import write_clip

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
WEIGHTS = "serial_lora_weights.safetensors"
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
PIPELINES = {
    "dit": lambda: tiny_dit_pipeline("flow_prediction"), "dreambooth-sd3": tiny_sd3_pipeline,
    "dreambooth-flux": tiny_flux_pipeline, "dreambooth-pixart": lambda: tiny_pixart_pipeline("sigma"),
    **{f"dreambooth-{name.replace('_', '-')}": make for name, make in FLOWS.items()},
}  # fmt: skip
HEADS = {
    "clip": SerialLoraForPromptClassification, "vit-classification": SerialLoraForImageClassification,
    "vit-segmentation": SerialLoraForSemanticSegmentation,
}  # fmt: skip


def photographs():
    """Photographs that scikit-image, scikit-learn and matplotlib ship."""
    found = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    found |= {Path(n).stem: i for n, i in zip(load_sample_images().filenames, load_sample_images().images, strict=True)}
    with Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as portrait:
        found["grace_hopper"] = np.array(portrait.convert("RGB"))
    return {name: Image.fromarray(pixels) for name, pixels in found.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The photographs as people keep them: JPEG and PNG of any shape, by class, with captions, with masks."""
    root = tmp_path_factory.mktemp("photographs")
    for index, (name, photo) in enumerate(photographs().items()):
        photo.thumbnail((200, 200))
        people = name in ("astronaut", "grace_hopper")
        by_class = root / "classes" / ("0" if people else "1")
        by_name = root / "named" / ("people" if people else "things")
        for folder in (by_class, by_name, root / "captioned", root / "scenes" / "images", root / "scenes" / "masks"):
            folder.mkdir(parents=True, exist_ok=True)
        ending = ".jpg" if index % 2 else ".png"
        for folder in (by_class, root / "captioned", root / "scenes" / "images"):
            photo.save(folder / f"{name}{ending}")
        for part in range(3):  # crops, so that something can be held out
            x, y = part * photo.width // 6, part * photo.height // 6
            photo.crop((x, y, x + photo.width // 2, y + photo.height // 2)).save(by_name / f"{name}-{part}{ending}")
        (root / "captioned" / f"{name}.txt").write_text(f"a photo of {name.replace('_', ' ')}")
        bright = np.array(photo.convert("L")) > 128
        Image.fromarray(bright.astype(np.uint8)).save(root / "scenes" / "masks" / f"{name}.png")
    (root / "labels.json").write_text(json.dumps({"dark": 0, "bright": 1}))
    return root


def flags_of(recipe, folders):
    """Where a recipe finds its images, and a run of two steps."""
    common = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 2, "rank": 2, "train_batch_size": 2}
    if recipe in HEADS:
        where = {"train_data_dir": folders / "named"}
        if recipe == "vit-segmentation":
            where = {"train_data_dir": folders / "scenes", "label_map": folders / "labels.json"}
        return {**common, **where}
    drawn = {"resolution": 32, "validation_inference_steps": 2, "num_validation_images": 1, "cache_latents": True}
    if recipe == "dit":
        return {**common, **drawn, "train_data_dir": folders / "classes"}
    text = {"instance_data_dir": folders / "captioned", "max_sequence_length": 16, "aspect_ratio_buckets": "auto"}
    return {**common, **drawn, **text, "validation_prompt": "a photo of chelsea"}


def launch(recipe, out, **flags):
    script = ROOT / "train_scripts" / f"train_{recipe.replace('-', '_')}.py"
    argv = [part for name, value in flags.items() for part in ([f"--{name}"] + ([] if value is True else [str(value)]))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *LAUNCH, str(script), "--output_dir", str(out), *argv]
    done = subprocess.run(command, env=environment, cwd=out.parent, timeout=500, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_every_recipe_is_tried():
    assert {*PIPELINES, *HEADS} == set(training_recipes())


@pytest.mark.parametrize("recipe", sorted({*PIPELINES, *HEADS}))
def test_a_recipe_runs_from_photographs_to_what_is_opened_again(recipe, folders, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    if recipe in PIPELINES:
        PIPELINES[recipe]().save_pretrained(base)
    elif recipe == "clip":
        base.mkdir()
        write_clip(base)
    else:
        VISION["Dinov2Model"].build().save_pretrained(base)
    flags = {"pretrained_model_name_or_path": base, **flags_of(recipe, folders)}
    launch(recipe, out, **flags)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    first = load_file(out / WEIGHTS)
    assert any(tensor.any() for name, tensor in first.items() if "lora_B" in name)

    # The run that its config.yaml writes down, from half-way, in another folder, is the same.
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["max_train_steps"] == 2
    again = tmp_path / "again"
    launch(recipe, again, config=out / "config.yaml", resume_from_checkpoint=out / "checkpoint-1")
    second = load_file(again / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    # And it opens: in a pipeline that draws otherwise than its base, or as a model with the classes' names.
    if recipe in HEADS:
        model = HEADS[recipe].from_pretrained(out)
        assert len(model.label_names) == 2
        photo = Image.fromarray(data.chelsea())
        assert torch.isfinite(model(model.preprocessing(photo)[None]).logits).all()
        return
    pipe = DiffusionPipeline.from_pretrained(base)
    load_serial_lora(pipe, out)
    assert pipe.transformer.training is False
    assert sorted(path.name for path in (out / "validation").glob("*.png")) == [
        "images-000000.png",
        "images-000002.png",
    ]
    assert (out / "steps.png").is_file()
