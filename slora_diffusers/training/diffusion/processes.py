"""How latents are noised and what the transformer is asked for: noise-prediction diffusion, and rectified flow.

A process draws times, noises latents, tells which timestep the transformer reads, and compares its output with the
target, one loss per sample. Everything here is fp32 (coefficients fp64), whatever precision the transformer runs in.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from ...errors import SerialLoraError

SIGMAS = ("hybrid", "ignore")
EVERYWHERE = (0.0, 1000.0)
Error = Callable[[Tensor, Tensor], Tensor]  # prediction and target (B, C, H, W) to one number per sample, (B,)


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean((prediction - target)^2) of every sample, (B,), over what its mask weighs."""
    return mean_of((prediction - target) ** 2, mask)


def mean_of(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of every sample of (B, C, H, W), (B,): sum(m x) / sum(m) with a mask (B, 1, H, W), 0 where it is 0."""
    if mask is None:
        return x.flatten(1).mean(dim=1)
    mask = mask.expand_as(x).flatten(1)
    return (mask * x.flatten(1)).sum(dim=1) / mask.sum(dim=1).clamp_min(1e-6)


def _pseudo_huber(difference: Tensor, c: float) -> Tensor:
    return (difference**2 + c**2).sqrt() - c


# Comparisons of every element by name, with the width c of the robust ones, scaled as in kohya's scripts.
COMPARISONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l2": lambda p, target, c: (p - target) ** 2,
    "l1": lambda p, target, c: (p - target).abs(),
    "huber": lambda p, target, c: 2 * c * _pseudo_huber(p - target, c),  # c -> inf: l2
    "smooth_l1": lambda p, target, c: 2 * _pseudo_huber(p - target, c),  # c -> 0: 2 l1
}


class Process:
    """What a run needs of one: see `Diffusion` and `RectifiedFlow`."""

    between: tuple[float, float]

    def sample_times(self, draws: Sequence[torch.Generator]) -> Tensor:
        """One random time per generator, (B,)."""
        return self._times_at(torch.cat([torch.rand(1, dtype=torch.float64, generator=draw) for draw in draws]))

    def stratified_times(self, count: int) -> Tensor:
        """Times at the centres of `count` equally likely parts of the training distribution, (count,)."""
        return self._times_at((torch.arange(count, dtype=torch.float64) + 0.5) / count)

    def quantiles(self, p: Tensor) -> Tensor:
        """The times of the whole distribution at p in [0, 1), rising, (B,)."""
        raise NotImplementedError

    def _times_at(self, p: Tensor) -> Tensor:
        """The times at p of the part of the distribution whose timesteps lie in `between`."""
        if self.between != EVERYWHERE:
            low, high = (self._share_below(timestep) for timestep in self.between)
            if high - low < 1e-6:
                raise SerialLoraError(
                    f"no times are drawn between timesteps {self.between[0]:g} and {self.between[1]:g}: widen "
                    "--min_timestep and --max_timestep, or use --weighting_scheme uniform."
                )
            p = low + (high - low) * p
        return self.quantiles(p)

    def _share_below(self, timestep: float) -> float:
        """How much of the distribution lies below a timestep, by bisection: quantiles rise."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            below = self.timesteps(self.quantiles(torch.tensor([middle], dtype=torch.float64))).item() < timestep
            low, high = (middle, high) if below else (low, middle)
        return high

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t from x_0 and noise (B, C, H, W)."""
        raise NotImplementedError

    def timesteps(self, times: Tensor) -> Tensor:
        """What the transformer reads for `times`, (B,)."""
        raise NotImplementedError

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the transformer is to predict, (B, C, H, W)."""
        raise NotImplementedError

    def weight(self, times: Tensor) -> Tensor:
        """How much a sample counts, (B,)."""
        raise NotImplementedError

    def bound(
        self, output: Tensor, x0: Tensor, xt: Tensor, times: Tensor, mask: Tensor | None = None
    ) -> Tensor | float:
        """What a predicted variance, the second half of an output of 2 C channels, adds to the loss, (B,)."""
        return 0.0

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, xt: Tensor, times: Tensor, error: Error = squared_error,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of every sample, (B,): weight times error, plus the bound.

        Args:
            output: The transformer's, (B, C or 2 C, H, W).
            x0: Clean latents, (B, C, H, W).
            noise: What was mixed into them.
            xt: The mixture that the transformer read.
            times: Where between the two, (B,).
            error: How prediction and target are compared.
            mask: What each latent weighs in the bound, (B, 1, H, W).
        """
        output, x0, xt = output.float(), x0.float(), xt.float()
        losses = self.weight(times).to(x0) * error(prediction_of(output, x0.shape[1]), self.target(x0, noise, times))
        return losses + self.bound(output, x0, xt, times, mask)


def prediction_of(output: Tensor, channels: int) -> Tensor:
    """The part of the output that is compared with the target: all of it, or the half before a learned variance.

    Raises:
        SerialLoraError: If the output has neither `channels` nor twice as many.
    """
    if output.shape[1] not in (channels, 2 * channels):
        raise SerialLoraError(
            f"the transformer gave {output.shape[1]} channels for latents of {channels}: neither {channels} nor, with "
            f"a learned sigma, {2 * channels}."
        )
    return output[:, :channels]


@dataclass(frozen=True)
class Diffusion(Process):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; the transformer predicts eps, v or x_0, and maybe its variance.

    Args:
        alphas_cumprod: abar_t of every timestep, (T,).
        prediction_type: "epsilon", "v_prediction" or "sample".
        sigma: What to do with the second half of an output of 2 C channels: "hybrid" adds the variational bound on it,
            with the mean detached (Nichol and Dhariwal, arXiv 2102.09672, L_simple + 0.001 L_vlb); "ignore" drops it.
        snr_gamma: min-SNR weighting (Hang et al., arXiv 2303.09556); `None` weighs every timestep the same.
        between: The timesteps that are trained, [first, last).
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    sigma: str = "hybrid"
    snr_gamma: float | None = None
    between: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        _check("prediction_type", self.prediction_type, tuple(TARGETS))
        _check("sigma", self.sigma, SIGMAS)
        object.__setattr__(self, "alphas_cumprod", self.alphas_cumprod.detach().cpu().double().clone())

    def quantiles(self, p: Tensor) -> Tensor:
        return (p * len(self.alphas_cumprod)).long()

    def timesteps(self, times: Tensor) -> Tensor:
        return times

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        a, s = self._signal_and_noise(times, x0)
        return a * x0.float() + s * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return TARGETS[self.prediction_type](x0.float(), noise, *self._signal_and_noise(times, x0))

    def bound(
        self, output: Tensor, x0: Tensor, xt: Tensor, times: Tensor, mask: Tensor | None = None
    ) -> Tensor | float:
        if self.sigma == "ignore" or output.shape[1] == x0.shape[1]:
            return 0.0
        prediction, variance = output.chunk(2, dim=1)
        predicted_x0 = PREDICTED_X0[self.prediction_type](prediction.detach(), xt, *self._signal_and_noise(times, x0))
        # L_hybrid = L_simple + 0.001 L_vlb, and L_vlb sums the T terms of which this is one.
        return 0.001 * len(self.alphas_cumprod) * self._bound(predicted_x0, variance, x0, xt, times, mask)

    def weight(self, times: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(times))
        abar = self.alphas_cumprod[times.cpu()]
        snr = abar / (1 - abar)
        return (snr.clamp(max=self.snr_gamma) / SNR_OF_TARGET[self.prediction_type](snr)).float()

    def _signal_and_noise(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[times.cpu()]
        return _per_sample(abar.sqrt(), like), _per_sample((1 - abar).sqrt(), like)

    def _bound(
        self, predicted_x0: Tensor, variance: Tensor, x0: Tensor, xt: Tensor, times: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One term of the variational bound, in bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p), or -log p(x_0)."""
        times = times.cpu()
        abar = self.alphas_cumprod
        previous = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
        beta = 1 - abar / previous
        posterior_variance = beta * (1 - previous) / (1 - abar)
        # The posterior is a point at t = 0: its logarithm takes the next value there.
        log_posterior = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
        from_x0 = _per_sample((beta * previous.sqrt() / (1 - abar))[times], x0)
        from_xt = _per_sample(((1 - previous) * (abar / previous).sqrt() / (1 - abar))[times], x0)
        low, high = _per_sample(log_posterior[times], x0), _per_sample(beta.log()[times], x0)

        share = (variance + 1) / 2
        log_variance = share * high + (1 - share) * low
        mean, true_mean = from_x0 * predicted_x0 + from_xt * xt, from_x0 * x0 + from_xt * xt
        kl = mean_of(normal_kl(true_mean, low, mean, log_variance), mask) / math.log(2)
        nll = -mean_of(discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance), mask) / math.log(2)
        return torch.where(times.to(x0.device) == 0, nll, kl)


