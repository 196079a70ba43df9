"""The demo's second part: a tiny ViT learns to recognise the letters of a new style over photographs, and to mark them.

Its base never saw the style, a photograph or a mask. Heads alone, on the frozen base, stand beside Serial LoRA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from ..config import SerialLoraConfig
from ..heads.classification import SerialLoraForImageClassification
from ..heads.segmentation import SerialLoraForSemanticSegmentation
from ..training.vision.pictures import blend
from ..training.vision.scores import Overlap, confusion_matrix, segmentation_loss, top_k_accuracy
from .glyphs import HELD_OUT_LETTERS, LETTERS, Face
from .quiet import quiet
from .scenes import Scenes, fresh_scenes, scenes
from .sheet import Cell, contact_sheet

VIT_BASE = Path(__file__).parent / "vit_base"
CONFIG = SerialLoraConfig(
    rank=16, inputs=("hidden_states", "attention_output", "feed_forward")
)  # few and narrow blocks


@dataclass(frozen=True)
class Training:
    """How the heads, and the adapters with them, are trained; every method sees the same scenes in the same order."""

    drawings: int = 16  # of each letter, in new colours and over new crops at every step
    test: int = 8  # scenes of each letter that the models are tested on
    steps: int = 400
    batch_size: int = 26
    learning_rate: float = 1e-2
    head_learning_rate: float = 1e-2


TRAINING = Training()


@dataclass(frozen=True)
class Task:
    """A head, what it is trained to give, and how that is measured in percent."""

    name: str
    heads: type
    settings: dict[str, Any]
    truth: Callable[[Scenes], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: str
    score: Callable[[Tensor, Tensor], float]


def mean_iou(logits: Tensor, masks: Tensor) -> float:
    """Mean IoU, in percent, of logits (N, classes, H, W)."""
    return Overlap.of(confusion_matrix(logits.argmax(1), masks, logits.shape[1])).means()["miou"]


TASKS = (
    Task(
        "classification", SerialLoraForImageClassification, {"label_names": tuple(LETTERS), "pooling": "both"},
        lambda s: s.labels, cross_entropy, "accuracy", lambda logits, labels: top_k_accuracy(logits, labels, 1),
    ),
    Task(
        "segmentation", SerialLoraForSemanticSegmentation,
        {"label_names": ("background", "letter"), "head": "convolutional", "width": 32},
        lambda s: s.masks, partial(segmentation_loss, dice=1.0), "mIoU", mean_iou,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class VisionRow:
    """One method on one task."""

    task: str
    method: str
    trainable_parameters: int  # of the backbone
    file_bytes: int
    training_seconds: float
    measure: str
    score: float  # on held-out scenes, in percent


@dataclass(frozen=True)
class Vision:
    """What the second part made, and what it measured."""

    sheet: Path
    models: dict[str, Path]
    rows: tuple[VisionRow, ...]
    largest_logit_difference_live_fused: float

    def metrics(self) -> dict[str, Any]:
        """As JSON values, with the settings."""
        return {
            "settings": {**CONFIG.to_dict(), **asdict(TRAINING)},
            "largest_logit_difference_live_fused": self.largest_logit_difference_live_fused,
            "rows": [asdict(row) for row in self.rows],
        }


def run_vision(output_dir: Path, face: Face, seed: int, progress: Progress) -> Vision:
    """Trains a classifier and a segmenter of a style's letters, tests them on other scenes, and draws the results."""
    test = scenes([face], TRAINING.test, seed + 1, held_out=True)
    rows, models, difference = [], {}, 0.0
    logits: dict[str, dict[str, Tensor]] = {}
    for task in TASKS:
        logits[task.name] = {}
        for method, config in {"head alone": None, "Serial LoRA": CONFIG}.items():
            torch.manual_seed(seed)
            with quiet(logging):  # the base has no pooler, which no head reads
                model = task.heads.from_backbone(VIT_BASE, None, config, **task.settings)
            batches = fresh_scenes([face], TRAINING.drawings, TRAINING.batch_size, TRAINING.steps, seed)
            label = f"{task.name}, {method}"
            seconds = _train(model, task, progress.track(batches, TRAINING.steps, description=label))
            folder = output_dir / task.name / method.replace(" ", "_").lower()
            path = model.save_pretrained(folder)
            with quiet(logging):
                opened = task.heads.from_pretrained(folder, VIT_BASE)  # what it knows comes from the file alone
            out = predict(opened, test)
            trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
            score = task.score(out, task.truth(test))
            size = path.stat().st_size
            rows.append(VisionRow(task.name, method, trained, size, seconds, task.measure, score))
            logits[task.name][method] = out
        models[task.name] = folder
        difference = max(difference, (predict(opened.fuse(), test) - out).abs().max().item())
    sheet = _draw_sheet(output_dir / "vision.png", face, test, logits, rows)
    return Vision(sheet, models, tuple(rows), difference)


@torch.inference_mode()
def predict(model: Any, chosen: Scenes) -> Tensor:
    """Logits of every scene."""
    pixels = model.preprocessing.normalize(chosen.images)
    return torch.cat([model.eval()(batch).logits for batch in pixels.split(104)])


def _train(model: Any, task: Task, batches: Iterable[Scenes]) -> float:
    """AdamW with a warm-up and a cosine; returns the seconds."""
    started = time.time()
    adapter = [p for p in model.backbone.parameters() if p.requires_grad]
    groups = [
        {"params": adapter, "lr": TRAINING.learning_rate},
        {"params": list(model.head.parameters()), "lr": TRAINING.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, TRAINING.steps // 10, TRAINING.steps)
    model.train()
    for batch in batches:
        logits = model(model.preprocessing.normalize(batch.images)).logits
        task.loss(logits, task.truth(batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.time() - started


def _draw_sheet(
    path: Path, face: Face, test: Scenes, logits: dict[str, dict[str, Tensor]], rows: list[VisionRow]
) -> Path:
    """One held-out scene of every second letter: what each method reads, and what it marks."""
    chosen = [LETTERS.index(letter) * TRAINING.test for letter in HELD_OUT_LETTERS]
    read, marked = {}, {"true mask": _marked(test, test.masks, chosen)}
    for method, classes in logits["classification"].items():
        letters = classes.argmax(1)
        read[method] = [Cell(test.images[i], LETTERS[letters[i]], bool(letters[i] == test.labels[i])) for i in chosen]
    for method, masks in logits["segmentation"].items():
        marked[method] = _marked(test, masks.argmax(1), chosen)
    footer = []
    for task in TASKS:
        scores = (f"{row.score:.1f} % with {row.method}" for row in rows if row.task == task.name)
        footer.append(f"{task.name}, {task.measure} on {len(test.labels)} scenes never trained on: {', '.join(scores)}")
    groups = {"Which letter is it?": read, "Where is the letter?": marked}
    title = f"Serial LoRA on a tiny ViT: {face.name}, {TRAINING.drawings} drawings of each letter"
    return contact_sheet(path, title, groups, footer)


def _marked(test: Scenes, masks: Tensor, chosen: list[int]) -> list[Cell]:
    cells = []
    for i in chosen:
        image = Image.fromarray((test.images[i] * 255).round().byte().permute(1, 2, 0).numpy())
        mixed = blend(image.convert("L"), masks[i].numpy(), 2, opacity=0.8)  # grey, so that no letter has the colour
        cells.append(Cell(torch.from_numpy(np.array(mixed)).permute(2, 0, 1) / 255))
    return cells
