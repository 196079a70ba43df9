"""The task of a diffusion transformer: the objective's loss on batches of latents, and how that is validated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

from ...errors import SerialLoraError
from ..data.batches import Batch
from ..memory import unless_it_does_not_fit
from ..methods import without_adapter
from ..run import Run
from .objectives import Noised, Objective, per_sample
from .samples import Samples
from .validation import fixed_noise_loss, image_grid, side_by_side

Predict = Callable[[Tensor, Tensor, Batch], Tensor]


class Denoising:
    """What a diffusion run learns, and what its objective may call as its model.

    Args:
        run: A run that is ready to train.
        samples: What it reads.
        objective: What is minimised.
        predict: The transformer: noisy latents, its timesteps (B,) and the batch to its output.
        draw: Draws the validation images.
        columns: How many of them stand side by side.
    """

    def __init__(
        self, run: Run, samples: Samples, objective: Objective, predict: Predict, draw: Callable[[], list[Image.Image]],
        columns: int,
    ) -> None:  # fmt: skip
        self.run, self.samples, self.objective = run, samples, objective
        self._predict, self._draw, self._columns = predict, draw, columns
        self._seen: list[tuple[Tensor, Tensor]] = []  # timesteps and losses since they were last asked for

    def __call__(self, noised: Noised) -> Tensor:
        """The transformer's output, (B, C or 2 C, H, W)."""
        return self._predict(noised.xt, noised.timesteps, noised.batch)

    def base(self, noised: Noised) -> Tensor:
        """Its output without what the run trains, and without gradients."""
        with torch.no_grad(), without_adapter(self.run.method, self.run.models):
            return self(noised)

    def read(self, start: int) -> Iterator[Batch]:
        """Micro-batches of this process from a number on."""
        return self.samples.read(start)

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a micro-batch, a scalar."""
        losses = self.losses(batch)
        total = self.objective.total(losses * batch.weights.to(losses), batch)
        if total.ndim or not total.requires_grad:
            kind = type(self.objective).__name__
            what = (
                f"total() returned a tensor of shape {tuple(total.shape)}" if total.ndim else "the loss has no gradient"
            )
            raise SerialLoraError(
                f"{kind} must give one number that depends on what is trained, but {what}. Do not detach the model's "
                "output or take .item() of it, and let total() end in a mean."
            )
        return total

    def losses(self, batch: Batch, times: Tensor | None = None) -> Tensor:
        """Loss of every sample, (B,), at random times or at given ones."""
        noised = self.objective.draw(self.samples.latents(batch), batch, times)
        losses = per_sample(self.objective.losses(self, noised), noised, self.objective, "losses")
        if times is None:
            own = ~batch.prior.to(losses.device)  # without class images and rejected ones
            self._seen.append((noised.timesteps.detach()[own], losses.detach()[own]))
        return losses

    def measures(self) -> dict[str, float]:
        """The mean loss of this process's own samples of a step, by the quarter of the timesteps that they lie in."""
        if not self._seen:
            return {}
        timesteps, losses = (torch.cat(parts).float().cpu() for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        quarters = (timesteps // 250).clamp(0, 3).long()
        return {
            f"loss/t{250 * quarter}-{250 * (quarter + 1)}": losses[quarters == quarter].mean().item()
            for quarter in sorted(set(quarters.tolist()))
        }

    def describe(self) -> dict[str, str]:
        """What is learnt from."""
        return self.samples.describe()

    def validate(self, number: int) -> dict[str, float]:
        """The loss at fixed noise, and a picture of images; every process computes both, so none waits for another."""
        loss = fixed_noise_loss(self.objective.process, self.samples.fixed(), self.losses)
        if self.run.options.num_validation_images:
            with unless_it_does_not_fit(f"the picture of step {number}"):
                with self.samples.decoding(), self.run.place.autocast():
                    images = self._draw()
                self.run.log_picture("images", image_grid(images, self._columns), number)
                if self.run.place.is_main:
                    side_by_side(self.run.pictures("images")).save(self.run.output_dir / "steps.png")
        return {"validation_loss": loss}
