"""Train from the first step to the file: the order in which every recipe validates, steps, saves and uploads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data.batches import Batch
from ..run import Run
from .objectives import Objective, prior_preservation
from .samples import Samples
from .validation import Predict, denoising_losses, fixed_noise_loss


def fit(
    run: Run,
    samples: Samples,
    objective: Objective,
    predict: Predict,
    draw: Callable[[], list[Image.Image]],
    columns: int,
) -> Path:
    """Train until --max_train_steps, or until interrupted; gives the path of what was trained.

    Args:
        run: A prepared run.
        samples: What it reads.
        objective: The loss.
        predict: The transformer: noisy latents, its timesteps (B,) and the batch to its output.
        draw: Draws the validation images.
        columns: How many of them stand side by side.
    """
    options = run.options
    prior_weight = getattr(options, "prior_loss_weight", 0.0)

    def loss_of(batch: Batch) -> Tensor:
        losses = denoising_losses(objective, predict, samples.latents(batch), batch)
        return prior_preservation(losses, batch.prior.to(losses.device), prior_weight)

    def validate(number: int) -> None:
        if run.validates_at(number):
            run.validate(number, lambda: fixed_noise_loss(objective, predict, samples), draw, columns)

    if run.start == 0:
        validate(0)
    for step in run.steps(samples.read, loss_of):
        if not step.interrupted:
            validate(step.number)
    return run.finish()
