"""What the recipes for vision share: their options, how a model with a head is adapted and saved, and their task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor, nn

from ...config import SerialLoraConfig
from ...core.sites import find_slots
from ...errors import SerialLoraError
from ...files.format import WEIGHT_NAME
from ...heads.backbones import patch_size
from ...heads.base import SerialLoraWithHead, open_backbone
from ...heads.framing import CROP, PAD, STRETCH, TILE
from ...heads.preprocessing import Preprocessing
from ..data.batches import Batch, Batches
from ..data.images import Item
from ..data.labelled import Fetch
from ..data.order import Rows, bucket_shapes
from ..fit import Best, Validation, fit
from ..methods import ADAPTERS, Adapter, Models, attach
from ..options import COUNT, NOT_NEGATIVE, BaseOptions, ImageOptions, parse
from ..parsing import FREE, but, option
from ..place import Place
from ..precision import trainable
from ..run import Run

logger: Any = get_logger(__name__)

HEAD_NAME = "head.safetensors"
# What did best on DINOv2 with few images of each class (docs/vision-results.md): Serial LoRA takes twice LoRA's rate.
LEARNING_RATES = {"serial": 6e-3, "lora": 3e-3, "head": 1e-2, "full": 1e-5}
_RATES = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
HEAD_LEARNING_RATE = 3e-3  # of the new head beside an adapter


@dataclass(frozen=True)
class VisionOptions(ImageOptions, BaseOptions):
    """Images, and the head."""

    adapter: str = but(BaseOptions, "adapter", "serial", choices=tuple(ADAPTERS))
    rank: int = but(BaseOptions, "rank", 8)
    train_batch_size: int = but(BaseOptions, "train_batch_size", 16)
    lr_scheduler: str = but(BaseOptions, "lr_scheduler", "cosine")
    learning_rate: float = but(
        BaseOptions, "learning_rate", None, help=f"Learning rate; by default by --adapter: {_RATES}."
    )
    lr_warmup_steps: int | None = but(
        BaseOptions, "lr_warmup_steps", None, help="Steps of warm-up; a tenth of all by default."
    )
    train_data_dir: str | None = option(None, "Folder of the training images.")
    validation_data_dir: str | None = option(
        None, "Folder of the validation images, like --train_data_dir.", resume=FREE
    )
    dataset_name: str | None = option(None, "Data set on the Hub or saved to a folder, instead of --train_data_dir.")
    dataset_split: str = option("train", "Split of it to train on.")
    validation_split: str | None = option(None, "Split of it to validate on.")
    image_column: str = option("image", "Column of the images.")
    weight_column: str | None = option(None, "Column of the weights of the images' loss, if there is one.")
    validation_fraction: float = option(
        0.2, "Share of the images to hold out where no validation data are given.", within="(0, 1)"
    )
    head_learning_rate: float | None = option(
        None, "Learning rate of the head; 3e-3 by default beside an adapter.", within=NOT_NEGATIVE
    )
    smallest_crop: float = option(
        0.5,
        "Smallest share of an image that a random crop keeps; 1 for no crop. With --tile, crops are tiles.",
        within="(0, 1]",
    )
    resize_mode: str | None = option(
        None,
        "What becomes of an image of another shape: stretched, kept in shape and padded, or its centre; "
        "by default stretched, SAM's padded.",
        choices=(STRETCH, PAD, CROP),
    )
    tile: int | None = option(
        None, "Side of tiles in which images are seen at their own resolution, instead of --resolution.", within=COUNT
    )
    overlap: int = option(64, "Pixels that tiles share in validation and later.", within=NOT_NEGATIVE)
    early_stopping: int = option(
        0, "Stop after so many validations without a better score; 0 for never.", within=NOT_NEGATIVE, resume=FREE
    )


V = TypeVar("V", bound=VisionOptions)


def parse_options(
    options: type[V], description: str | None, argv: Sequence[str] | None, rates: Mapping[str, float] = LEARNING_RATES
) -> V:
    """The options of a vision recipe, with the learning rates that follow from --adapter.

    Args:
        options: The recipe's options.
        description: What the recipe does.
        argv: The command line.
        rates: The learning rate of each --adapter that the recipe offers, unless one is given.

    Raises:
        SerialLoraError: If a value is out of range.
    """
    given = parse(options, description, argv)
    if given.adapter not in rates:
        raise SerialLoraError(f"--adapter must be one of {', '.join(rates)} here; got {given.adapter}.")
    if given.early_stopping and not given.validation_steps:
        raise SerialLoraError("--early_stopping counts validations: it needs --validation_steps.")
    if given.tile is not None and (given.resolution is not None or given.resize_mode is not None):
        raise SerialLoraError("--tile sees images as they are: leave out --resolution and --resize_mode.")
    if given.tile is not None and given.overlap >= given.tile:
        raise SerialLoraError(f"--overlap must be less than --tile, {given.tile}; got {given.overlap}.")
    rate = rates[given.adapter] if given.learning_rate is None else given.learning_rate
    usual = rate if given.adapter == "head" else HEAD_LEARNING_RATE
    head = usual if given.head_learning_rate is None else given.head_learning_rate
    return replace(given, learning_rate=rate, head_learning_rate=head)


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

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self.adapter.disabled(model.get_submodule("backbone"))

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


def hub_arguments(options: BaseOptions) -> dict[str, str]:
    """The options that say where on the Hub a model is, those that are given."""
    return {name: getattr(options, name) for name in ("revision", "cache_dir") if getattr(options, name) is not None}


def open_for_training(options: VisionOptions, place: Place) -> tuple[nn.Module, Preprocessing]:
    """The backbone, and how its images are prepared at --resolution.

    Raises:
        SerialLoraError: If there is no such model, or the images would not divide into its patches.
    """
    path, where = options.pretrained_model_name_or_path, hub_arguments(options)
    backbone = open_backbone(path, dtype=place.weight_dtype, **where)
    prepare = prepared(Preprocessing.of(path, **where), options)
    for side in prepare.size:
        bucket_shapes(side, None, patch_size(backbone) or 1)
    return backbone, prepare


def prepared(own: Preprocessing, options: VisionOptions) -> Preprocessing:
    """How images are prepared: as a model's own were, but for what the options say."""
    if options.tile is not None:
        return replace(own, size=(options.tile, options.tile), resize_mode=TILE, overlap=options.overlap)
    size = own.size if options.resolution is None else (options.resolution, options.resolution)
    return replace(own, size=size, resize_mode=options.resize_mode or own.resize_mode)


