"""The tasks of benchmarks/vit.py: few-shot digits, by class and by pixel, from any .npz of grey images and labels."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slora_diffusers.heads.classification import SerialLoraForImageClassification
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation
from slora_diffusers.training.data.few_shot import k_shot
from slora_diffusers.training.randomness import generator
from slora_diffusers.training.vision.scores import Overlap, confusion_matrix


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
    photographs = [torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in load_sample_images().images]
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
