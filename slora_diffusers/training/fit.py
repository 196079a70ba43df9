"""Train from the first step to the file, and what happens beside the steps: validation, and stopping early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate.logging import get_logger
from torch import Tensor

from .data.batches import Batch
from .loop import Step
from .memory import unless_it_does_not_fit
from .run import Run
from .start import start_run

logger: Any = get_logger(__name__)


class Task(Protocol):
    """What a run learns: see `diffusion.denoising.Denoising` and `vision.recipe.Supervised`."""

    def read(self, start: int) -> Iterator[Batch]:
        """Micro-batches of this process from a number on."""
        ...

    def loss(self, batch: Batch, /) -> Tensor:
        """Loss of a micro-batch, a scalar."""
        ...

    def measures(self) -> Mapping[str, float]:
        """Further numbers of the step that was taken, for the log."""
        ...

    def describe(self) -> Mapping[str, str]:
        """What is learnt from, for the lines at the start."""
        ...


class Callback:
    """What happens beside the steps. Every process calls every method, so that none waits for another.

    Attributes:
        weights: What to save instead of the last weights, by the names of the trained parameters.
        stops: Whether to end the training.
    """

    weights: Mapping[str, Tensor] | None = None
    stops: bool = False

    def before(self, run: Run) -> None:
        """Called once, before the first step of this process; `run.done` is above 0 in a resumed run."""

    def after(self, run: Run, step: Step) -> None:
        """Called after every step that was not interrupted."""


def fit(run: Run, task: Task, callbacks: Sequence[Callback] = ()) -> Path:
    """Train until --max_train_steps, an interruption or a callback's end, and save; returns what was written."""
    run.introduce(task.describe())
    start_run(run, task)
    task.measures()  # those of the start are not the first step's
    with run.rescued():
        for callback in callbacks:
            callback.before(run)
        for step in run.steps(task.read, task.loss, task.measures):
            if not step.interrupted:
                for callback in callbacks:
                    callback.after(run, step)
            if any(callback.stops for callback in callbacks):
                break
    return run.finish(next((c.weights for c in callbacks if c.weights is not None), None))


class Validation(Callback):
    """Every --validation_steps, at the last step, and before the first.

    Args:
        evaluate: Scores of the weights at a step; whatever else it does goes with them.
        best: Notes the scores, and may stop the training.
    """

    def __init__(self, evaluate: Callable[[int], Mapping[str, float]], best: Best | None = None) -> None:
        self._evaluate, self._best = evaluate, best

    @property
    def weights(self) -> Mapping[str, Tensor] | None:  # type: ignore[override]
        return self._best.weights if self._best is not None else None

    @property
    def stops(self) -> bool:  # type: ignore[override]
        return self._best is not None and self._best.stops

    def before(self, run: Run) -> None:
        if self._best is not None and self._best.patience and run.done:
            logger.warning("a resumed run knows no earlier score: early stopping counts from step %d", run.done)
        if run.done == 0 and run.options.validation_steps:
            self.validate(run, 0)

    def after(self, run: Run, step: Step) -> None:
        every = run.options.validation_steps
        if every and (step.number % every == 0 or step.number == run.steps_in_all):
            self.validate(run, step.number)

    def validate(self, run: Run, number: int) -> None:
        """Evaluate the weights of step `number` (0 is the untrained adapter), and log the scores."""
        scores: dict[str, float] = {}
        with unless_it_does_not_fit(f"the validation at step {number}"), run.evaluation():
            scores = dict(self._evaluate(number))
            if self._best is not None:
                self._best.note(run, scores)
        if not scores:
            return
        run.log(scores, number)
        shown = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
        logger.info("step %d: %s", number, shown)
        if self.stops:
            assert self._best is not None
            logger.info("step %d: %d validations without a better %s", number, self._best.waited, self._best.score)


class Best:
    """The best score so far, what belongs to it, and whether it has been waited for long enough.

    Args:
        score: Which score decides.
        patience: Validations without a better score after which to stop; 0 to keep the last, whatever it is.
        keep: Called after an evaluation of weights that would be saved, were they the last or the best.

    Attributes:
        scores: Those of the weights that would be saved.
    """

    def __init__(self, score: str, patience: int = 0, keep: Callable[[], None] = lambda: None) -> None:
        self.score, self.patience, self._keep = score, patience, keep
        self.best, self.waited = float("-inf"), 0
        self.weights: dict[str, Tensor] | None = None
        self.scores: dict[str, float] = {}

    def note(self, run: Run, scores: dict[str, float]) -> None:
        """Note scores, inside `run.evaluation()`, where parameters are those that were evaluated."""
        better = scores[self.score] > self.best
        self.waited = 0 if better else self.waited + 1
        self.best = max(self.best, scores[self.score])
        if better and self.patience:
            self.weights = {name: p.detach().clone() for name, p in run.optimization.trained()}
        if better or not self.patience:
            self.scores = scores
            if run.place.is_main:
                self._keep()

    @property
    def stops(self) -> bool:
        """Whether to stop."""
        return bool(self.patience) and self.waited >= self.patience
