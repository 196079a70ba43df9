"""How the weights of a run move: the optimizer, its schedule and the average, over models that accelerate prepared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..core.processes import is_sharded
from . import checkpoint
from .optim import evaluation_weights, make_optimizer, parameter_groups
from .options import OptimizerOptions
from .parsing import python_value
from .place import Place
from .precision import check_trainables_fp32, trainable

logger: Any = get_logger(__name__)


def total_steps(options: OptimizerOptions, batches_per_epoch: int, accumulation: int) -> int:
    """Optimizer steps of a run: --max_train_steps, else --num_train_epochs, else 500."""
    if options.max_train_steps is not None or options.num_train_epochs is None:
        return options.max_train_steps or 500
    return -(-batches_per_epoch * options.num_train_epochs // accumulation)


def groups_of(
    models: Mapping[str, nn.Module], options: OptimizerOptions, samples: int, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups.

    Args:
        models: The models that train, by the name of the pipeline's component.
        options: They give the rate of what `rates` does not name.
        samples: Samples of a step over all processes, for --scale_lr.
        rates: Learning rates by the name of a model or, for a part of one, "<name>.<part>"; LoRA+ leaves parts alone.
    """
    rate = options.learning_rate * (samples if options.scale_lr else 1)
    known: dict[str, float] = {**dict.fromkeys(models, rate), **rates}
    if options.optimizer == "prodigy":
        known = dict.fromkeys(models, rate)  # it refuses several
        if rate < 0.1:
            logger.warning("prodigy finds its own rate and scales it by --learning_rate %g: 1 is usual", rate)
    groups: list[dict[str, Any]] = []
    for name, model in models.items():
        check_trainables_fp32(trainable([model]))
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for key, parameter in trainable([model]):
            path = f"{name}.{key.partition('.')[2]}"
            part = max((prefix for prefix in known if path.startswith(f"{prefix}.")), key=len)
            parts.setdefault(part, []).append((key, parameter))
        for part, named in parts.items():
            groups += parameter_groups(named, known[part], options.lora_plus_ratio if part == name else 1.0)
    return groups


class Optimization:
    """The optimizer over what trains, its schedule, and the moving average of the weights.

    Args:
        place: The processes; they prepare the models and the optimizer together.
        options: Which optimizer and schedule.
        models: The models that train, by name.
        steps: Optimizer steps of the whole run.
        warmup: How many of them warm up.
        rates: Learning rates other than --learning_rate, see `groups_of`.

    Attributes:
        called: The models to call in the forward pass, by name.
        models: The same, unwrapped.
        moving: Whether a step has begun that is not done: weights and optimizer do not belong together then.
    """

    def __init__(
        self, place: Place, options: OptimizerOptions, models: Mapping[str, nn.Module], steps: int, warmup: int,
        rates: Mapping[str, float], compiled: bool = False,
    ) -> None:  # fmt: skip
        samples = options.train_batch_size * place.processes * place.accelerator.gradient_accumulation_steps
        groups = groups_of(models, options, samples, rates)
        betas = (options.adam_beta1, options.adam_beta2)
        more = {name: python_value(text) for name, text in (options.optimizer_args or {}).items()}
        numbers = (betas, options.adam_weight_decay, options.adam_epsilon)
        optimizer = make_optimizer(options.optimizer, groups, *numbers, more)
        if compiled:
            for model in models.values():
                model.compile()
        *prepared, self.optimizer = place.accelerator.prepare(*models.values(), optimizer)
        self.called: dict[str, Any] = dict(zip(models, prepared, strict=True))
        self.models = {name: place.unwrapped(model) for name, model in self.called.items()}
        length = {"num_warmup_steps": warmup, "num_training_steps": steps}
        shape = {"num_cycles": options.lr_num_cycles, "power": options.lr_power}
        self.schedule = get_scheduler(options.lr_scheduler, self._inner, **length, **shape)
        self.ema = EMAModel(self.parameters(), decay=options.ema_decay) if options.use_ema else None
        self._scaler, self._device = place.accelerator.scaler, place.device
        self.moving = False
        self._inner.register_step_pre_hook(lambda *_: setattr(self, "moving", True))

    @property
    def _inner(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train."""
        return trainable(self.models.values())

    @property
    def sharded(self) -> bool:
        """Whether parameters lie in parts on several processes, which have to gather them together."""
        return any(is_sharded(parameter) for parameter in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for _, parameter in self.trained()]

    def restart_average(self) -> None:
        """Let the average begin with the weights as they are now."""
        if self.ema is not None:
            self.ema = EMAModel(self.parameters(), decay=self.ema.decay)

    def after_step(self) -> None:
        """Keep up the average: the step is done."""
        self.moving = False
        if self.ema is not None:
            self.ema.step(self.parameters())

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, models are in eval mode, with the weights to evaluate: averaged, or a schedule-free optimizer's."""
        modes = [(module, module.training) for model in self.models.values() for module in model.modules()]
        parameters = self.parameters()
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
        check_trainables_fp32(self.trained())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; with shards every process must call."""
        return {
            "trained": checkpoint.gathered(dict(self.trained())),
            "optimizer": checkpoint.gathered(self._inner.state_dict()),
            "schedule": self.schedule.state_dict(),
            "ema": checkpoint.gathered(self.ema.state_dict()) if self.ema is not None else None,
            "scaler": self._scaler.state_dict() if self._scaler is not None else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, at the rates of this run's options.

        Raises:
            SerialLoraError: If the checkpoint is of other weights, or damaged.
        """
        checkpoint.check_like(state["schedule"], self.schedule.state_dict(), "the schedule")
        if self.ema is not None and state["ema"] is not None:
            checkpoint.check_like(state["ema"], self.ema.state_dict(), "the average")
        checkpoint.load_parameters(self.trained(), state["trained"])
        optimizer = self._inner
        rates = [group["initial_lr"] for group in optimizer.param_groups]
        checkpoint.load_optimizer(optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = rates
        for group, rate, factor in zip(optimizer.param_groups, rates, self.schedule.lr_lambdas, strict=True):
            if group["initial_lr"] != rate:
                group["initial_lr"], group["lr"] = rate, rate * factor(self.schedule.last_epoch)
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self._device)
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])
