"""What the two recipes for vision share: their options, how a model with a head is adapted and saved, and the loop."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SerialLoraConfig
from ..errors import SerialLoraError
from ..features import patch_size
from ..files import WEIGHT_NAME
from ..heads import open_backbone
from ..preprocessing import Preprocessing
from ..vision import SerialLoraForImageClassification, SerialLoraForSemanticSegmentation
from .adapters import ADAPTERS, Adapter, Models
from .batches import Batch, Batches, Rows, bucket_shapes
from .data import Item
from .labelled import Fetch
from .options import ADAPTER, MODEL, OPTIMIZER, RUN, Group, make_parser, parse, switch, value
from .precision import trainable
from .run import Run

logger = logging.getLogger(__name__)
ModelWithHead = SerialLoraForImageClassification | SerialLoraForSemanticSegmentation

HEAD_NAME = "head.safetensors"
_NOT_HERE = {  # options of the diffusion recipes that the training library reads
    "cache_latents": False, "center_crop": True, "quantize": None, "variant": None, "scale_lr": False,
    "validation_loss_images": 0, "num_validation_images": 0, "validation_inference_steps": 0,
    "validation_guidance_scale": 0.0,
}  # fmt: skip
# What did best on DINOv2 with few images of each class (docs/vision.md): Serial LoRA takes twice LoRA's rate.
LEARNING_RATES = {"serial": 6e-3, "lora": 3e-3, "head": 1e-2, "full": 1e-5}
_RATES = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
HEAD_LEARNING_RATE = 3e-3  # of the new head beside an adapter
VISION: Group = (
    ("adapter", value(str, "serial", "What to train beside the head.", choices=ADAPTERS)),
    ("train_data_dir", value(str, None, "Folder of the training images.")),
    ("validation_data_dir", value(str, None, "Folder of the validation images, like --train_data_dir.")),
    ("resolution", value(int, None, "Side of the images in pixels; that of the backbone's pretraining by default.")),
    ("learning_rate", value(float, None, f"Learning rate; by default by --adapter: {_RATES}.")),
    ("head_learning_rate", value(float, None, "Learning rate of the head; 3e-3 by default beside an adapter.")),
    ("lr_warmup_steps", value(int, None, "Steps of warm-up; a tenth of all by default.")),
    ("smallest_crop", value(float, 0.5, "Smallest share of an image that a random crop keeps; 1 for no crop.")),
    ("random_flip", switch("Mirror half of the images, anew each epoch.")),
    ("early_stopping", value(int, 0, "Stop after so many validations without a better score; 0 for never.")),
    ("dataloader_num_workers", value(int, 0, "Processes that read images ahead.")),
)


def parse_options(description: str, own: Group, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a vision recipe: the training library's that make sense here, the shared ones and its own.

    Raises:
        SerialLoraError: If a value is out of range.
    """
    replaced = {*_NOT_HERE, *(name for name, _ in VISION)}
    groups = [[o for o in group if o[0] not in replaced] for group in (MODEL, ADAPTER, OPTIMIZER, RUN)]
    parser = make_parser(description, *groups[:2], VISION, own, *groups[2:])
    parser.set_defaults(**_NOT_HERE, lr_scheduler="cosine", train_batch_size=16, rank=8)
    options = parse(parser, argv)
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.adapter]
    if options.head_learning_rate is None:
        options.head_learning_rate = options.learning_rate if options.adapter == "head" else HEAD_LEARNING_RATE
    if not 0 < options.smallest_crop <= 1:
        raise SerialLoraError(f"--smallest_crop must lie in (0, 1]; got {options.smallest_crop}.")
    if options.early_stopping < 0 or (options.early_stopping and not options.validation_steps):
        raise SerialLoraError("--early_stopping counts validations: it needs --validation_steps, and is not negative.")
    return options


class WithHead:
    """An adapter in the backbone of a model whose head trains too; both go into the result."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def check(self) -> None:
        self.adapter.check()

    def attach(self, model: nn.Module, config: SerialLoraConfig) -> str:
        head = model.get_submodule("head")
        made = self.adapter.attach(model.get_submodule("backbone"), config)
        return f"{made}; head: {sum(p.numel() for p in head.parameters()):,} parameters"

    def save(self, models: Models, folder: Path, is_main_process: bool = True) -> Path:
        """Serial LoRA and head in one file; PEFT's LoRA, or the whole backbone, beside a file with the head."""
        (model,) = models.values()
        backbone = model.get_submodule("backbone")
        name = WEIGHT_NAME
        if self.adapter is ADAPTERS["lora"]:  # under another name: opened without PEFT, it would lack its adapter
            self.adapter.save({"model": backbone}, folder, is_main_process)
            name = HEAD_NAME
        elif self.adapter is ADAPTERS["full"]:
            self.adapter.save({"model": backbone}, folder, is_main_process)
            backbone.config._name_or_path = str(folder / "model")  # type: ignore[union-attr]
        return model.save_pretrained(folder, weight_name=name, is_main_process=is_main_process)  # type: ignore[operator]