# What the transformer is asked for, the x_0 that its answer implies, and what that target does to the SNR's weight.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, a, s: noise,
    "v_prediction": lambda x0, noise, a, s: a * noise - s * x0,
    "sample": lambda x0, noise, a, s: x0,
}
PREDICTED_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda out, xt, a, s: (xt - s * out) / a,
    "v_prediction": lambda out, xt, a, s: a * xt - s * out,
    "sample": lambda out, xt, a, s: out,
}
SNR_OF_TARGET: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": lambda snr: torch.ones_like(snr),
}


# 1 - u at the quantile p of each density, rising, with its mean m, deviation s and scale.
DENSITIES: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "logit_normal": lambda p, m, s, scale: torch.sigmoid(s * torch.special.ndtri(p) - m),
    "uniform": lambda p, m, s, scale: p,
    "mode": lambda p, m, s, scale: p + scale * (torch.cos(torch.pi * p / 2) ** 2 - 1 + p),
}
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """z_t = (1 - sigma) z_0 + sigma eps; the transformer predicts eps - z_0 (Esser et al., arXiv 2403.03206).

    sigma = shift(1 - u), as in diffusers' training scripts, where u chooses from timesteps that begin with pure noise:
    a larger `logit_mean` means less noise.

    Args:
        shift: The scheduler's map from 1 - u in (0, 1) to sigma in (0, 1).
        num_train_timesteps: The transformer reads sigma times this.
        density: Distribution of u: "logit_normal" (sigmoid of N(logit_mean, logit_std)), "uniform" or "mode".
        logit_mean: Mean m of the logit.
        logit_std: Standard deviation s of the logit.
        mode_scale: Scale of the "mode" density.
        weighting: Weight of a sample: "none" (1), "sigma_sqrt" (sigma^-2) or "cosmap" (2 / (pi (1 - 2 sigma + 2
            sigma^2))), each as in that paper.
        precondition: Compare predictions of z_0 instead, which weighs a sample by sigma^2.
        between: The timesteps (sigma times `num_train_timesteps`) that are trained.
    """

    shift: Callable[[Tensor], Tensor]
    num_train_timesteps: int = 1000
    density: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "none"
    precondition: bool = False
    between: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        _check("density", self.density, tuple(DENSITIES))
        _check("weighting", self.weighting, WEIGHTINGS)

    def quantiles(self, p: Tensor) -> Tensor:
        return self.shift(DENSITIES[self.density](p, self.logit_mean, self.logit_std, self.mode_scale)).float()

    def timesteps(self, times: Tensor) -> Tensor:
        return times.float() * self.num_train_timesteps

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = _per_sample(times, x0)
        return (1 - sigma) * x0.float() + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x0.float()

    def weight(self, times: Tensor) -> Tensor:
        weight = compute_loss_weighting_for_sd3(self.weighting, times)
        return times**2 * weight if self.precondition else weight


