"""Few-shot vision: Serial LoRA against PEFT's LoRA, a head alone and full fine-tuning on a pretrained backbone.

    python -m benchmarks.vit --model DINOV2 --data DIGITS.npz --shots 16 --seeds 0 1 2 3 4

Every method has the same images, order, schedule and small grid of learning rates. The rate is chosen by the mean
score on validation images over seeds of its own; test images are looked at once per reported seed, with that rate.
Every run is written as it ends, and a run that is there already is not done again.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from benchmarks.harness import RESULTS, machine, write_results
from slora_diffusers import SerialLoraConfig
from slora_diffusers.preprocessing import Preprocessing
from slora_diffusers.training.adapters import PeftLora
from slora_diffusers.training.few_shot import k_shot
from slora_diffusers.training.randomness import generator
from slora_diffusers.training.scores import Overlap, confusion_matrix
from slora_diffusers.vision import SerialLoraForImageClassification, SerialLoraForSemanticSegmentation

RATES = (1e-3, 3e-3, 6e-3, 1e-2)
HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
HEAD_RATE = 3e-3  # of the new head beside an adapter
OUTPUT = ("hidden_states", "attention_output")


@dataclass(frozen=True)
class Method:
    """One way to adapt the backbone, and the learning rates it may choose from."""

    kind: str
    rank: int = 0
    inputs: tuple[str, ...] | None = None
    rates: tuple[float, ...] = RATES


METHODS = {
    "head": Method("head", rates=HEAD_RATES),
    "lora-r8": Method("lora", 8),
    "lora-r2": Method("lora", 2),
    "serial-r8": Method("serial", 8),
    "serial-r4+output": Method("serial", 4, OUTPUT),
    "serial-r8+output": Method("serial", 8, OUTPUT),
    "serial-r32": Method("serial", 32),
    "serial-r4+output+mlp": Method("serial", 4, (*OUTPUT, "feed_forward")),
    "full": Method("full", rates=FULL_RATES),
}


@dataclass(frozen=True)
class Split:
    """Images as pixel values (N, 3, H, W), and labels: (N,) classes or (N, H, W) masks."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A head, its data (the training images depend on the seed), and the score of its predictions, in percent."""

    heads: type
    settings: dict[str, Any]
    classes: int
    train: Callable[[int], Split]
    validation: Split
    test: Split
    score: Callable[[Tensor, Tensor], float]


def read_digits(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (N, h, w) uint8 and their classes (N,), in an order that does not follow the file's."""
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order].astype(np.int64)


