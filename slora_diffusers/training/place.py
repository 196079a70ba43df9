"""Where a run computes: its processes, its device, and the number formats of the frozen base."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from torch import nn

from ..core.pair import GRADIENT
from ..errors import SerialLoraError
from ..files.hub import reserve_repository
from .options import BaseOptions
from .precision import DTYPES
from .preflight import check_options

logger = logging.getLogger(__name__)


class Place:
    """The processes that run a recipe, made before anything is loaded.

    Attributes:
        accelerator: accelerate's handle on them.
        device: Where this process computes.
        weight_dtype: What the frozen base is held in.
        output_dir: Where everything is written.
        repository: Where on the Hub the result goes, None for nowhere.
        identities: {what is trained on: key of its content}, which a checkpoint remembers.

    Raises:
        SerialLoraError: If a package that an option needs is missing, or options contradict each other.
    """

    def __init__(self, options: BaseOptions) -> None:
        check_options(options)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        set_seed(options.seed)  # of the adapter's initial weights: the same on every process
        self.output_dir = Path(options.output_dir)
        logs = self.output_dir / options.logging_dir
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=None if options.report_to is None else [*options.report_to],
            project_config=ProjectConfiguration(str(self.output_dir), str(logs / (options.run_name or ""))),
            device_placement=False,  # the recipes know what is to lie where
        )
        # What accelerate was launched or configured with counts, unless the options say otherwise.
        if self.accelerator.mixed_precision not in DTYPES:
            raise SerialLoraError(f"mixed precision {self.accelerator.mixed_precision} is not supported: use bf16.")
        if asked := self._processes_asked_for():
            logger.warning("%s, but this run has %d: see `accelerate config`", asked, self.processes)
        self.repository: str | None = None
        self.identities: dict[str, str] = {}
        if options.push_to_hub and self.accelerator.is_main_process:
            self.repository = reserve_repository(options.hub_model_id or self.output_dir, options.hub_token)
        self.device = self.accelerator.device
        torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
        # Trained in full, the base stays fp32 and autocast does the rest; a frozen one is held in the low precision.
        full = options.adapter == "full"
        self.weight_dtype = torch.float32 if full else DTYPES[self.accelerator.mixed_precision]
        if self.deepspeed:
            self._check_deepspeed(options)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the optimizer."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def _processes_asked_for(self) -> str | None:
        """What the launcher asked for, where fewer processes were started; None where all is well."""
        environment = os.environ
        if (count := int(environment.get("WORLD_SIZE", "1"))) > self.processes:
            return f"the launcher asked for {count} processes"
        # accelerate's launcher of a single process tells the address of several, if that is what it was asked for.
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and self.processes == 1:
            return None if "WORLD_SIZE" in environment else "accelerate launch was asked for several processes"
        return None

    def autocast(self) -> Any:
        """A context in which the models compute in the run's precision."""
        return self.accelerator.autocast()

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def share(self, *lists: Sequence[Any]) -> list[Sequence[Any]]:
        """This process's part of lists of the same length."""
        return [entries[self.accelerator.process_index :: self.processes] for entries in lists]

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """The model inside what accelerate prepared."""
        return self.accelerator.unwrap_model(model)

    def _check_deepspeed(self, options: BaseOptions) -> None:
        if options.checkpointing_steps or options.resume_from_checkpoint:
            raise SerialLoraError(
                "DeepSpeed keeps the optimizer's state in its engine, so there are no checkpoints to resume from: "
                "add --checkpointing_steps 0, or launch with DDP or FSDP2."
            )
        if options.init == GRADIENT:
            raise SerialLoraError(
                "DeepSpeed keeps gradients in its engine, where --init gradient cannot read them: use --init kaiming, "
                "or launch with DDP or FSDP2."
            )
        plugin = self.accelerator.state.deepspeed_plugin
        assert plugin is not None
        # It otherwise asks the data loader, and ours is not prepared.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.train_batch_size