PROCESSES: dict[str, type[Process]] = {"diffusion": Diffusion, "flow": RectifiedFlow}


def process_for(scheduler: Any, *, tokens: int = 4096, sigma: str = "hybrid", **settings: Any) -> Process:
    """The process that a pipeline's scheduler was made for.

    Args:
        scheduler: The pipeline's scheduler; only its config and its tables are read.
        tokens: Image tokens of a sample, for schedulers that shift by resolution.
        sigma: What to do with a learned variance, see `Diffusion`; a flow has no use for it.
        settings: Fields of `Diffusion` (snr_gamma) or of `RectifiedFlow` (density, ...).

    Raises:
        SerialLoraError: If the scheduler's prediction type is unknown, or a setting is not one of its process.
    """
    config = scheduler.config
    kind = "flow" if config.get("prediction_type", "flow_prediction") == "flow_prediction" else "diffusion"
    _check_settings(kind, scheduler, settings)
    if kind == "diffusion":
        return Diffusion(scheduler.alphas_cumprod, config["prediction_type"], sigma, **settings)
    return RectifiedFlow(sigma_shift(scheduler, tokens), config["num_train_timesteps"], **settings)


# Flags that are not called as the setting is.
_FLAGS = {"precondition": "--precondition_outputs", **dict.fromkeys(("density", "weighting"), "--weighting_scheme")}


def _check_settings(kind: str, scheduler: Any, settings: dict[str, Any]) -> None:
    """Raise SerialLoraError for a setting that does nothing: of the other process, or of none."""
    fields = {name: set(process.__dataclass_fields__) for name, process in PROCESSES.items()}  # type: ignore[attr-defined]
    for name in settings:
        if name in fields[kind]:
            continue
        known = set().union(*fields.values())
        if name in known:
            what = {"diffusion": "weighs noise-prediction models", "flow": "shapes the times and weights of flows"}
            other = next(k for k in PROCESSES if k != kind)
            is_a = {"diffusion": "predicts noise", "flow": "is a flow"}[kind]
            raise SerialLoraError(
                f"{_FLAGS.get(name, name)} {what[other]}; {type(scheduler).__name__} {is_a}. Leave it out."
            )
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(fields[kind]))}."
        raise SerialLoraError(f"no objective has a setting {name!r}; {hint}")


def sigma_shift(scheduler: Any, tokens: int = 4096) -> Callable[[Tensor], Tensor]:
    """The scheduler's own map from u to sigma: s u / (1 + (s - 1) u), by the number of tokens where dynamic."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
        return lambda u: scheduler.time_shift(mu, 1.0, u)
    s = config.get("shift", config.get("flow_shift", 1.0))
    return lambda u: s * u / (1 + (s - 1) * u)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) per element, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_scale)^2) gives to the bin of width 2 / 255 around x, open at -1 and 1."""
    inverse = torch.exp(-log_scale)
    above = torch.special.ndtr(inverse * (x - mean + 1 / 255))
    below = torch.special.ndtr(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SerialLoraError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
