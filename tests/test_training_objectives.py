"""The losses against formulas written out here a second time, in float64, and against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.training.diffusion.objectives import prior_preservation
from slora_diffusers.training.diffusion.processes import Diffusion, RectifiedFlow, process_for
from slora_diffusers.training.randomness import generator, generators

B, C, H = 5, 4, 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sample():
    x0, noise = draw(B, C, H, H, seed=1), draw(B, C, H, H, seed=2)
    return x0, noise, torch.tensor([0, 3, 250, 700, 999])


def reference_abar():
    beta = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    return torch.cumprod(1 - beta, 0), beta


def ddim(**config):
    return DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", **config)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusion_loss_is_the_mean_square_of_the_target_written_out(sample, prediction_type):
    x0, noise, t = sample
    objective = process_for(ddim(prediction_type=prediction_type))
    output = draw(B, C, H, H, seed=3)
    abar = reference_abar()[0][t].reshape(-1, 1, 1, 1)
    z, e = x0.double(), noise.double()
    target = {"epsilon": e, "v_prediction": abar.sqrt() * e - (1 - abar).sqrt() * z, "sample": z}[prediction_type]
    expected = ((output.double() - target) ** 2).mean(dim=(1, 2, 3))
    xt = objective.add_noise(x0, noise, t)
    torch.testing.assert_close(objective.loss(output, x0, noise, xt, t).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noised_latents_and_targets_equal_those_of_the_scheduler(sample, prediction_type):
    x0, noise, t = sample
    scheduler = ddim(prediction_type=prediction_type)
    objective = process_for(scheduler)
    xt = objective.add_noise(x0, noise, t)
    torch.testing.assert_close(xt, scheduler.add_noise(x0, noise, t))
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
    assert objective.loss(target, x0, noise, xt, t).max() < 1e-10


def gaussian_diffusion_bound(x0, xt, eps, v, t):
    """IDDPM's vb term for one sample, in float64, from the densities themselves."""
    abar, beta = reference_abar()
    alpha, before = 1 - beta[t], abar[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
    posterior = beta[t] * (1 - before) / (1 - abar[t])
    if t == 0:
        posterior = beta[1] * (1 - abar[0]) / (1 - abar[1])
    log_variance = (v + 1) / 2 * beta[t].log() + (1 - (v + 1) / 2) * posterior.log()
    hat = (xt - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()

    def mean(z):
        return before.sqrt() * beta[t] / (1 - abar[t]) * z + alpha.sqrt() * (1 - before) / (1 - abar[t]) * xt

    p = torch.distributions.Normal(mean(hat), (0.5 * log_variance).exp())
    if t > 0:
        q = torch.distributions.Normal(mean(x0), posterior.sqrt().expand_as(x0))
        return torch.distributions.kl_divergence(q, p).mean() / math.log(2)
    inside = p.cdf(x0 + 1 / 255) - p.cdf(x0 - 1 / 255)
    inside = torch.where(x0 < -0.999, p.cdf(x0 + 1 / 255), inside)
    inside = torch.where(x0 > 0.999, 1 - p.cdf(x0 - 1 / 255), inside)
    return -inside.clamp(min=1e-12).log().mean() / math.log(2)


def test_hybrid_loss_is_iddpms_and_its_bound_does_not_reach_the_mean(sample):
    x0, noise, t = sample
    x0 = x0.clamp(-1, 1)
    objective = process_for(ddim())
    xt = objective.add_noise(x0, noise, t)
    output = torch.cat([noise + 0.1 * draw(B, C, H, H, seed=3), draw(B, C, H, H, seed=4).tanh()], dim=1)
    output.requires_grad_(True)
    loss = objective.loss(output, x0, noise, xt, t)
    eps, v = output.detach().double().chunk(2, dim=1)
    expected = [
        ((eps[i] - noise[i].double()) ** 2).mean()
        + gaussian_diffusion_bound(x0[i].double(), xt[i].double(), eps[i], v[i], int(t[i]))
        for i in range(B)
    ]
    torch.testing.assert_close(loss.double(), torch.stack(expected), rtol=2e-3, atol=1e-5)
    loss.sum().backward()
    on_mean = 2 * (eps - noise.double()) / (C * H * H)  # of the squared error alone
    torch.testing.assert_close(output.grad[:, :C].double(), on_mean, rtol=1e-4, atol=1e-8)
    assert output.grad[:, C:].abs().min(dim=0).values.max() > 0


def test_ignored_sigma_is_the_squared_error_on_the_first_half(sample):
    x0, noise, t = sample
    objective = process_for(DPMSolverMultistepScheduler(), sigma="ignore")
    output = draw(B, 2 * C, H, H, seed=3)
    loss = objective.loss(output, x0, noise, objective.add_noise(x0, noise, t), t)
    torch.testing.assert_close(loss, ((output[:, :C] - noise) ** 2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_by_the_clipped_snr(sample, prediction_type):
    x0, noise, t = sample
    scheduler = ddim(prediction_type=prediction_type)
    output = draw(B, C, H, H, seed=3)
    plain, weighted = (process_for(scheduler, snr_gamma=gamma) for gamma in (None, 5.0))
    xt = plain.add_noise(x0, noise, t)
    abar = reference_abar()[0][t]
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    ratio = weighted.loss(output, x0, noise, xt, t) / plain.loss(output, x0, noise, xt, t)
    torch.testing.assert_close(ratio.double(), weight, rtol=1e-4, atol=1e-5)


def test_flow_loss_is_the_mean_square_of_the_velocity_and_preconditioning_weighs_by_sigma_squared(sample):
    x0, noise, _ = sample
    sigma = torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = process_for(scheduler)
    z = objective.add_noise(x0, noise, sigma)
    s = sigma.double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(z.double(), (1 - s) * x0.double() + s * noise.double(), rtol=1e-5, atol=1e-6)
    output = draw(B, C, H, H, seed=3)
    loss = objective.loss(output, x0, noise, z, sigma)
    torch.testing.assert_close(loss, ((output - (noise - x0)) ** 2).mean(dim=(1, 2, 3)))
    preconditioned = process_for(scheduler, precondition=True).loss(output, x0, noise, z, sigma)
    x0_of_output = z - sigma.reshape(-1, 1, 1, 1) * output
    torch.testing.assert_close(preconditioned, ((x0_of_output - x0) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objective.timesteps(sigma), sigma * 1000)
    assert objective.timesteps(sigma).dtype == torch.float32


def test_flow_times_pass_through_the_schedulers_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(process_for(scheduler).shift(u), scheduler.sigmas.flip(0), rtol=1e-5, atol=1e-6)
    dpm = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    dpm.set_timesteps(10)
    even = torch.linspace(1, 1 / 1000, 11)
    torch.testing.assert_close(process_for(dpm).shift(1 - even).flip(0)[:-1], dpm.sigmas[:-1], rtol=1e-5, atol=1e-6)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        shifted = process_for(dynamic, tokens=tokens).shift(u)
        torch.testing.assert_close(shifted, math.exp(mu) / (math.exp(mu) + (1 / u - 1)))


def test_each_density_has_the_distribution_that_it_is_named_for():
    draws = generators(0, "times", 0, range(4000))
    identity = FlowMatchEulerDiscreteScheduler(shift=1.0)
    logits = process_for(identity, logit_mean=0.5, logit_std=0.8).sample_times(draws).logit()
    # u chooses from timesteps that begin with pure noise: sigma is shift(1 - u), and a larger mean means less noise.
    assert abs(logits.mean() + 0.5) < 0.05 and abs(logits.std() - 0.8) < 0.05
    uniform = process_for(identity, density="uniform").sample_times(draws).sort().values
    assert (uniform - torch.linspace(0, 1, 4000)).abs().max() < 0.03
    mode = process_for(identity, density="mode", mode_scale=1.29).sample_times(draws)
    u = (torch.arange(20000) + 0.5) / 20000
    exact = (1 - u - 1.29 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)).sort().values
    at = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(mode.quantile(at), exact.quantile(at), atol=0.03, rtol=0)


DENSITY_SETTINGS = [("logit_normal", 0.0, 1.0), ("logit_normal", 1.2, 0.6), ("logit_normal", -0.7, 1.5), ("mode", 0, 1)]


@pytest.mark.parametrize("scheduler", [{"shift": 1.0}, {"shift": 3.0}])
@pytest.mark.parametrize(("density", "mean", "std"), [*DENSITY_SETTINGS, ("uniform", 0.0, 1.0)])
def test_times_are_distributed_as_in_diffusers_script(density, mean, std, scheduler):
    """Its lines: u to an index into the scheduler's timesteps, and the sigma there; compared quantile by quantile."""
    scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    ours = process_for(scheduler, density=density, logit_mean=mean, logit_std=std)
    u = compute_density_for_timestep_sampling(
        "none" if density == "uniform" else density, 20000, mean, std, 1.29, generator=torch.Generator().manual_seed(0)
    )
    indices = (u * scheduler.config.num_train_timesteps).long()
    theirs = scheduler.timesteps[indices] / 1000
    sampled = ours.sample_times(generators(0, "times", 0, range(5000)))
    at = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(sampled.quantile(at), theirs.quantile(at), atol=0.025, rtol=0)
    # Validation's times are the same distribution's, at the centres of equally likely parts.
    count = 50
    centres = (torch.arange(count) + 0.5) / count
    fixed = ours.stratified_times(count).sort().values
    torch.testing.assert_close(fixed, theirs.quantile(centres), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("none", lambda s: 1.0),
        ("sigma_sqrt", lambda s: s**-2),
        ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
    ],
)
def test_a_flow_weighs_samples_as_the_scheme_says(weighting, weight):
    flow = process_for(FlowMatchEulerDiscreteScheduler(shift=1.0), density="uniform", weighting=weighting)
    sigma = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    x0, noise, output = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    expected = weight(sigma) * ((output - (noise - x0)) ** 2).flatten(1).mean(1)
    loss = flow.loss(output, x0, noise, flow.add_noise(x0, noise, sigma), sigma)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_diffusion_times_cover_every_timestep_evenly():
    objective = process_for(ddim())
    times = objective.sample_times(generators(0, "times", 0, range(5000)))
    assert times.dtype == torch.int64 and times.min() >= 0 and times.max() <= 999
    assert (times.double().mean() - 499.5).abs() < 15
    assert objective.stratified_times(4).tolist() == [125, 375, 625, 875]


def test_times_of_a_sample_depend_on_its_counters_alone():
    objective = RectifiedFlow(lambda u: u)
    together = objective.sample_times(generators(7, "times", 3, [0, 1, 2]))
    torch.testing.assert_close(together[2:], objective.sample_times([generator(7, "times", 3, 2)]), rtol=0, atol=0)
    assert len(together.unique()) == 3


def test_prior_preservation_adds_the_weighted_mean_of_the_class():
    losses, prior = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([False, False, True, True])
    assert prior_preservation(losses, prior, 0.5).item() == 2.0 + 0.5 * 15.0
    assert prior_preservation(losses[:2], prior[:2], 0.5).item() == 2.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: process_for(FlowMatchEulerDiscreteScheduler(), snr_gamma=5.0), "snr_gamma"),
        (lambda: process_for(FlowMatchEulerDiscreteScheduler(), density="normal"), "logit_normal, uniform, mode"),
        (lambda: process_for(FlowMatchEulerDiscreteScheduler(), weighting="sigma"), "none, sigma_sqrt, cosmap"),
        (lambda: process_for(FlowMatchEulerDiscreteScheduler(), logit_men=1.0), "did you mean logit_mean"),
        (lambda: process_for(ddim(), nonsense=1.0), "no objective has a setting 'nonsense'"),
        (lambda: process_for(ddim(), logit_mean=0.5), "logit_mean shapes the times and weights of flows"),
        (lambda: process_for(ddim(), weighting="cosmap"), "--weighting_scheme shapes"),
        (lambda: Diffusion(reference_abar()[0], "noise"), "epsilon, v_prediction, sample"),
        (lambda: Diffusion(reference_abar()[0], sigma="both"), "hybrid, ignore"),
    ],
)
def test_settings_that_do_not_exist_are_refused_by_name(build, message):
    with pytest.raises(SerialLoraError, match=message):
        build()


def test_an_output_with_an_odd_number_of_channels_is_refused(sample):
    x0, noise, t = sample
    objective = process_for(ddim())
    with pytest.raises(SerialLoraError, match="3 channels for latents of 4"):
        objective.loss(draw(B, 3, H, H), x0, noise, x0, t)
