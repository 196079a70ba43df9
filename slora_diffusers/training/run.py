"""One run: the accelerator, the optimizer, where things are written, and the loop with its progress and checkpoints."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import SerialLoraError
from ..files.hub import PROMPT, publish, reserve_repository
from ..heads.base import checkpoint_gradients
from . import checkpoint
from .data.batches import Batch
from .diffusion.validation import image_grid
from .loop import Step, interruptible, train_steps
from .methods import ADAPTERS
from .optim import evaluation_weights, make_optimizer, parameter_groups
from .options import adapter_config, save_options
from .precision import DTYPES, check_trainables_fp32, trainable
from .preflight import check_options

logger: Any = get_logger(__name__)
# Options that may change when a run is resumed without changing what it computes.
_FREE_OPTIONS = frozenset({
    *("config", "output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id", "hub_token"),
    *("validation_steps", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers"),
    *("cache_dir", "encodings_dir", "logging_dir"),
    *("validation_loss_images", "num_validation_images", "validation_inference_steps", "validation_guidance_scale"),
    *("validation_prompt", "validation_labels", "validation_data_dir", "gradient_checkpointing"),
})  # fmt: skip
# Options that the optimizer's state depends on.
_STATE_OPTIONS = ("adapter", "optimizer", "lora_plus_ratio", "train_text_encoder")


class Run:
    """What a recipe holds on to while it trains.

    Args:
        options: The parsed options; what they resolve to is written to `<output_dir>/config.yaml` by `prepare`.

    Raises:
        SerialLoraError: If a package that an option needs is missing, or a number is out of range.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        check_options(options)
        self.options = options
        set_seed(options.seed)  # of the adapter's initial weights: the same on every process
        self.output_dir = Path(options.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), str(self.output_dir / options.logging_dir)),
        )
        # What accelerate was launched or configured with counts, unless the options say otherwise.
        options.mixed_precision = self.accelerator.mixed_precision
        options.gradient_accumulation_steps = self.accelerator.gradient_accumulation_steps
        if options.mixed_precision not in DTYPES:
            raise SerialLoraError(f"mixed precision {options.mixed_precision} is not supported: use bf16.")
        if options.push_to_hub and self.accelerator.is_main_process:
            options.hub_model_id = reserve_repository(options.hub_model_id or self.output_dir, options.hub_token)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.device = self.accelerator.device
        torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
        # Trained in full, the base stays fp32 and autocast does the rest; a frozen one is held in the low precision.
        self.weight_dtype = torch.float32 if options.adapter == "full" else DTYPES[options.mixed_precision]
        self.adapter = ADAPTERS[options.adapter]
        if self._deepspeed and (options.checkpointing_steps or options.resume_from_checkpoint):
            raise SerialLoraError(
                "DeepSpeed keeps the optimizer's state in its engine, so there are no checkpoints to resume from: "
                "add --checkpointing_steps 0, or launch with DDP or FSDP2."
            )
        if self._deepspeed:  # which otherwise asks the data loader, and ours is not prepared
            plugin = self.accelerator.state.deepspeed_plugin
            assert plugin is not None
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.train_batch_size
        self.start = 0

    @property
    def _deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def rows(self) -> int:
        """Samples that all processes together read at a micro-step."""
        return self.options.train_batch_size * self.accelerator.num_processes

    def count_steps(self, rows: int) -> None:
        """Set --max_train_steps, unless it is given: --num_train_epochs of `rows` micro-batches each, or 500."""
        options = self.options
        if options.max_train_steps is None and options.num_train_epochs is None:
            options.max_train_steps = 500
        elif options.max_train_steps is None:
            options.max_train_steps = -(-rows * options.num_train_epochs // options.gradient_accumulation_steps)

    def attach(self, model: nn.Module) -> None:
        """Add what the run trains to a model, and freeze the rest of it."""
        logger.info(self.adapter.attach(model, adapter_config(self.options)))
        model.train()
        if self.options.gradient_checkpointing:
            checkpoint_gradients(model)

    def prepare(self, models: Mapping[str, nn.Module], learning_rates: Mapping[str, float] | None = None) -> list[Any]:
        """Make the optimizer, its schedule and the average, hand all to the accelerator, and resume if asked.

        Args:
            models: The models that train, by the name of the pipeline's component.
            learning_rates: Learning rates other than --learning_rate, by the same names or, for a part of a model,
                by "<name>.<part>"; LoRA+ leaves parts alone.

        Returns:
            The prepared models, to call in the forward pass.
        """
        options = self.options
        if self.accelerator.is_main_process:
            save_options(options, self.output_dir / "config.yaml")
        if options.report_to:
            self.accelerator.init_trackers("slora", {k: str(v) for k, v in vars(options).items() if k != "hub_token"})
        self.models = dict(models)
        scale = self.rows * options.gradient_accumulation_steps if options.scale_lr else 1
        rate: float = options.learning_rate * scale
        rates: dict[str, float] = {**dict.fromkeys(models, rate), **(learning_rates or {})}
        groups: list[dict[str, Any]] = []
        if options.optimizer == "prodigy":
            rates = dict.fromkeys(models, rate)  # it refuses several
            if rate < 0.1:
                logger.warning("prodigy finds its own rate and scales it by --learning_rate %g: 1 is usual", rate)
        for name, model in models.items():
            check_trainables_fp32(trainable([model]))
            parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
            for key, parameter in trainable([model]):
                path = f"{name}.{key.partition('.')[2]}"
                part = max((prefix for prefix in rates if path.startswith(f"{prefix}.")), key=len)
                parts.setdefault(part, []).append((key, parameter))
            for part, named in parts.items():
                ratio = options.lora_plus_ratio if part == name else 1.0
                groups += parameter_groups(named, rates[part], ratio)
        betas = (options.adam_beta1, options.adam_beta2)
        optimizer = make_optimizer(options.optimizer, groups, betas, options.adam_weight_decay, options.adam_epsilon)
        if options.compile:
            for model in models.values():
                model.compile()
        *prepared, self.optimizer = self.accelerator.prepare(*models.values(), optimizer)
        self.models = {name: self.accelerator.unwrap_model(model) for name, model in zip(models, prepared, strict=True)}
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        warmup = {"num_warmup_steps": options.lr_warmup_steps, "num_training_steps": options.max_train_steps}
        cycles = {"num_cycles": options.lr_num_cycles, "power": options.lr_power}
        self.schedule = get_scheduler(options.lr_scheduler, inner, **warmup, **cycles)
        self.ema = EMAModel(self._parameters(), decay=options.ema_decay) if options.use_ema else None
        self._prepared = prepared
        if options.resume_from_checkpoint:
            self._resume(checkpoint.find_checkpoint(self.output_dir, options.resume_from_checkpoint))
        if self.accelerator.is_main_process:
            self._set_aside()
        return prepared

    def steps(
        self, batches_from: Callable[[int], Iterator[Batch]], loss_of: Callable[[Batch], Tensor]
    ) -> Iterator[Step]:
        """Train: shows progress, logs, and writes checkpoints on time, and before an interrupted run ends.

        Args:
            batches_from: Micro-batches from a number on.
            loss_of: Loss of a micro-batch.
        """
        options, start = self.options, self.start
        batches = batches_from(start * options.gradient_accumulation_steps)
        bar = tqdm(
            total=options.max_train_steps, initial=start, desc="training", unit="step",
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip
        bounds = {"start": start, "stop": options.max_train_steps, "max_grad_norm": options.max_grad_norm}
        with bar, interruptible() as interrupt:
            arguments = (self.accelerator, self._prepared, self.optimizer, self.schedule, batches, loss_of)
            for step in train_steps(*arguments, **bounds, interrupt=interrupt):
                if self.ema is not None:
                    self.ema.step(self._parameters())
                self.start = step.number
                bar.update()
                bar.set_postfix_str(
                    f"loss {step.loss:.4f}, lr {step.lr:.1e}, {step.seconds:.2f} s/step, {step.memory / 2**30:.2f} GB"
                )
                values = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}
                self.log({**values, "seconds": step.seconds, "memory": step.memory}, step.number)
                every = options.checkpointing_steps
                if (step.interrupted and not self._deepspeed) or (every and step.number % every == 0):
                    self.save_checkpoint()
                yield step
                if step.interrupted:
                    logger.warning("interrupted after step %d", step.number)

    def validates_at(self, number: int) -> bool:
        """Whether step `number` (0 is the untrained adapter) is one to validate at."""
        every = self.options.validation_steps
        return bool(every) and (number % every == 0 or number == self.options.max_train_steps)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, the models are in eval mode, with the weights to judge: averaged, or a schedule-free optimizer's."""
        modes = [(module, module.training) for model in self.models.values() for module in model.modules()]
        parameters = self._parameters()
        with evaluation_weights(self.optimizer), torch.no_grad():
            if self.ema is not None:
                self.ema.store(parameters)
                self.ema.copy_to(parameters)
            for model in self.models.values():
                model.eval()
            try:
                yield
            finally:
                if self.ema is not None:
                    self.ema.restore(parameters)
                for module, mode in modes:
                    module.training = mode
        check_trainables_fp32(trainable(self.models.values()))

    def share(self, *lists: Sequence[Any]) -> list[Sequence[Any]]:
        """This process's part of lists of the same length."""
        accelerator = self.accelerator
        return [entries[accelerator.process_index :: accelerator.num_processes] for entries in lists]

    def validate(
        self, number: int, loss: Callable[[], float], draw: Callable[[], list[Image.Image]], columns: int
    ) -> None:
        """Log the validation loss and a grid of images; every process computes both, so none waits for another."""
        with self.evaluation():
            self.log({"validation_loss": loss()}, number)
            with self.accelerator.autocast():
                images = draw() if self.options.num_validation_images else []
            if images:
                self.log_images("images", image_grid(images, columns), number)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers to `<output_dir>/metrics.jsonl` and send them to the tracker."""
        if self.accelerator.is_main_process:
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(dict(values), step=step)

    def log_images(self, name: str, images: Image.Image, step: int) -> None:
        """Write a picture to `<output_dir>/validation` and send it to the trackers that take pictures."""
        if self.accelerator.is_main_process:
            folder = self.output_dir / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            images.save(folder / f"{name}-{step:06d}.png")
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    if tracker.name == "tensorboard":
                        tracker.log_images({name: np.asarray(images)[None]}, step=step, dataformats="NHWC")
                    else:
                        tracker.log_images({name: [images]}, step=step)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step; every process calls."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        state = {
            "step": self.start,
            "trained": checkpoint.gathered(dict(trainable(self.models.values()))),
            "optimizer": checkpoint.gathered(inner.state_dict()),
            "schedule": self.schedule.state_dict(),
            "ema": checkpoint.gathered(self.ema.state_dict()) if self.ema is not None else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "options": {name: _plain(value) for name, value in vars(self.options).items() if name != "hub_token"},
            "processes": self.accelerator.num_processes,
        }
        if self.accelerator.is_main_process:
            limit = self.options.checkpoints_total_limit
            checkpoint.write_checkpoint(self.output_dir, self.start, state, limit, lambda folder: None)
        self.accelerator.wait_for_everyone()

    def finish(self, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Save the adapter to `output_dir`, and upload it if asked; every process calls. Gives what was written.

        Args:
            weights: What to save, by the names of the trained parameters, instead of the last weights.
        """
        options, main = self.options, self.accelerator.is_main_process
        with self.evaluation():
            if weights is not None:
                checkpoint.load_parameters(trainable(self.models.values()), weights)
            path = self.adapter.save(self.models, self.output_dir, main)
        if options.push_to_hub and main:
            prompt = getattr(options, "validation_prompt", None) or getattr(options, "instance_prompt", None) or PROMPT
            settings = {"base_model": options.pretrained_model_name_or_path, "prompt": prompt}
            also = ("config.yaml", "validation/*")
            publish(path, options.hub_model_id, **settings, token=options.hub_token, also=also)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return path

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in trainable(self.models.values())]

    def _set_rates(self, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
        """Learning rates of this run's options, where the schedule stands: a checkpoint's are those that wrote it."""
        self.schedule.base_lrs = rates
        for group, rate, factor in zip(optimizer.param_groups, rates, self.schedule.lr_lambdas, strict=True):
            if group["initial_lr"] != rate:
                group["initial_lr"], group["lr"] = rate, rate * factor(self.schedule.last_epoch)

    def _resume(self, path: Path | None) -> None:
        if path is None:
            logger.warning("no checkpoint in %s yet: starting at step 0", self.output_dir)
            return
        state = checkpoint.read_checkpoint(path)
        for name in _STATE_OPTIONS:
            if state["options"].get(name) != (now := _plain(getattr(self.options, name, None))):
                raise SerialLoraError(
                    f"{path} was written with --{name} {state['options'].get(name)}, and now it is {now}: its state of "
                    "the optimizer does not fit. Resume with the option that wrote it."
                )
        changed = {
            name: (value, _plain(getattr(self.options, name, None)))
            for name, value in {**state["options"], "processes": state["processes"]}.items()
            if name not in _FREE_OPTIONS
        }
        changed["processes"] = (state["processes"], self.accelerator.num_processes)
        if self.options.lr_scheduler.startswith("constant"):
            changed.pop("max_train_steps", None)  # no schedule looks at the end
        for name, (before, now) in changed.items():
            if before != now:
                logger.warning(
                    "%s was %s and is now %s: the run will not equal an uninterrupted one", name, before, now
                )
        checkpoint.load_parameters(trainable(self.models.values()), state["trained"])
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        rates = [group["initial_lr"] for group in optimizer.param_groups]
        checkpoint.load_optimizer(optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._set_rates(optimizer, rates)
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.start = state["step"]
        if self.start >= self.options.max_train_steps:
            logger.warning("%s has all of --max_train_steps %d: nothing to train", path, self.options.max_train_steps)
        logger.info("resumed from %s at step %d", path, self.start)

    def _set_aside(self) -> None:
        """Leave checkpoints and measurements of later steps behind: this run writes its own."""
        for abandoned in checkpoint.set_aside_after(self.output_dir, self.start):
            logger.warning("a later checkpoint, of another run, is set aside: %s", abandoned)
        path = self.output_dir / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(line for line in lines if self.start and json.loads(line)["step"] <= self.start))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | list | None) else str(value)