@dataclass(frozen=True)
class Supervised:
    """What a vision run learns.

    Args:
        batches: The images.
        workers: Processes that read ahead.
        loss: Loss of a micro-batch, a scalar.
    """

    batches: Batches
    workers: int
    loss: Callable[[Batch], Tensor]

    def read(self, start: int) -> Iterator[Batch]:
        """Micro-batches of this process from a number on."""
        return self.batches.read(start, self.workers)

    def measures(self) -> dict[str, float]:
        """Nothing but the loss."""
        return {}

    def describe(self) -> dict[str, str]:
        """What is learnt from."""
        items = self.batches.items
        return {"images": f"{len(items)} of {len({item.label for item in items})} labels"}


def train_with_head(
    place: Place,
    options: VisionOptions,
    model: SerialLoraWithHead,
    items: Sequence[Item],
    fetch: Fetch,
    loss_of: Callable[[Any, Batch], Tensor],
    evaluate: Callable[[], Mapping[str, float]],
    show: Callable[[], Image.Image],
    best: Best,
) -> dict[str, float]:
    """Adapt a model with a head, train both (the head at its own rate), and save them.

    Args:
        place: The processes.
        options: The options.
        model: The model, not adapted yet.
        items: The images to train on.
        fetch: Reads one.
        loss_of: Loss of a micro-batch, from the model to call and the batch.
        evaluate: Scores on the validation images, in percent.
        show: A picture of what is predicted for some of them, for the run's page.
        best: Notes them.

    Returns:
        The scores of what is saved: the last, or with --early_stopping the best ones.
    """
    if options.adapter == "serial" and options.inputs is None and options.init_from is None:
        options = replace(options, inputs=usual_inputs(model.backbone))
    method = WithHead(ADAPTERS[options.adapter])
    attach(model.to(place.device), options, method, component="model")
    freeze_unused(place, model)
    rows = Rows([fetch.prepare.size] * len(items), options.train_batch_size * place.processes, options.seed)
    batches = Batches(items, rows, fetch, place.accelerator.process_index, place.processes)
    rates = {"model.head": float(options.head_learning_rate or 0.0)}
    run = Run(place, options, {"model": model}, rows.per_epoch, rates, method)
    task = Supervised(batches, options.dataloader_num_workers, lambda batch: loss_of(run.called["model"], batch))

    def validate(step: int) -> Mapping[str, float]:
        scores = evaluate()
        run.log_picture("predictions", show(), step)
        return scores

    fit(run, task, [Validation(validate, best)])
    return best.scores


def usual_inputs(backbone: nn.Module) -> list[str]:
    """What the attentions read and, where a record names it, their output: best together (docs/vision-results.md)."""
    pairs = [slot.pair for slot in find_slots(backbone)]
    return list(dict.fromkeys(p.name for p in pairs if not p.optional or p.name.endswith("attention_output")))


def freeze_unused(place: Place, model: SerialLoraWithHead) -> None:
    """Freeze what the output does not depend on (mask tokens, poolers, blocks after the last one that a head reads).

    Processes that train together wait for the gradient of every parameter, and such a one never comes.
    """
    pixels = torch.zeros(1, 3, *model.preprocessing.size, device=place.device, dtype=place.weight_dtype)
    with torch.random.fork_rng(), place.autocast():
        model(pixels).logits.sum().backward()
    unused = {name: parameter for name, parameter in trainable([model]) if parameter.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad()
    if unused:
        shown = ", ".join(list(unused)[:4]) + (", ..." if len(unused) > 4 else "")
        logger.info("%d tensors do not reach the output and stay as they are: %s", len(unused), shown)
