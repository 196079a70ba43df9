"""DreamBooth with Serial LoRA, PEFT's LoRA and full fine-tuning: the same recipe, data order, noise and steps.

    python -m benchmarks.dreambooth

A tiny stock SD3 and a tiny PixArt-Sigma, whose latents have the unit variance of real ones, are each trained in full on
photographs that scikit-image ships, then taught a new subject (a cat that they have not seen) from five crops. The loss
is the fixed-noise loss on four other crops of the same photograph.
Every run is a process of its own, so that its peak memory is its own. Each method's learning rate is the best of three.
Then Serial LoRA learns the subject without and with prior preservation of a class that the base knows; what it forgets
is the fixed-noise loss on other images of that class.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from skimage import data

from benchmarks.harness import RESULTS, machine, write_results
from slora_diffusers.training.data.folders import find_images
from slora_diffusers.training.data.images import to_pixels
from tests.tiny.pipelines import tiny_pixart_pipeline, tiny_sd3_pipeline

ROOT = Path(__file__).parents[1]
FAMILIAR = {"astronaut": "an astronaut", "coffee": "a cup of coffee", "rocket": "a rocket"}
SUBJECT = "a photo of sks cat"
CLASS = "a photo of an astronaut"
RESOLUTION = 32
RATES = (3e-3, 1e-2, 3e-2)
LEARNING_RATES = {
    "none": (0.0,), "serial": RATES, "serial+output": RATES, "lora": RATES, "full": (3e-4, 1e-3, 3e-3),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A recipe, a tiny pipeline that it trains, and its pairs in front of attentions and their output projections."""

    script: str
    pipeline: Callable[[], Any]
    pairs: tuple[str, ...]


PAIRS = ("hidden_states", "encoder_hidden_states", "attention_output")
FAMILIES = {
    "SD3": Family("train_dreambooth_sd3.py", tiny_sd3_pipeline, (*PAIRS, "encoder_attention_output")),
    "PixArt-Sigma": Family("train_dreambooth_pixart.py", lambda: tiny_pixart_pipeline("sigma"), PAIRS),
}


def write_crops(name: str, count: int, folder: Path, caption: str | None, seed: int) -> None:
    """Random square crops of one photograph at 64 x 64, each with its caption if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    photo, draw = Image.fromarray(getattr(data, name)()), np.random.default_rng(seed)
    for index in range(count):
        side = int(draw.uniform(0.5, 0.9) * min(photo.size))
        x, y = (int(draw.integers(0, room - side + 1)) for room in photo.size)
        crop = photo.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.LANCZOS)
        crop.save(folder / f"{name}-{index}.png")
        if caption is not None:
            (folder / f"{name}-{index}.txt").write_text(caption)


def train(family: Family, base: Path, images: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Run the recipe in a process of its own; returns its log."""
    fixed = {
        "pretrained_model_name_or_path": base, "instance_data_dir": images, "output_dir": out, "resolution": RESOLUTION,
        "max_sequence_length": 16, "num_validation_images": 0, "checkpointing_steps": 0, "rank": 8,
    }  # fmt: skip
    flags: list[str] = []
    for name, value in {**fixed, **options}.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        flags += [f"--{name}", *map(str, values)]
    script = str(ROOT / "train_scripts" / family.script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, script, *flags, "--cache_latents"], env=environment, check=True, capture_output=True
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, images: Path) -> None:
    """Give the latents of the images unit variance: with less, predicting the noise is trivial."""
    pixels = torch.stack([to_pixels(item.read(), (RESOLUTION, RESOLUTION)) for item in find_images(images).items])
    vae.register_to_config(scaling_factor=1 / vae.encode(pixels).latent_dist.mean.std().item())  # pyright: ignore


