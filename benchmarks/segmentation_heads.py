"""Does a larger segmentation head pay? The library's heads against two over several layers that it does not have.

    python -m benchmarks.segmentation_heads --model DINOV2 --data DIGITS.npz

Digits over photographs (`vit_tasks`), Serial LoRA in the backbone, and on it: the linear head on the last layer, the
convolutional one over four, a linear one over the same four side by side (as DINOv2's own "ms"), and a UPerNet (Xiao et
al., arXiv 1807.10221). Every head has the same images, order, schedule and rate; of several --rates, the one that is
best on validation images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import vit
from benchmarks.harness import RESULTS, machine, write_results
from benchmarks.vit_tasks import Task, segmentation
from slora_diffusers.training.randomness import generator

ADAPTER, ADAPTER_RATE = "serial-r8+output", 3e-3  # the rate that benchmarks/vit.py chose for it
HEAD_RATES = (3e-3,)  # what a head beside an adapter gets everywhere
WIDTH = 64
Levels = Sequence[Tensor]


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, d, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def block(d: int, width: int, side: int) -> nn.Module:
    """Convolution, norm, activation."""
    return nn.Sequential(nn.Conv2d(d, width, side, padding=side // 2), Norm(width), nn.GELU())


class SideBySide(nn.Module):
    """W [x_1; ...; x_n] of norm'd levels."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(map(Norm, widths))
        self.classifier = nn.Conv2d(sum(widths), classes, 1)

    def forward(self, maps: Levels) -> Tensor:
        """Maps (B, d, h, w) -> (B, classes, h, w)."""
        return self.classifier(torch.cat([norm(x) for norm, x in zip(self.norms, maps, strict=True)], 1))


class UPerNet(nn.Module):
    """Levels at 4, 2, 1 and 1/2 of the patches' grid; pooled context on the last, a feature pyramid, side by side."""

    def __init__(self, widths: Sequence[int], classes: int, pools: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        a, b, c, d = widths
        up = nn.ConvTranspose2d
        self.scales = nn.ModuleList(
            [
                nn.Sequential(Norm(a), up(a, WIDTH, 2, 2), Norm(WIDTH), nn.GELU(), up(WIDTH, WIDTH, 2, 2)),
                nn.Sequential(Norm(b), up(b, WIDTH, 2, 2)),
                nn.Sequential(Norm(c), nn.Conv2d(c, WIDTH, 1)),
                nn.Sequential(Norm(d), nn.Conv2d(d, WIDTH, 1), nn.MaxPool2d(2)),
            ]
        )
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), block(WIDTH, WIDTH, 1)) for n in pools)
        self.context = block(WIDTH * (1 + len(pools)), WIDTH, 3)
        self.smooth = nn.ModuleList(block(WIDTH, WIDTH, 3) for _ in range(3))
        self.together = block(4 * WIDTH, WIDTH, 3)
        self.classifier = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, maps: Levels) -> Tensor:
        """Maps (B, d, h, w) -> (B, classes, 4 h, 4 w)."""
        levels = [scale(x) for scale, x in zip(self.scales, maps, strict=True)]
        last = levels[-1]
        levels[-1] = self.context(torch.cat([last, *(sized(pool(last), last) for pool in self.pools)], 1))
        for i in (2, 1, 0):
            levels[i] = levels[i] + sized(levels[i + 1], levels[i])
        levels[:3] = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)]
        return self.classifier(self.together(torch.cat([sized(x, levels[0]) for x in levels], 1)))


def sized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear")


HEADS: dict[str, Callable[[Sequence[int], int], nn.Module] | None] = {
    "linear": None,
    "convolutional": None,
    "side by side": SideBySide,
    "UPerNet": UPerNet,
}
"""Name -> the head to put in the place of the convolutional one; None for the library's own."""


def build(task: Task, backbone: nn.Module, name: str, size: int) -> Any:
    """The adapted backbone with a head."""
    settings = {"head": "linear"} if name == "linear" else {"head": "convolutional", "width": WIDTH}
    model = vit.build(replace(task, settings=settings), backbone, vit.METHODS[ADAPTER], size)
    if make := HEADS[name]:
        model.head = make([level[1].in_channels for level in model.head.levels], task.classes)
    return model


def run(
    task: Task, backbone: nn.Module, name: str, rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once; scores on validation and test images."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator(seed, "head"))))
    model = build(task, backbone, name, options.size)
    step = vit.stepper(model, ADAPTER_RATE, rate, options.steps // 10, options.steps)
    split = task.train(seed)
    for _, (images, labels) in zip(range(options.steps), vit.batches(split, options.batch_size, seed), strict=False):
        step(images, labels)
    return {
        "head": name, "rate": rate, "seed": seed, "parameters": sum(p.numel() for p in model.head.parameters()),
        "validation": vit.evaluate(model, task, task.validation), "test": vit.evaluate(model, task, task.test),
    }  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per head at the rate that is best on validation images: test scores, and the difference to the convolutional."""
    best: dict[str, dict[int, dict[str, Any]]] = {}
    for name in dict.fromkeys(r["head"] for r in runs):
        rates = {r["rate"] for r in runs if r["head"] == name}
        own = {rate: {r["seed"]: r for r in runs if (r["head"], r["rate"]) == (name, rate)} for rate in rates}
        best[name] = max(own.values(), key=lambda seeds: statistics.mean(r["validation"] for r in seeds.values()))
    summary = {}
    for name, seeds in best.items():
        scores = [r["test"] for r in seeds.values()]
        base = best.get("convolutional", {})
        over = [r["test"] - base[seed]["test"] for seed, r in seeds.items() if seed in base]
        first = next(iter(seeds.values()))
        summary[name] = {"rate": first["rate"], "parameters": first["parameters"], **_mean("test", scores)}
        summary[name] |= _mean("over_convolutional", over)
    return summary


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {name: statistics.mean(values) if values else None, f"{name}_error": error}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write `results/segmentation_heads.json`, and return the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a vision backbone of transformers")
    parser.add_argument("--data", required=True, help=".npz with images (N, h, w) uint8 and labels (N,)")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(HEAD_RATES))
    parser.add_argument("--shots", type=int, default=16, help="training scenes per digit")
    parser.add_argument("--size", type=int, default=98, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--validation_images", type=int, default=150)
    parser.add_argument("--test_images", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    task = segmentation(options)
    backbone = task.heads.from_backbone(options.model, task.classes, None).backbone
    given = {key: getattr(options, key) for key in ("shots", "size", "steps", "batch_size", "test_images")}
    given |= {"model": Path(options.model).name, "data": Path(options.data).name}
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.heads:
            for rate in options.rates:
                runs.append(run(task, backbone, name, rate, seed, options))
                print(json.dumps(runs[-1]), flush=True)
                content = {"machine": machine(), "options": given, "summary": summarise(runs), "runs": runs}
                write_results("segmentation_heads", content, options.output_dir)
    return summarise(runs)


if __name__ == "__main__":
    main()
