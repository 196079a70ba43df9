"""Does a larger segmentation head pay? The library's three on digits over photographs (`vit_tasks`).

    python -m benchmarks.segmentation_heads --model DINOV2 --data DIGITS.npz

The backbone is frozen, and its features are computed once: the linear head reads the last layer, the convolutional one
and UPerNet four. Every head has the same images, order and schedule; its rate is the one of --rates that is best on
validation images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from benchmarks import vit
from benchmarks.harness import RESULTS, machine, read_results, write_results
from benchmarks.vit_tasks import Split, Task, segmentation
from slora_diffusers.heads.backbones import last_features, layer_features
from slora_diffusers.heads.losses import pixel_cross_entropy
from slora_diffusers.heads.pixel_heads import ConvolutionalHead, UPerNet

HEAD_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WIDTH = 64
Levels = Sequence[Tensor]


HEADS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "linear": lambda widths, classes: nn.Conv2d(widths[-1], classes, 1),
    "convolutional": lambda widths, classes: ConvolutionalHead(widths, WIDTH, classes),
    "upernet": lambda widths, classes: UPerNet(widths, WIDTH, classes, [2, 1, 0, -1]),
}
"""Name -> a head over the levels, from their widths and the number of classes."""
Data = dict[tuple[str, int | None], tuple[list[Tensor], Tensor]]
"""{(part, seed of the training images): levels and masks}."""


@torch.inference_mode()
def features(backbone: nn.Module, split: Split) -> list[Tensor]:
    """Four layers' maps of every image, and the last one's as the linear head reads it: (N, d, h, w) each."""
    parts = []
    for images in split.images.split(50):
        depth = len(layer_features(backbone, images[:1]))
        levels = layer_features(backbone, images, [depth * (i + 1) // 4 - 1 for i in range(4)])
        parts.append([*levels, last_features(backbone, images)[1]])
    return [torch.cat(level).clone() for level in zip(*parts, strict=True)]


def logits_of(head: nn.Module, name: str, levels: Levels, size: int) -> Tensor:
    """(B, classes, size, size)."""
    x = head(levels[-1]) if name == "linear" else head(levels[:4])
    return F.interpolate(x, (size, size), mode="bilinear")


def run(task: Task, data: Data, name: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; scores on validation and test images."""
    torch.manual_seed(seed)
    (levels, masks), size = data["train", seed], options.size
    head = HEADS[name]([level.shape[1] for level in levels[:4]], task.classes)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    order = vit.batches(Split(torch.arange(len(masks)), masks), options.batch_size, seed)
    for _, (chosen, labels) in zip(range(options.steps), order, strict=False):
        pixel_cross_entropy(logits_of(head, name, [x[chosen] for x in levels], size), labels).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    scores = {}
    with torch.inference_mode():
        for part in ("validation", "test"):
            levels, truth = data[part, None]
            rows = torch.arange(len(truth)).split(50)
            found = [logits_of(head, name, [x[i] for x in levels], size).argmax(1) for i in rows]
            scores[part] = task.score(torch.cat(found), truth)
    return {"head": name, "rate": rate, "seed": seed, "parameters": sum(p.numel() for p in head.parameters()), **scores}


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
        summary[name] |= _mean("validation", [r["validation"] for r in seeds.values()])
        summary[name] |= _mean("over_convolutional", over)
    return summary


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {name: statistics.mean(values) if values else None, f"{name}_error": error}


def heads_table(folder: Path = RESULTS) -> str:
    """Each head at its best rate: mean IoU in percent, and standard errors over the seeds."""
    lines = [
        "| head | Parameters | Rate | validation | test | over the convolutional |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, found in summarise(read_results("segmentation_heads", folder)["runs"]).items():
        scores = [f"{found[key]:.1f} ± {found[f'{key}_error']:.1f}" for key in ("validation", "test")]
        over = f"{found['over_convolutional']:+.1f} ± {found['over_convolutional_error']:.1f}"
        cells = [f"`{name}`", f"{found['parameters']:,}", f"{found['rate']:g}", *scores]
        lines.append(f"| {' | '.join([*cells, '' if name == 'convolutional' else over])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write `results/segmentation_heads.json`, and return the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a vision backbone of transformers")
    parser.add_argument("--data", required=True, help=".npz with images (N, h, w) uint8 and labels (N,)")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(7)))
    parser.add_argument("--rates", type=float, nargs="+", default=list(HEAD_RATES))
    parser.add_argument("--shots", type=int, default=16, help="training scenes per digit")
    parser.add_argument("--size", type=int, default=98, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--validation_images", type=int, default=100)
    parser.add_argument("--test_images", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    task = segmentation(options)
    backbone = task.heads.from_backbone(options.model, task.classes, None).backbone.eval()

    def read(split: Split) -> tuple[list[Tensor], Tensor]:
        return features(backbone, split), split.labels

    given = {key: getattr(options, key) for key in ("shots", "size", "steps", "batch_size", "test_images")}
    given |= {"model": Path(options.model).name, "data": Path(options.data).name}
    data: Data = {("validation", None): read(task.validation), ("test", None): read(task.test)}
    data |= {("train", seed): read(task.train(seed)) for seed in options.seeds}
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.heads:
            for rate in options.rates:
                runs.append(run(task, data, name, rate, seed, options))
                print(json.dumps(runs[-1]), flush=True)
                content = {"machine": machine(), "options": given, "summary": summarise(runs), "runs": runs}
                write_results("segmentation_heads", content, options.output_dir)
    return summarise(runs)


if __name__ == "__main__":
    main()