def pretrained(family: Family, folder: Path, steps: int) -> Path:
    """A tiny pipeline that has seen photographs, but not the subject's."""
    for seed, (name, words) in enumerate(FAMILIAR.items()):
        write_crops(name, 24, folder / "photos", f"a photo of {words}", seed)
    pipe = family.pipeline()
    scale_latents(pipe.vae, folder / "photos")
    pipe.save_pretrained(folder / "random")
    settings = {"adapter": "full", "learning_rate": 1e-3, "train_batch_size": 8, "max_train_steps": steps}
    log = train(family, folder / "random", folder / "photos", folder / "tuned", validation_steps=steps, **settings)
    print("pretraining:", [line["validation_loss"] for line in log if "validation_loss" in line], flush=True)
    pipe.transformer = type(pipe.transformer).from_pretrained(folder / "tuned" / "transformer")
    pipe.save_pretrained(folder / "base")
    return folder / "base"


def summary(log: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """What one run gave: loss before and after, peak memory, bytes of its file; for speed see benchmarks.step."""
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    steps = [line for line in log if "seconds" in line]
    files = [*out.glob("*.safetensors"), *out.glob("transformer/*.safetensors")]
    return {
        "loss_before": losses[0],
        "loss": losses[-1],
        "peak_memory": max(line["memory"] for line in steps),
        "file_bytes": sum(path.stat().st_size for path in files),
        "parameters": sum(map(parameters_in, files)),
    }


def parameters_in(path: Path) -> int:
    """Numbers in a safetensors file."""
    with safe_open(path, "np") as file:
        return sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118


def forgetting(family: Family, base: Path, folder: Path, learning_rate: float, steps: int) -> dict[str, float]:
    """Fixed-noise loss on unseen images of a class: with the base, and after learning the subject, in two ways."""
    write_crops("astronaut", 8, folder / "class", None, 12)
    write_crops("astronaut", 4, folder / "class-unseen", CLASS, 13)
    prior = {
        "with_prior_preservation": True, "class_data_dir": folder / "class", "class_prompt": CLASS,
        "num_class_images": 8,
    }  # fmt: skip
    losses = {}
    for name, options in {"without_prior": {}, "with_prior": prior}.items():
        counts = {"max_train_steps": steps, "validation_steps": steps, "train_batch_size": 4}
        unseen = {"validation_data_dir": folder / "class-unseen", "learning_rate": learning_rate}
        log = train(family, base, folder / "subject", folder / name, **counts, **unseen, **options)
        found = [line["validation_loss"] for line in log if "validation_loss" in line]
        losses |= {"base": found[0], name: found[-1]}
    return losses


def measure(family: Family, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every method at its best rate, and what the class lost."""
    base = pretrained(family, folder, options.pretraining_steps)
    write_crops("chelsea", 5, folder / "subject", SUBJECT, 10)
    write_crops("chelsea", 4, folder / "unseen", SUBJECT, 11)
    results: dict[str, Any] = {}
    for method, rates in LEARNING_RATES.items():
        for lr in rates:
            out = folder / f"{method}-{lr}"
            settings: dict[str, Any] = {"adapter": method if method in ("lora", "full") else "serial"}
            settings |= {"learning_rate": lr, **({"inputs": family.pairs} if method == "serial+output" else {})}
            counts = {"max_train_steps": options.steps, "validation_steps": options.steps, "train_batch_size": 4}
            log = train(
                family, base, folder / "subject", out, validation_data_dir=folder / "unseen", **counts, **settings
            )
            measured = {"learning_rate": lr, **summary(log, out)}
            print(method, measured, flush=True)
            if method not in results or measured["loss"] < results[method]["loss"]:
                results[method] = measured
    results["class_loss"] = forgetting(family, base, folder, results["serial"]["learning_rate"], options.steps)
    print(results["class_loss"], flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print what each run gave, write the results and give their path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="Steps on the subject.")
    parser.add_argument("--pretraining_steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder of dreambooth.json.")
    options = parser.parse_args(argv)
    results = {}
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(family, Path(folder), options)
    content = {"machine": machine(), "steps": options.steps, "families": results}
    return write_results("dreambooth", content, options.output)


if __name__ == "__main__":
    print(main())
