"""What the two recipes for vision share: their options, how a model with a head is adapted and saved, and the loop."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import SerialLoraConfig
from ...core.sites import find_slots
from ...errors import SerialLoraError
from ...files.format import WEIGHT_NAME
from ...heads.backbones import patch_size
from ...heads.base import SerialLoraWithHead, open_backbone
from ...heads.preprocessing import Preprocessing
from ..data.batches import Batch, Batches, Rows, bucket_shapes
from ..data.images import Item
from ..data.labelled import Fetch
from ..methods import ADAPTERS, Adapter, Models
from ..options import ADAPTER, MODEL, OPTIMIZER, RUN, Group, make_parser, parse, switch, value
from ..precision import trainable
from ..run import Run

logger = logging.getLogger(__name__)

HEAD_NAME = "head.safetensors"
_NOT_HERE = {  # options of the diffusion recipes that the training library reads
    "cache_latents": False, "center_crop": True, "quantize": None, "variant": None, "scale_lr": False,
    "validation_loss_images": 1, "num_validation_images": 0, "validation_inference_steps": 1,
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


def parse_options(
    description: str, own: Group, argv: Sequence[str] | None, rates: Mapping[str, float] = LEARNING_RATES
) -> argparse.Namespace:
    """The options of a vision recipe: the training library's that make sense here, the shared ones and its own.

    Args:
        description: What the recipe does.
        own: Its own options.
        argv: The command line.
        rates: The learning rate of each --adapter that the recipe offers, unless one is given.

    Raises:
        SerialLoraError: If a value is out of range.
    """
    replaced = {*_NOT_HERE, *(name for name, _ in VISION)}
    groups = [[o for o in group if o[0] not in replaced] for group in (MODEL, ADAPTER, OPTIMIZER, RUN)]
    parser = make_parser(description, *groups[:2], VISION, own, *groups[2:])
    parser.set_defaults(**_NOT_HERE, lr_scheduler="cosine", train_batch_size=16, rank=8)
    options = parse(parser, argv)
    if options.adapter not in rates:
        raise SerialLoraError(f"--adapter must be one of {', '.join(rates)} here; got {options.adapter}.")
    if options.learning_rate is None:
        options.learning_rate = rates[options.adapter]
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
            model.needs = self.adapter.save({"model": backbone}, folder, is_main_process).name  # type: ignore[assignment]
            name = HEAD_NAME
        elif self.adapter is ADAPTERS["full"]:
            self.adapter.save({"model": backbone}, folder, is_main_process)
            backbone.config._name_or_path = "./model"  # type: ignore[union-attr]  beside the head, wherever that goes
        return model.save_pretrained(folder, weight_name=name, is_main_process=is_main_process)  # type: ignore[operator]


def hub_arguments(options: argparse.Namespace) -> dict[str, str]:
    """The options that say where on the Hub a model is, those that are given."""
    return {name: getattr(options, name) for name in ("revision", "cache_dir") if getattr(options, name) is not None}


def open_for_training(options: argparse.Namespace, run: Run) -> tuple[nn.Module, Preprocessing]:
    """The backbone, and how its images are prepared at --resolution.

    Raises:
        SerialLoraError: If there is no such model, or the images would not divide into its patches.
    """
    path, where = options.pretrained_model_name_or_path, hub_arguments(options)
    backbone = open_backbone(path, dtype=run.weight_dtype, **where)
    own = Preprocessing.of(path, **where)
    sides = own.size if options.resolution is None else (options.resolution, options.resolution)
    for side in sides:
        bucket_shapes(side, None, patch_size(backbone) or 1)
    return backbone, Preprocessing(sides, own.mean, own.std)


def batches_of(run: Run, items: Sequence[Item], fetch: Fetch) -> Callable[[int], Iterator[Batch]]:
    """Training batches of this process, from a micro-step on."""
    options, accelerator = run.options, run.accelerator
    rows = Rows([fetch.prepare.size] * len(items), run.rows, options.seed)
    run.count_steps(rows.per_epoch)
    batches = Batches(items, rows, fetch, accelerator.process_index, accelerator.num_processes)
    return lambda start: batches.read(start, options.dataloader_num_workers)


def prepare_model(run: Run, model: SerialLoraWithHead) -> Any:
    """Attach the adapter, make the optimizer (the head at its own rate), and give the model to call."""
    options = run.options
    run.adapter = WithHead(run.adapter)
    if options.adapter == "serial" and options.inputs is None:
        options.inputs = usual_inputs(model.backbone)
    run.attach(model.to(run.device))
    freeze_unused(run, model)
    if options.lr_warmup_steps is None:
        options.lr_warmup_steps = options.max_train_steps // 10
    (prepared,) = run.prepare({"model": model}, {"model.head": options.head_learning_rate})
    return prepared


def usual_inputs(backbone: nn.Module) -> list[str]:
    """What the attentions read and, where a record names it, their output: together they did best (docs/vision.md)."""
    pairs = [slot.pair for slot in find_slots(backbone)]
    return list(dict.fromkeys(p.name for p in pairs if not p.optional or p.name.endswith("attention_output")))


def freeze_unused(run: Run, model: SerialLoraWithHead) -> None:
    """Freeze what the output does not depend on (mask tokens, poolers, blocks after the last one that a head reads).

    Processes that train together wait for the gradient of every parameter, and such a one never comes.
    """
    pixels = torch.zeros(1, 3, *model.preprocessing.size, device=run.device, dtype=run.weight_dtype)
    with torch.random.fork_rng(), run.accelerator.autocast():
        model(pixels).logits.sum().backward()
    unused = {name: parameter for name, parameter in trainable([model]) if parameter.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad()
    if unused:
        shown = ", ".join(list(unused)[:4]) + (", ..." if len(unused) > 4 else "")
        logger.info("%d tensors do not reach the output and stay as they are: %s", len(unused), shown)


class Stopping:
    """The best score so far, what belongs to it, and whether it has been waited for long enough.

    Args:
        run: Whose weights to keep.
        patience: Validations without a better score after which to stop; 0 to keep the last, whatever it is.
    """

    def __init__(self, run: Run, patience: int) -> None:
        self.run, self.patience = run, patience
        self.best, self.waited = float("-inf"), 0
        self.weights: dict[str, Tensor] | None = None
        self.scores: dict[str, float] = {}

    def note(self, scores: dict[str, float], score: str) -> bool:
        """Note scores, inside `run.evaluation()`, where parameters are those that were judged; whether to keep them."""
        better = scores[score] > self.best
        self.waited = 0 if better else self.waited + 1
        self.best = max(self.best, scores[score])
        if better and self.patience:
            self.weights = {name: p.detach().clone() for name, p in trainable(self.run.models.values())}
        if better or not self.patience:
            self.scores = scores
            return True
        return False

    @property
    def now(self) -> bool:
        """Whether to stop."""
        return bool(self.patience) and self.waited >= self.patience


def fit(
    run: Run,
    batches: Callable[[int], Iterator[Batch]],
    loss_of: Callable[[Batch], Tensor],
    evaluate: Callable[[], Mapping[str, float]],
    score: str,
    keep: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train until --max_train_steps, an interruption or --early_stopping, and save.

    Args:
        run: A prepared run.
        batches: Micro-batches from a number on.
        loss_of: Loss of a micro-batch.
        evaluate: Scores on the validation images, in percent.
        score: Which of them decides about stopping.
        keep: Called after an evaluation of weights that would be saved, were they the last or the best.

    Returns:
        The scores of what is saved: the last, or with --early_stopping the best ones.
    """
    options = run.options
    stopping = Stopping(run, options.early_stopping)
    if run.start and options.early_stopping:
        logger.warning("a resumed run knows no earlier score: early stopping counts from step %d", run.start)

    def validate(number: int) -> None:
        with run.evaluation():
            scores = dict(evaluate())
            if stopping.note(scores, score) and run.accelerator.is_main_process:
                keep()
        run.log(scores, number)
        logger.info("step %d: %s", number, ", ".join(f"{name} {scored:.1f}" for name, scored in scores.items()))

    if run.start == 0 and run.validates_at(0):
        validate(0)
    for step in run.steps(batches, loss_of):
        if not step.interrupted and run.validates_at(step.number):
            validate(step.number)
            if stopping.now:
                logger.info("step %d: %d validations without a better %s", step.number, options.early_stopping, score)
                break
    run.finish(stopping.weights)
    return stopping.scores
