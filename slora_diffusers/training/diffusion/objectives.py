"""What a run minimises. To change it, write a class that inherits `Objective`, and name it with --objective.

An objective makes one loss of every sample of a micro-batch. It may weigh samples, mask pixels, compare in another way,
or ask the model twice, with and without its adapter. How latents are noised is the process's part (processes.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import SerialLoraError
from ..data.batches import Batch
from ..parsing import python_value
from ..randomness import randn
from .processes import COMPARISONS, PROCESSES, WEIGHTINGS, Process, mean_of, process_for

if TYPE_CHECKING:
    from ..options import ObjectiveOptions


@dataclass(frozen=True)
class Noised:
    """A micro-batch at its times: everything that a loss may look at.

    Attributes:
        batch: The samples: captions, names, which are of the class, their random draws.
        x0: Clean latents, (B, C, H, W) in fp32.
        noise: What is mixed into them.
        xt: The mixture that the transformer reads.
        times: Where between the two, (B,).
        timesteps: What the transformer reads for the times, (B,).
        mask: What each latent weighs in its sample's loss, (B, 1, H, W); None where all count.
    """

    batch: Batch
    x0: Tensor
    noise: Tensor
    xt: Tensor
    times: Tensor
    timesteps: Tensor
    mask: Tensor | None = None


class Model(Protocol):
    """The transformer with everything that it is conditioned on."""

    def __call__(self, noised: Noised) -> Tensor:
        """Its output, (B, C or 2 C, H, W)."""
        ...

    def base(self, noised: Noised) -> Tensor:
        """Its output without the adapter, and without gradients."""
        ...


@dataclass(frozen=True)
class Objective:
    """The process's own loss: the weighted error between prediction and target.

    Override `loss` to compare in another way, `losses` to call the model in another way, `draw` to choose noise and
    times, and `total` to make one number of a batch. Fields of a class are settings, given by --objective_args.

    Args:
        process: How latents are noised, and what is asked of the transformer.
        prior_weight: Weight of class images (prior preservation).
        loss_type: A name of `COMPARISONS`.
        huber_c: Width of the robust ones.
        noise_offset: Standard deviation of a part of the noise that is the same for every pixel of a channel.
    """

    process: Process
    prior_weight: float = 0.0
    loss_type: str = "l2"
    huber_c: float = 0.1
    noise_offset: float = 0.0

    def draw(self, x0: Tensor, batch: Batch, times: Tensor | None = None) -> Noised:
        """Noise latents at random times, or at given ones; noise and times come from the batch's counters."""
        noise = batch.noise(x0)
        if self.noise_offset:
            noise = noise + self.noise_offset * randn(batch.draws("noise offset"), x0[:, :, :1, :1])
        times = self.process.sample_times(batch.draws("times")) if times is None else times
        xt, timesteps = self.process.add_noise(x0, noise, times), self.process.timesteps(times).to(x0.device)
        masks, size = batch.masks, (x0.shape[-2], x0.shape[-1])
        mask = None if masks is None else F.adaptive_avg_pool2d(masks.to(x0.device), size)
        return Noised(batch, x0, noise, xt, times.to(x0.device), timesteps, mask)

    def losses(self, model: Model, noised: Noised) -> Tensor:
        """The loss of every sample, (B,)."""
        return self.compare(model(noised), noised)

    def compare(self, output: Tensor, noised: Noised) -> Tensor:
        """The loss of every sample, (B,), from the transformer's output."""
        given = (noised.x0, noised.noise, noised.xt, noised.times)
        error = lambda prediction, target: per_sample(self.loss(prediction, target, noised), noised, self, "loss")  # noqa: E731
        return self.process.loss(output, *given, error=error, mask=noised.mask)

    def loss(self, prediction: Tensor, target: Tensor, noised: Noised) -> Tensor:
        """How prediction and target (B, C, H, W) are compared, (B,)."""
        return mean_of(COMPARISONS[self.loss_type](prediction, target, self.huber_c), noised.mask)

    def total(self, losses: Tensor, batch: Batch) -> Tensor:
        """One number of a micro-batch: the mean, where class images count on their own."""
        return prior_preservation(losses, batch.prior.to(losses.device), self.prior_weight)


def per_sample(losses: Any, noised: Noised, objective: Objective, method: str) -> Tensor:
    """The losses that a method of an objective gave, if it is one per sample: another shape would broadcast.

    Raises:
        SerialLoraError: If they are not of shape (B,).
    """
    size = len(noised.times)
    if not torch.is_tensor(losses) or losses.shape != (size,):
        given = f"shape {tuple(losses.shape)}" if torch.is_tensor(losses) else f"a {type(losses).__name__}"
        raise SerialLoraError(
            f"{type(objective).__name__}.{method}() must return one loss per sample, a tensor of shape ({size},); it "
            f"returned {given}. A mean over all but the first axis has it: error.flatten(1).mean(1)."
        )
    return losses