def classification(options: argparse.Namespace) -> Task:
    """Digits by class."""
    images, labels = read_digits(options.data)
    prepare = Preprocessing((options.size, options.size))

    def split(chosen: Sequence[int]) -> Split:
        grey = torch.from_numpy(images[list(chosen)]).float()[:, None] / 255  # (N, 1, h, w)
        pixels = F.interpolate(grey, prepare.size, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        return Split(prepare.normalize(pixels), torch.from_numpy(labels[list(chosen)]))

    return task_of(SerialLoraForImageClassification, {}, 10, labels, split, accuracy, options)


def segmentation(options: argparse.Namespace) -> Task:
    """Coloured digits over crops of a photograph (another one for testing): per pixel, background or digit."""
    from sklearn.datasets import load_sample_images

    images, labels = read_digits(options.data)
    photographs = [torch.from_numpy(p).permute(2, 0, 1) / 255 for p in load_sample_images().images]
    prepare = Preprocessing((options.size, options.size))

    def compose(index: int) -> tuple[Tensor, Tensor]:
        draw = generator(0, "scene", index)
        photo = photographs[index < options.test_images]
        top, left = (int(torch.randint(n - options.size, (1,), generator=draw)) for n in photo.shape[1:])
        scene = photo[:, top : top + options.size, left : left + options.size].clone()
        side = int(torch.randint(options.size // 2, options.size * 9 // 10, (1,), generator=draw))
        y, x = torch.randint(options.size - side + 1, (2,), generator=draw).tolist()
        grey = torch.from_numpy(images[index]).float()[None, None] / 255
        alpha = F.interpolate(grey, (side, side), mode="bilinear", antialias=True)[0]  # (1, side, side)
        colour = torch.rand(3, 1, 1, generator=draw)
        window = scene[:, y : y + side, x : x + side]
        window.copy_(window * (1 - alpha) + colour * alpha)
        mask = torch.zeros(options.size, options.size, dtype=torch.long)
        mask[y : y + side, x : x + side][alpha[0] > 0.5] = 1
        return prepare.normalize(scene), mask

    def split(chosen: Sequence[int]) -> Split:
        scenes, masks = zip(*map(compose, chosen), strict=True)
        return Split(torch.stack(scenes), torch.stack(masks))

    return task_of(
        SerialLoraForSemanticSegmentation, {"head": "convolutional", "width": 64}, 2, labels, split, mean_iou, options
    )


def task_of(
    heads: type,
    settings: dict[str, Any],
    classes: int,
    labels: np.ndarray,
    split: Callable[[Sequence[int]], Split],
    score: Callable[[Tensor, Tensor], float],
    options: argparse.Namespace,
) -> Task:
    """The first images are for testing, the next for validation, the rest for training."""
    test, held = options.test_images, options.test_images + options.validation_images
    rest = labels[held:].tolist()

    def train(seed: int) -> Split:
        return split([held + i for i in k_shot(rest, options.shots, seed)])

    return Task(heads, settings, classes, train, split(range(test, held)), split(range(test)), score)


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Share of right predictions, in percent."""
    return 100 * (predicted == truth).float().mean().item()


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Mean over the classes that occur of intersection over union, in percent."""
    classes = 1 + int(max(predicted.max(), truth.max()))
    return Overlap.of(confusion_matrix(predicted, truth, classes)).means()["miou"]


def build(task: Task, backbone: nn.Module, method: Method, size: int) -> Any:
    """A new head on a copy of the backbone, and the method's adapter."""
    config = SerialLoraConfig(rank=method.rank, inputs=method.inputs) if method.kind == "serial" else None
    preprocessing = Preprocessing((size, size))
    model = task.heads.from_backbone(
        copy.deepcopy(backbone), task.classes, config, preprocessing=preprocessing, **task.settings
    )
    if method.kind == "lora":
        PeftLora().attach(model.backbone, SerialLoraConfig(rank=method.rank))
    elif method.kind == "full":
        model.backbone.requires_grad_(True)
    return model


def batches(split: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, each epoch in an order of its own."""
    epoch = 0
    while True:
        order = torch.randperm(len(split.labels), generator=generator(seed, "order", epoch))
        for chosen in order.split(size):
            yield split.images[chosen], split.labels[chosen]
        epoch += 1


def train(model: Any, split: Split, rate: float, seed: int, options: argparse.Namespace, head_rate: float) -> float:
    """AdamW, a warm-up and a cosine; returns the processor seconds of the median step."""
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": rate},
        {"params": list(model.head.parameters()), "lr": head_rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(options.warmup * options.steps), options.steps)
    model.train()
    seconds = []
    for _, (images, labels) in zip(range(options.steps), batches(split, options.batch_size, seed), strict=False):
        start = time.process_time()
        model(images, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


@torch.inference_mode()
def evaluate(model: Any, task: Task, split: Split) -> float:
    """The task's score, in percent."""
    model.eval()
    predicted = torch.cat([model(images).logits.argmax(1) for images in split.images.split(100)])
    return task.score(predicted, split.labels)


def saved_bytes(model: Any, split: Split, batch: int) -> int:
    """Bytes of activations that one training step keeps for its backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(split.images[:batch], labels=split.labels[:batch]).loss
    del loss
    return sum(kept.values())


def run(
    task: Task, backbone: nn.Module, name: str, rate: float, seed: int, tuning: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one method once; its score on validation images if it is tuned, else on test images, and what it cost."""
    method, split = METHODS[name], task.train(seed)
    torch.manual_seed(seed)
    model = build(task, backbone, method, options.size)
    memory = saved_bytes(model, split, options.batch_size)
    seconds = train(model, split, rate, seed, options, rate if method.kind == "head" else HEAD_RATE)
    parameters = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    return {
        "method": name, "rate": rate, "seed": seed, "tuning": tuning, "parameters": parameters, "bytes": 4 * parameters,
        "cpu_seconds_per_step": seconds, "saved_activations": memory,
        "score": evaluate(model, task, task.validation if tuning else task.test),
    }  # fmt: skip


def best_rate(runs: Sequence[dict[str, Any]], name: str) -> float:
    """The learning rate with the best mean validation score over the tuning seeds."""
    scores: dict[float, list[float]] = {}
    for r in runs:
        if r["method"] == name and r["tuning"]:
            scores.setdefault(r["rate"], []).append(r["score"])
    return max(scores, key=lambda rate: statistics.mean(scores[rate]))


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per method: the chosen rate, mean and standard deviation of the test scores over seeds, and the costs.

    `over_lora` is the mean over seeds of the difference to the first LoRA measured, with its standard error.
    """
    scores: dict[str, dict[int, float]] = {}
    for r in sorted((r for r in runs if not r["tuning"]), key=lambda r: r["seed"]):
        if r["rate"] == best_rate(runs, r["method"]):
            scores.setdefault(r["method"], {})[r["seed"]] = r["score"]
    lora = next((own for name, own in scores.items() if METHODS[name].kind == "lora"), {})
    summary = {}
    for name, own in scores.items():
        first = next(r for r in runs if r["method"] == name and not r["tuning"])
        paired = [score - lora[seed] for seed, score in own.items() if seed in lora]
        summary[name] = {
            "rate": best_rate(runs, name),
            "mean": statistics.mean(own.values()),
            "std": statistics.stdev(own.values()) if len(own) > 1 else None,
            "test": list(own.values()),
            "over_lora": [statistics.mean(paired), statistics.stdev(paired) / len(paired) ** 0.5]
            if len(paired) > 1
            else None,
            **{key: first[key] for key in ("parameters", "bytes", "cpu_seconds_per_step", "saved_activations")},
        }
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs that are missing, the rates first, then the seeds in turn over the methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a vision backbone of transformers")
    parser.add_argument("--data", required=True, help=".npz with images (N, h, w) uint8 and labels (N,)")
    parser.add_argument("--task", default="classification", choices=("classification", "segmentation"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates to choose from, instead of each method's own"
    )
    parser.add_argument("--shots", type=int, default=16, help="training images per class; 0 for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning_seeds", type=int, nargs="+", default=[100, 101], help="that choose the rates")
    parser.add_argument("--size", type=int, default=70, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps before the full learning rate")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--validation_images", type=int, default=500)
    parser.add_argument("--test_images", type=int, default=3000)
    parser.add_argument("--name", default=None, help="of the results; by default from the task and the shots")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)  # so that processor seconds are the program's own
    name = options.name or f"vit_{options.task}_{options.shots}shot"
    task = {"classification": classification, "segmentation": segmentation}[options.task](options)
    backbone = task.heads.from_backbone(options.model, task.classes, None).backbone
    path = options.output_dir / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def do(method: str, rate: float, seed: int, tuning: bool) -> None:
        if any((r["method"], r["rate"], r["seed"], r["tuning"]) == (method, rate, seed, tuning) for r in runs):
            return
        gc.collect()  # adapted models hold references in circles: the last one goes before the next comes
        runs.append(run(task, backbone, method, rate, seed, tuning, options))
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
        methods = {key: asdict(METHODS[key]) for key in options.methods}
        settings |= {"model": Path(options.model).name, "data": Path(options.data).name, "output_dir": None}
        content = {"machine": machine(), "options": settings, "methods": methods, "summary": summarise(runs)}
        write_results(name, content | {"runs": runs}, options.output_dir)
        print(f"{method} {rate=:g} {seed=} {'validation' if tuning else 'test'} {runs[-1]['score']:.1f}", flush=True)

    for seed in options.tuning_seeds:
        for method in options.methods:
            for rate in options.rates or METHODS[method].rates:
                do(method, rate, seed, True)
    for seed in options.seeds:
        for method in options.methods:
            do(method, best_rate(runs, method), seed, False)


if __name__ == "__main__":
    main()