def open_for_training(options: argparse.Namespace, run: Run) -> tuple[nn.Module, Preprocessing]:
    """The backbone, and how its images are prepared at --resolution.

    Raises:
        SerialLoraError: If there is no such model, or the images would not divide into its patches.
    """
    path = options.pretrained_model_name_or_path
    where = {name: getattr(options, name) for name in ("revision", "cache_dir") if getattr(options, name) is not None}
    backbone = open_backbone(path, dtype=run.weight_dtype, **where)
    own = Preprocessing.of(path, **where)
    sides = own.size if options.resolution is None else (options.resolution, options.resolution)
    for side in sides:
        bucket_shapes(side, None, patch_size(backbone))
    return backbone, Preprocessing(sides, own.mean, own.std)


def batches_of(run: Run, items: Sequence[Item], fetch: Fetch) -> Callable[[int], Iterator[Batch]]:
    """Training batches of this process, from a micro-step on."""
    options, accelerator = run.options, run.accelerator
    rows = Rows([fetch.prepare.size] * len(items), run.rows, options.seed)
    run.count_steps(rows.per_epoch)
    batches = Batches(items, rows, fetch, accelerator.process_index, accelerator.num_processes)
    return lambda start: batches.read(start, options.dataloader_num_workers)


def prepare_model(run: Run, model: ModelWithHead) -> Any:
    """Attach the adapter, make the optimizer (the head at its own rate), and give the model to call."""
    options = run.options
    run.adapter = WithHead(run.adapter)
    run.attach(model.to(run.device))
    if options.lr_warmup_steps is None:
        options.lr_warmup_steps = options.max_train_steps // 10
    (prepared,) = run.prepare({"model": model}, {"model.head": options.head_learning_rate})
    return prepared


class Stopping:
    """The best score so far, its weights, and whether it has been waited for long enough.

    Args:
        run: Whose weights to keep.
        patience: Validations without a better score after which to stop; 0 for never.
    """

    def __init__(self, run: Run, patience: int) -> None:
        self.run, self.patience = run, patience
        self.best, self.waited = float("-inf"), 0
        self._weights: dict[str, Tensor] = {}

    def now(self, score: float) -> bool:
        """Note a score; whether to stop."""
        if not self.patience:
            return False
        self.waited += 1
        if score > self.best:
            self.best, self.waited = score, 0
            self._weights = {name: p.detach().clone() for name, p in trainable(self.run.models.values())}
        return self.waited >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back, if there are any."""
        for name, parameter in trainable(self.run.models.values()) if self._weights else ():
            parameter.copy_(self._weights[name])


def fit(
    run: Run,
    batches: Callable[[int], Iterator[Batch]],
    loss_of: Callable[[Batch], Tensor],
    evaluate: Callable[[], Mapping[str, float]],
    score: str,
) -> dict[str, float]:
    """Train until --max_train_steps, an interruption or --early_stopping, and save; gives the last scores.

    Args:
        run: A prepared run.
        batches: Micro-batches from a number on.
        loss_of: Loss of a micro-batch.
        evaluate: Scores on the validation images, in percent.
        score: Which of them decides about stopping.
    """
    options, scores = run.options, {}
    stopping = Stopping(run, options.early_stopping)
    if run.start and options.early_stopping:
        logger.warning("a resumed run knows no earlier score: early stopping counts from step %d", run.start)

    def validate(number: int) -> bool:
        with run.evaluation():
            scores.update(evaluate())
        run.log(scores, number)
        shown = ", ".join(f"{name} {scored:.1f}" for name, scored in scores.items())
        logger.info("step %d: %s", number, shown)
        return stopping.now(scores[score])

    if run.start == 0 and run.validates_at(0):
        validate(0)
    for step in run.steps(batches, loss_of):
        if not step.interrupted and run.validates_at(step.number) and validate(step.number):
            logger.info("step %d: %d validations without a better %s", step.number, options.early_stopping, score)
            break
    stopping.restore()
    run.finish()
    return scores