def prior_preservation(losses: Tensor, prior: Tensor, weight: float) -> Tensor:
    """mean(loss of the subject's samples) + weight mean(loss of the class's samples) (DreamBooth, arXiv 2208.12242).

    Args:
        losses: Loss of every sample, (B,).
        prior: Which samples are of the class, (B,) of bool.
        weight: Weight of the prior term.
    """
    own, other = losses[~prior], losses[prior]
    return own.mean() + weight * other.mean() if len(other) else own.mean()


def objective_for(scheduler: Any, options: ObjectiveOptions, *, tokens: int = 4096, sigma: str = "hybrid") -> Objective:
    """The objective that the options name, on the process of a pipeline's scheduler.

    Args:
        scheduler: The pipeline's scheduler.
        options: They name the objective, its settings and those of the process.
        tokens: Image tokens of a sample, for schedulers that shift by resolution.
        sigma: What to do with a learned variance, see `Diffusion`.

    Raises:
        SerialLoraError: If there is no such objective, or a setting is not one of its or of the process.
    """
    process = process_for(scheduler, tokens=tokens, sigma=sigma, **process_settings(options))
    kind = objective_class(options.objective)
    settings = objective_settings(kind, options.objective_args or {})
    prior_weight = getattr(options, "prior_loss_weight", 0.0)  # of the recipes that have class images
    return kind(process, prior_weight, options.loss_type, options.huber_c, options.noise_offset, **settings)


def process_settings(options: ObjectiveOptions) -> dict[str, Any]:
    """The options that shape the process and are not at their defaults, by the names of its fields."""
    scheme = options.weighting_scheme
    values = {
        "snr_gamma": options.snr_gamma,
        "density": "uniform" if scheme in WEIGHTINGS else scheme,
        "weighting": scheme if scheme in WEIGHTINGS else "none",
        "logit_mean": options.logit_mean,
        "logit_std": options.logit_std,
        "mode_scale": options.mode_scale,
        "precondition": options.precondition_outputs,
        "between": (options.min_timestep, options.max_timestep),
    }
    defaults = {field.name: field.default for process in PROCESSES.values() for field in fields(process)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if value != defaults[name]}


OBJECTIVES = {"auto": f"{__name__}:Objective", "dpo": f"{__package__}.preferences:DPO"}


def objective_class(name: str) -> type[Objective]:
    """The class behind --objective: a name of `OBJECTIVES`, FILE.py:CLASS or MODULE:CLASS.

    Raises:
        SerialLoraError: If there is no such class, or it is not an `Objective`.
    """
    where, colon, attribute = OBJECTIVES.get(name, name).rpartition(":")
    if not colon:
        raise SerialLoraError(
            f"--objective must be {', '.join(OBJECTIVES)}, FILE.py:CLASS or MODULE:CLASS; got {name!r}."
        )
    found = getattr(_module(where), attribute, None)
    if not (inspect.isclass(found) and issubclass(found, Objective)):
        raise SerialLoraError(f"--objective {name}: {where} has no class {attribute} that inherits Objective.")
    return found


def objective_settings(kind: type[Objective], given: Mapping[str, str]) -> dict[str, Any]:
    """The settings of an objective's class, as Python values.

    Raises:
        SerialLoraError: If the class has no such setting, or asks for one that is not given.
    """
    base = {field.name for field in fields(Objective)}
    known = {field.name: field for field in fields(kind) if field.name not in base}
    for name in given:
        if name not in known:
            have = ", ".join(known) or "none"
            hint = " Put @dataclass(frozen=True) above the class." if name in inspect.get_annotations(kind) else ""
            raise SerialLoraError(
                f"--objective_args {name}: {kind.__name__} has no such setting; it has: {have}.{hint}"
            )
    missing = [n for n, f in known.items() if n not in given and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise SerialLoraError(f"{kind.__name__} needs --objective_args {missing[0]}=VALUE.")
    return {name: _setting(f"--objective_args {name}", text, known[name].default) for name, text in given.items()}


def _setting(flag: str, text: str, default: Any) -> Any:
    """A setting's value: of the kind of its default where that is a number, a truth value or a text."""
    value = python_value(text)
    if isinstance(default, str):
        return text
    kinds = bool if isinstance(default, bool) else (int, float)
    if isinstance(default, int | float) and (
        not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool)
    ):
        wanted = "True or False" if kinds is bool else "a number"
        raise SerialLoraError(f"{flag} must be {wanted}, as its default {default!r} is; got {text!r}.")
    return value


def _module(where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(f"objective_{Path(where).stem}", where)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError, SyntaxError) as error:
        raise SerialLoraError(f"--objective {where} cannot be loaded: {error}.") from error
