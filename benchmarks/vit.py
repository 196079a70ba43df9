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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from benchmarks.harness import RESULTS, machine, write_results
from benchmarks.vit_tasks import Split, Task, classification, segmentation
from slora_diffusers import SerialLoraConfig
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.training.methods import PeftLora
from slora_diffusers.training.optim import parameter_groups
from slora_diffusers.training.precision import trainable
from slora_diffusers.training.randomness import generator
from slora_diffusers.training.start import start_from_gradient, warm_heads

RATES = (1e-3, 3e-3, 6e-3, 1e-2)
HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
HEAD_RATE = 3e-3  # of the new head beside an adapter
START_BATCHES = 8  # that a gradient start looks at: the first ones of the run
# What runs of one file must agree in; seeds, methods and rates may be added to.
SETTINGS = (
    "model", "data", "task", "shots", "size", "steps", "warmup", "batch_size", "validation_images", "test_images",
)  # fmt: skip
OUTPUT = ("hidden_states", "attention_output")


@dataclass(frozen=True)
class Method:
    """One way to adapt the backbone, and the learning rates it may choose from."""

    kind: str
    rank: int = 0
    inputs: tuple[str, ...] | None = None
    rates: tuple[float, ...] = RATES
    init: str = "kaiming"
    plus: float = 1.0  # LoRA+: the rate of B over that of A
    output_rank: int | None = None  # of the pairs on the attentions' outputs, if another


METHODS = {
    "head": Method("head", rates=HEAD_RATES),
    "lora-r8": Method("lora", 8),
    "lora-r4": Method("lora", 4),
    "lora-r2": Method("lora", 2),
    "serial-r8": Method("serial", 8),
    "serial-r4+output": Method("serial", 4, OUTPUT),
    "serial-r6+output-r2": Method("serial", 6, OUTPUT, output_rank=2),
    "serial-r8+output": Method("serial", 8, OUTPUT),
    "lora-r8-gradient": Method("lora", 8, init="gradient"),
    "lora-r4-gradient": Method("lora", 4, init="gradient"),
    "lora-r2-gradient": Method("lora", 2, init="gradient"),
    "serial-r8-gradient": Method("serial", 8, init="gradient"),
    "serial-r8+output-gradient": Method("serial", 8, OUTPUT, init="gradient"),
    "serial-r16+output": Method("serial", 16, OUTPUT),
    "serial-r32": Method("serial", 32),
    "serial-r4+output+mlp": Method("serial", 4, (*OUTPUT, "feed_forward")),
    "full": Method("full", rates=FULL_RATES),
}
# Variations of Serial LoRA of rank 8, measured when they are asked for.
VARIATIONS = {
    "serial-r8-gaussian": Method("serial", 8, rates=(1e-4, 3e-4, 1e-3), init="gaussian"),
    "serial-r8-plus4": Method("serial", 8, rates=(1e-3, 3e-3), plus=4.0),
    "serial-r8-plus16": Method("serial", 8, rates=(3e-4, 1e-3), plus=16.0),
}
ALL = {**METHODS, **VARIATIONS}


def build(task: Task, backbone: nn.Module, method: Method, size: int) -> Any:
    """A new head on a copy of the backbone, and the method's adapter."""
    config = None
    if method.kind == "serial":
        ranks = {r".*attention_output": method.output_rank} if method.output_rank else {}
        init = "kaiming" if method.init == "gradient" else method.init
        config = SerialLoraConfig(rank=method.rank, rank_pattern=ranks, inputs=method.inputs, init=init)
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


