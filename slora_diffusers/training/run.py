"""One run: the models that train, how their weights move, what is written down, and where it can go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import SerialLoraError
from ..files.hub import PROMPT, publish
from . import checkpoint
from .data.batches import Batch
from .log import Log
from .loop import Step, interruptible, train_steps
from .methods import ADAPTERS, Adapter
from .optimization import Optimization, total_steps
from .options import BaseOptions
from .parsing import FREE, REFUSED, save_options, specs_of
from .place import Place

logger: Any = get_logger(__name__)


class Run:
    """A run that is ready to train; what it was made of is written to `<output_dir>/config.yaml`.

    Args:
        place: The processes.
        options: The parsed options.
        models: The models that train, adapted, by the name of the pipeline's component.
        batches_per_epoch: Micro-batches of one pass over the images.
        rates: Learning rates other than --learning_rate, by the same names or, for a part of a model, by
            "<name>.<part>"; LoRA+ leaves parts alone.
        method: What saves the result; that of --adapter by default.

    Attributes:
        options: The options with everything settled that they left open: steps, warm-up, precision.
        called: The models to call in the forward pass, by name.
        models: The same, unwrapped.
        done: Optimizer steps that are done.

    Raises:
        SerialLoraError: If the checkpoint to resume from is missing, damaged or does not fit.
    """

    def __init__(
        self, place: Place, options: BaseOptions, models: Mapping[str, nn.Module], batches_per_epoch: int,
        rates: Mapping[str, float] | None = None, method: Adapter | None = None,
    ) -> None:  # fmt: skip
        accumulation = place.accelerator.gradient_accumulation_steps
        self.steps_in_all = total_steps(options, batches_per_epoch, accumulation)
        warmup = self.steps_in_all // 10 if options.lr_warmup_steps is None else options.lr_warmup_steps
        self.options = replace(
            options, max_train_steps=self.steps_in_all, lr_warmup_steps=warmup,
            gradient_accumulation_steps=accumulation, mixed_precision=place.accelerator.mixed_precision,
            hub_model_id=place.repository or options.hub_model_id,
        )  # fmt: skip
        self.place, self.output_dir, self._batches_per_epoch = place, place.output_dir, max(1, batches_per_epoch)
        self.method = method or ADAPTERS[options.adapter]
        if place.is_main:
            save_options(self.options, self.output_dir / "config.yaml")
        self._log = Log(place, self.options)
        self.optimization = Optimization(
            place, options, models, self.steps_in_all, warmup, rates or {}, compiled=options.compile
        )
        self.called, self.models = self.optimization.called, self.optimization.models
        self.done = 0
        if options.resume_from_checkpoint:
            self._resume(checkpoint.find_checkpoint(self.output_dir, options.resume_from_checkpoint))
        if place.is_main:
            for abandoned in checkpoint.set_aside_after(self.output_dir, self.done):
                logger.warning("a later checkpoint, of another run, is set aside: %s", abandoned)
            self._log.set_aside_after(self.done)

    def steps(
        self, batches_from: Callable[[int], Iterator[Batch]], loss_of: Callable[[Batch], Tensor],
        measures: Callable[[], Mapping[str, float]] = dict,
    ) -> Iterator[Step]:  # fmt: skip
        """Train: shows progress, logs, and writes checkpoints on time, and before an interrupted run ends.

        Args:
            batches_from: Micro-batches from a number on.
            loss_of: Loss of a micro-batch.
            measures: Further numbers of the step that was taken, for the log.
        """
        accelerator, every = self.place.accelerator, self.options.checkpointing_steps
        batches = batches_from(self.done * accelerator.gradient_accumulation_steps)
        bar = tqdm(
            total=self.steps_in_all, initial=self.done, desc="training", unit="step",
            disable=not accelerator.is_local_main_process,
        )  # fmt: skip
        moving = (list(self.called.values()), self.optimization.optimizer, self.optimization.schedule)
        bounds = {"start": self.done, "stop": self.steps_in_all, "max_grad_norm": self.options.max_grad_norm}
        with _closing(bar), interruptible() as interrupt:
            for step in train_steps(accelerator, *moving, batches, loss_of, **bounds, interrupt=interrupt):
                self.optimization.after_step()
                self.done = step.number
                if step.interrupted and not self.place.deepspeed:  # first of all: there may be no terminal any more
                    self.save_checkpoint()
                _show(bar, step)
                names = ("loss", "lr", "grad_norm", "seconds", "memory")
                self.log({**{name: getattr(step, name) for name in names}, **measures()}, step.number)
                if every and step.number % every == 0 and not step.interrupted:
                    self.save_checkpoint()
                yield step
                if step.interrupted:
                    logger.warning("interrupted after step %d", step.number)

    def introduce(self, data: Mapping[str, str]) -> None:
        """Say what is trained on what, where, and for how long."""
        options, processes = self.options, self.place.processes
        samples = options.train_batch_size * options.gradient_accumulation_steps * processes
        steps = -(-self._batches_per_epoch // options.gradient_accumulation_steps)
        trained = self.optimization.parameters()
        lines = {
            **data,
            "steps": f"{self.steps_in_all} in all, {self.steps_in_all - self.done} to go; {steps} per epoch, "
            f"{self.steps_in_all / steps:.4g} epochs",
            "samples per step": f"{samples} = {options.train_batch_size} per batch x "
            f"{options.gradient_accumulation_steps} batches x {processes} processes",
            "trained": f"{sum(p.numel() for p in trained):,} parameters in {len(trained)} tensors",
            **{name: _where(model) for name, model in self.models.items()},
            "precision": f"{options.mixed_precision}, seed {options.seed}, on {self.place.device}",
            "written to": str(self.output_dir),
        }
        self._log.introduce(lines)
        width = max(map(len, lines))
        for name, line in lines.items():
            logger.info("%s  %s", name.ljust(width), line)

    def evaluation(self) -> AbstractContextManager[None]:
        """Inside, models are in eval mode, with the weights to evaluate: averaged, or a schedule-free optimizer's."""
        return self.optimization.evaluation()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers to `<output_dir>/metrics.jsonl` and send them to the tracker."""
        self._log.numbers(values, step)

    def log_picture(self, name: str, image: Image.Image, step: int) -> None:
        """Write a picture to `<output_dir>/validation` and send it to the trackers that take pictures."""
        self._log.picture(name, image, step)

    def pictures(self, name: str) -> dict[int, Path]:
        """{step: picture} of this run so far, with those of before it was resumed."""
        return self._log.pictures(name)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, with the adapter as it would be saved; every process calls."""
        self._write_checkpoint()
        self.place.wait()

    def _write_checkpoint(self) -> None:
        specs = specs_of(self.options)
        options = {name: value for name, value in asdict(self.options).items() if not specs[name][0].secret}
        made_by = {"step": self.done, "options": options, "processes": self.place.processes}
        made_by["identities"] = dict(self.place.identities)
        state = {**made_by, **self.optimization.state()}
        limit = self.options.checkpoints_total_limit
        checkpoint.write_checkpoint(self.output_dir, self.done, state, limit, self._save_adapter, self.place.is_main)

    def _save_adapter(self, folder: Path) -> None:
        """The adapter alone, so that the best step can be picked; every weight is in the checkpoint's state already."""
        if self.options.adapter != "full":
            with self.evaluation():
                self.method.save(self.models, folder, self.place.is_main)

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """Whatever is raised inside: a checkpoint of the last step is written first, if this process can do it alone.

        Weights that were between two steps are saved without the optimizer's state, which does not fit them.
        """
        start = self.done
        try:
            yield
        except BaseException as error:
            alone = self.place.is_main and not self.place.deepspeed and not self.optimization.sharded
            if alone and not isinstance(error, GeneratorExit) and (self.done > start or self.optimization.moving):
                self._rescue(error)
            self._log.last_page()
            raise

    def _rescue(self, error: BaseException) -> None:
        where = self.output_dir / f"checkpoint-{self.done}"
        try:
            if self.optimization.moving:
                where = self.output_dir / f"rescued-{self.done}"
                self.method.save(self.models, where, True)
            elif not (where / checkpoint.STATE_NAME).exists():
                self._write_checkpoint()
            logger.error("%s ended the run: its weights are in %s", type(error).__name__, where)
        except Exception as another:
            logger.error("the weights of step %d could not be saved: %s", self.done, another)

    def finish(self, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Save the adapter to `output_dir`, and upload it if asked; every process calls. Returns what was written.

        Args:
            weights: What to save, by the names of the trained parameters, instead of the last weights.
        """
        with self.evaluation():
            if weights is not None:
                checkpoint.load_parameters(self.optimization.trained(), weights)
            path = self.method.save(self.models, self.output_dir, self.place.is_main)
        if self.place.repository is not None:
            options = self.options
            prompts = (getattr(options, name, None) for name in ("validation_prompt", "instance_prompt"))
            prompt = next((prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts if prompt), PROMPT)
            settings = {"base_model": options.pretrained_model_name_or_path, "prompt": prompt}
            also = ("config.yaml", "validation/*")
            publish(path, self.place.repository, **settings, token=options.hub_token, also=also)
        self.place.wait()
        self._log.end()
        return path

    def _resume(self, path: Path | None) -> None:
        if path is None:
            logger.warning("no checkpoint in %s yet: starting at step 0", self.output_dir)
            return
        state = checkpoint.read_checkpoint(path)
        self._compare(path, state["options"], state["processes"])
        for name, key in self.place.identities.items():
            if (state.get("identities") or {}).get(name, key) != key:
                logger.warning("%s are not those of %s: the run will not equal an uninterrupted one", name, path)
        self.optimization.load_state(state)
        self.done = state["step"]
        if self.done >= self.steps_in_all:
            logger.warning("%s has all of --max_train_steps %d: nothing to train", path, self.steps_in_all)
        logger.info("resumed from %s at step %d", path, self.done)

    def _compare(self, path: Path, then: Mapping[str, Any], processes: int) -> None:
        """Refuse options that the checkpoint's state does not fit, and warn of those that change what comes."""
        changed = {"processes": (processes, self.place.processes)} if processes != self.place.processes else {}
        for name, (spec, _, default) in specs_of(self.options).items():
            before, now = then.get(name, default), getattr(self.options, name)
            if before == now or spec.resume == FREE:
                continue
            if spec.resume == REFUSED:
                raise SerialLoraError(
                    f"{path} was written with --{name} {before}, and now it is {now}: what it holds does not "
                    "fit. Resume with the option that wrote it."
                )
            if name != "max_train_steps" or not self.options.lr_scheduler.startswith("constant"):
                changed[name] = (before, now)
        for name, (before, now) in changed.items():
            logger.warning("%s was %s and is now %s: the run will not equal an uninterrupted one", name, before, now)


def _where(model: nn.Module) -> str:
    """What a model's weights are held in, and where: bytes by dtype and device."""
    held: dict[str, int] = {}
    for parameter in model.parameters():
        key = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
        held[key] = held.get(key, 0) + parameter.numel() * parameter.element_size()
    return ", ".join(f"{count / 2**20:,.1f} MB of {key}" for key, count in held.items())


def _show(bar: Any, step: Step) -> None:
    with suppress(OSError):  # a terminal that is gone
        bar.update()
        bar.set_postfix_str(
            f"loss {step.loss:.4f}, lr {step.lr:.1e}, {step.seconds:.2f} s/step, {step.memory / 2**30:.2f} GB"
        )


@contextmanager
def _closing(bar: Any) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            bar.close()