def stepper(
    model: Any, rate: float, head_rate: float, warmup: int, steps: int, plus: float = 1.0
) -> Callable[[Tensor, Tensor], None]:
    """A function that takes one training step: AdamW, a warm-up and a cosine."""
    groups = [
        *parameter_groups(trainable([model.backbone]), rate, plus),
        {"params": list(model.head.parameters()), "lr": head_rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    model.train()

    def step(images: Tensor, labels: Tensor) -> None:
        model(images, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return step


def train(model: Any, split: Split, method: Method, rate: float, seed: int, options: argparse.Namespace) -> None:
    """All steps of a run."""
    if method.init == "gradient":
        first = list(islice(batches(split, options.batch_size, seed), START_BATCHES))
        losses = [partial(lambda images, labels: model(images, labels=labels).loss, *batch) for batch in first]
        with warm_heads([model], [model.head], losses):
            start_from_gradient({"model": model}, lambda: [loss().backward() for loss in losses])
    head_rate, warmup = rate if method.kind == "head" else HEAD_RATE, round(options.warmup * options.steps)
    step = stepper(model, rate, head_rate, warmup, options.steps, method.plus)
    for _, (images, labels) in zip(range(options.steps), batches(split, options.batch_size, seed), strict=False):
        step(images, labels)


def time_steps(task: Task, backbone: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of a training step, the methods in turns: medians over rounds, and over the first LoRA's."""
    split = task.train(0)
    images, labels = split.images[: options.batch_size], split.labels[: options.batch_size]
    steppers = {name: stepper(build(task, backbone, METHODS[name], options.size), 0.0, 0.0, 0, 1) for name in METHODS}
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(1 + options.cost_rounds):
        for name, step in steppers.items():
            start = time.process_time()
            step(images, labels)
            if number:  # the first one warms up
                taken[name].append(time.process_time() - start)
    lora = taken["lora-r8"]
    return {
        name: {
            "cpu_seconds_per_step": statistics.median(own),
            "over_lora": statistics.median(x / y for x, y in zip(own, lora, strict=True)),
        }
        for name, own in taken.items()
    }


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
    method, split = ALL[name], task.train(seed)
    torch.manual_seed(seed)
    model = build(task, backbone, method, options.size)
    memory = saved_bytes(model, split, options.batch_size)
    train(model, split, method, rate, seed, options)
    parameters = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    return {
        "method": name, "rate": rate, "seed": seed, "tuning": tuning, "parameters": parameters, "bytes": 4 * parameters,
        "saved_activations": memory, "score": evaluate(model, task, task.validation if tuning else task.test),
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
    lora = next((own for name, own in scores.items() if ALL[name].kind == "lora"), {})
    summary = {}
    for name in (name for name in ALL if name in scores):
        own = scores[name]
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
            **{key: first[key] for key in ("parameters", "bytes", "saved_activations")},
        }
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs that are missing, the rates first, then the seeds in turn over the methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a vision backbone of transformers")
    parser.add_argument("--data", required=True, help=".npz with images (N, h, w) uint8 and labels (N,)")
    parser.add_argument("--task", default="classification", choices=("classification", "segmentation"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=ALL)
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
    parser.add_argument("--cost_rounds", type=int, default=20, help="steps that are timed, of every method in turn")
    parser.add_argument("--name", default=None, help="of the results; by default from the task and the shots")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)  # so that processor seconds are the program's own
    name = options.name or f"vit_{options.task}_{options.shots}shot"
    task = {"classification": classification, "segmentation": segmentation}[options.task](options)
    backbone = task.heads.from_backbone(options.model, task.classes, None).backbone
    path = options.output_dir / f"{name}.json"
    settings = {key: getattr(options, key) for key in SETTINGS}
    settings |= {"model": Path(options.model).name, "data": Path(options.data).name}
    before = json.loads(path.read_text()) if path.exists() else {"options": settings, "runs": []}
    if changed := {key: before["options"][key] for key in SETTINGS if before["options"][key] != settings[key]}:
        raise SerialLoraError(f"{path} holds runs with other settings, {changed}: give these, or another --name.")
    runs: list[dict[str, Any]] = before["runs"]
    costs = before.get("costs", {})

    def write() -> None:
        methods = {key: asdict(ALL[key]) for key in ALL if any(r["method"] == key for r in runs)}
        content = {"machine": machine(), "options": settings, "methods": methods, "summary": summarise(runs)}
        write_results(name, content | {"costs": costs, "runs": runs}, options.output_dir)

    def do(method: str, rate: float, seed: int, tuning: bool) -> None:
        if any((r["method"], r["rate"], r["seed"], r["tuning"]) == (method, rate, seed, tuning) for r in runs):
            return
        gc.collect()  # adapted models hold references in circles: the last one goes before the next comes
        runs.append(run(task, backbone, method, rate, seed, tuning, options))
        write()
        print(f"{method} {rate=:g} {seed=} {'validation' if tuning else 'test'} {runs[-1]['score']:.1f}", flush=True)

    for seed in options.tuning_seeds:
        for method in options.methods:
            for rate in options.rates or ALL[method].rates:
                do(method, rate, seed, True)
    for seed in options.seeds:
        for method in options.methods:
            do(method, best_rate(runs, method), seed, False)
    if options.cost_rounds:
        costs = time_steps(task, backbone, options)
        write()


if __name__ == "__main__":
    main()
