"""The table of the options that recipes share: each stands here once, with everything there is to say about it.

A recipe's own options are a dataclass that inherits what it wants of these and adds its own fields:

    @dataclass(frozen=True)
    class Options(CommonOptions, TextToImageOptions):
        train_text_encoder: bool = option(False, "Give the CLIP encoders pairs, too.", resume=REFUSED)

Flags are called as in diffusers' own training scripts where they mean the same.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.optimization import SchedulerType

from ..config import SerialLoraConfig
from ..core.pair import GRADIENT, INITS
from ..errors import SerialLoraError
from . import parsing
from .diffusion.processes import COMPARISONS, DENSITIES, WEIGHTINGS
from .optim import OPTIMIZERS, optimizer_name
from .parsing import FREE, REFUSED, option
from .precision import QUANTIZATIONS

T = TypeVar("T")
SCHEMES = (*DENSITIES, *WEIGHTINGS)
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)  # needs rules
KINDS = ("serial", "lora", "full")  # of adapters, for a model without a head of its own
ANY, COUNT, SHARE, POSITIVE, NOT_NEGATIVE = "(-inf, inf)", "[1, inf)", "[0, 1]", "(0, inf)", "[0, inf)"
SEEDS = "[-1, 4294967295]"  # NumPy's largest


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    pretrained_model_name_or_path: str = option(None, "Folder or Hub id of the model to adapt.", required=True)
    revision: str | None = option(None, "Revision on the Hub.")
    cache_dir: str | None = option(None, "Folder that files of the Hub are downloaded to.", resume=FREE)
    mixed_precision: str | None = option(
        None, "Precision of the forward pass; accelerate's by default.", choices=("no", "fp16", "bf16")
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", resume=FREE
    )
    allow_tf32: bool = option(False, "Let matrix products round to TF32 on GPUs.")
    compile: bool = option(False, "Compile the model with torch.compile.")


@dataclass(frozen=True)
class PipelineOptions(ModelOptions):
    """The pipeline."""

    variant: str | None = option(None, "Variant of the weight files, e.g. fp16.")
    quantize: str | None = option(
        None, "Hold the base's weights in fewer bits: nf4, int8 (bitsandbytes), fp8.", choices=QUANTIZATIONS
    )
    offload: str | None = option(
        None, "blocks: keep the transformer's frozen blocks on the CPU, to come where they compute.",
        choices=("blocks",), resume=FREE,
    )  # fmt: skip


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained."""

    adapter: str = option("serial", "Serial LoRA, PEFT's LoRA or every weight.", choices=KINDS, resume=REFUSED)
    init_from: str | None = option(None, "Adapter to start from: file, folder or Hub id.", resume=FREE)
    rank: int = option(16, "Rank of the adapter.", within=COUNT)
    alpha: float | None = option(
        None, "Numerator of the scale alpha / rank; the rank itself by default.", within=ANY, aliases=("lora_alpha",)
    )
    dropout: float = option(0.0, "Dropout on the adapter's input.", within="[0, 1)", aliases=("lora_dropout",))
    rslora: bool = option(False, "Scale by alpha / sqrt(rank).")
    init: str = option(
        "kaiming", "Start of A: drawn at random, or gradient: where the loss wants it.", choices=tuple(INITS),
        resume=REFUSED,
    )  # fmt: skip
    init_batches: int = option(8, "First batches whose gradient --init gradient takes, twice.", within=COUNT)
    inputs: list[str] | None = option(None, "Attention inputs that get a pair; all by default.")
    targets: list[str] | None = option(None, "Regular expressions of the attentions to adapt.")
    exclude: list[str] | None = option(None, "Regular expressions of the attentions to leave out.")
    layers: list[int] | None = option(None, "Blocks to adapt, by index.", within=NOT_NEGATIVE)
    modules_to_save: list[str] | None = option(None, "Modules that train whole beside the pairs, by name.")
    rank_pattern: dict[str, int] | None = option(None, "Ranks of attentions that match PATTERN=RANK.", within=COUNT)
    alpha_pattern: dict[str, float] | None = option(None, "Alphas of attentions that match PATTERN=ALPHA.", within=ANY)

    def config(self) -> SerialLoraConfig:
        """The adapter's own settings."""
        values = {f.name: getattr(self, f.name) for f in fields(SerialLoraConfig) if hasattr(self, f.name)}
        patterns = {name: values[name] or {} for name in ("rank_pattern", "alpha_pattern")}
        init = "kaiming" if self.init == GRADIENT else self.init  # until start.py has found it
        return SerialLoraConfig(**{**values, **patterns, "init": init})


@dataclass(frozen=True)
class ImageOptions:
    """The images."""

    resolution: int | None = option(None, "Side of the images in pixels; the model's own by default.", within=COUNT)
    random_flip: bool = option(False, "Mirror half of the images, chosen again each epoch.")
    dataloader_num_workers: int = option(0, "Processes that read images ahead.", within="[0, 1024]", resume=FREE)


@dataclass(frozen=True)
class MaskOptions:
    """Masks of the loss."""

    mask_data_dir: str | None = option(
        None, "Folder of masks, named as the images: the loss counts where they are white."
    )
    alpha_mask: bool = option(False, "Take the images' alpha channels for such masks.")
    unmasked_weight: float = option(0.0, "Weight of what a mask leaves out.", within=SHARE)


@dataclass(frozen=True)
class LatentOptions(ImageOptions):
    """Images and their latents."""

    aspect_ratio_buckets: str | None = option(None, "auto, or 'height,width;...': shapes other than the square.")
    center_crop: bool = option(True, "Cut images from the centre; without, at a random place, another one each epoch.")
    cache_latents: bool = option(False, "Encode the images once, before training.")
    encodings_dir: str | None = option(
        None, "Folder of encoded images and texts; <output_dir>/cache by default.", resume=FREE
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Steps and the optimizer."""

    train_batch_size: int = option(4, "Samples per step and process.", within=COUNT)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", within=COUNT)
    max_train_steps: int | None = option(
        None, "Optimizer steps; 500 unless --num_train_epochs says otherwise.", within=COUNT
    )
    num_train_epochs: int | None = option(
        None, "Passes over the images, if --max_train_steps is not given.", within=COUNT
    )
    learning_rate: float = option(1e-4, "Learning rate.", within=NOT_NEGATIVE)
    scale_lr: bool = option(False, "Multiply the learning rate by the samples of a step, over all processes.")
    lora_plus_ratio: float = option(1.0, "LoRA+: learning rate of B over that of A.", within=POSITIVE, resume=REFUSED)
    lr_scheduler: str = option("constant", "Schedule of the learning rate, as in diffusers.", choices=SCHEDULES)
    lr_warmup_steps: int | None = option(0, "Steps of warm-up.", within=NOT_NEGATIVE)
    lr_num_cycles: int = option(1, "Restarts of cosine_with_restarts.", within=COUNT)
    lr_power: float = option(1.0, "Power of the polynomial schedule.", within=POSITIVE)
    optimizer: str = option(
        "adamw", f"Optimizer: {', '.join(OPTIMIZERS)}, or module.Class.", convert=optimizer_name, resume=REFUSED
    )
    optimizer_args: dict[str, str] | None = option(None, "Further settings of the optimizer, NAME=VALUE.")
    use_8bit_adam: bool = option(False, "The same as --optimizer adamw8bit.", resume=FREE)
    adam_beta1: float = option(0.9, "Decay of the first moment.", within="[0, 1)")
    adam_beta2: float = option(0.999, "Decay of the second moment.", within="[0, 1)")
    adam_weight_decay: float = option(1e-4, "Weight decay.", within=NOT_NEGATIVE)
    adam_epsilon: float = option(1e-8, "Epsilon of Adam.", within=POSITIVE)
    max_grad_norm: float = option(1.0, "Norm to clip gradients to.", within=POSITIVE)
    use_ema: bool = option(False, "Keep, validate and save an exponential moving average of the trained weights.")
    ema_decay: float = option(0.999, "Decay of that average.", within="[0, 1)")

    def __post_init__(self) -> None:
        if self.use_8bit_adam:
            if self.optimizer not in ("adamw", "adamw8bit"):
                raise SerialLoraError(
                    f"--use_8bit_adam is an optimizer, and so is --optimizer {self.optimizer}: give one."
                )
            object.__setattr__(self, "optimizer", "adamw8bit")


@dataclass(frozen=True)
class ObjectiveOptions:
    """The loss."""

    objective: str = option("auto", "What is minimised: auto, dpo, or FILE.py:CLASS or MODULE:CLASS of your own.")
    objective_args: dict[str, str] | None = option(None, "Settings of the objective's class, NAME=VALUE.")
    snr_gamma: float | None = option(None, "Gamma of min-SNR weighting, for noise-prediction models.", within=POSITIVE)
    weighting_scheme: str = option("logit_normal", "How a flow's times are drawn, or weighted.", choices=SCHEMES)
    logit_mean: float = option(0.0, "Mean of the logit-normal distribution.", within="[-20, 20]")
    logit_std: float = option(1.0, "Standard deviation of the logit-normal distribution.", within="[0, 20]")
    mode_scale: float = option(1.29, "Scale of the mode distribution.", within="[-1, 1.75]")
    loss_type: str = option("l2", "How prediction and target are compared.", choices=tuple(COMPARISONS))
    huber_c: float = option(0.1, "Width c of huber and smooth_l1.", within=POSITIVE)
    noise_offset: float = option(0.0, "Part of the noise that is one number per channel.", within=NOT_NEGATIVE)
    min_timestep: float = option(0.0, "Train no timestep below this one, of 1000.", within="[0, 1000]")
    max_timestep: float = option(1000.0, "Train no timestep from this one on.", within="[0, 1000]")
    precondition_outputs: bool = option(
        False, "Compare clean latents instead of velocities, which weighs by sigma squared."
    )


@dataclass(frozen=True)
class ValidationOptions:
    """Validation images."""

    validation_loss_images: int = option(8, "Images in the fixed-noise validation loss.", within=COUNT, resume=FREE)
    num_validation_images: int = option(4, "Validation images per prompt.", within=NOT_NEGATIVE, resume=FREE)
    validation_inference_steps: int = option(25, "Sampling steps of the validation images.", within=COUNT, resume=FREE)
    validation_guidance_scale: float = option(4.0, "Guidance scale of the validation images.", within=ANY, resume=FREE)


@dataclass(frozen=True)
class RunOptions:
    """The run."""

    output_dir: str = option("outputs/adapter", "Where the adapter, checkpoints and logs go.", resume=FREE)
    seed: int = option(0, "Seed of everything that is drawn; -1 for any, which is printed.", within=SEEDS)
    validation_steps: int = option(
        100, "Validate every so many steps, and at step 0; 0 for never.", within=NOT_NEGATIVE, resume=FREE
    )
    checkpointing_steps: int = option(
        500, "Write a checkpoint every so many steps; 0 for none.", within=NOT_NEGATIVE, resume=FREE
    )
    checkpoints_total_limit: int | None = option(None, "Keep at most so many checkpoints.", within=COUNT, resume=FREE)
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint's folder.", resume=FREE)
    logging_dir: str = option("logs", "Folder of the tracker's files, inside output_dir.", resume=FREE)
    report_to: list[str] | None = option(None, "Trackers: tensorboard, wandb, trackio, ...", resume=FREE)
    tracker_project_name: str = option("slora", "Name of the trackers' project.", resume=FREE)
    run_name: str | None = option(None, "Name of the run in the trackers; their own by default.", resume=FREE)
    push_to_hub: bool = option(False, "Upload the result to the Hub.", resume=FREE)
    hub_model_id: str | None = option(None, "Name on the Hub; that of output_dir by default.", resume=FREE)
    hub_token: str | None = option(None, "Token for the Hub.", secret=True, resume=FREE)


@dataclass(frozen=True)
class BaseOptions(ModelOptions, AdapterOptions, OptimizerOptions, RunOptions):
    """What every recipe has, those for vision too."""


@dataclass(frozen=True)
class CommonOptions(PipelineOptions, BaseOptions, LatentOptions, ObjectiveOptions, ValidationOptions):
    """What every recipe of a diffusion transformer has."""


# What to use for flags of diffusers' DreamBooth script that have no namesake.
ELSEWHERE = {
    "--lora_layers": "--targets and --exclude choose attentions, --inputs what gets a pair there",
    "--lora_blocks": "--layers 12 13 chooses blocks",
    "--validation_epochs": "--validation_steps counts steps",
    "--upcast_before_saving": "adapters stay fp32, and are saved so",
    "--prior_generation_precision": "class images are drawn in the precision of the run",
    "--adam_weight_decay_text_encoder": "--adam_weight_decay holds for all",
    "--local_rank": "accelerate launch tells each process its rank",
    **dict.fromkeys(
        ("--prodigy_beta3", "--prodigy_decouple", "--prodigy_use_bias_correction", "--prodigy_safeguard_warmup"),
        "prodigy runs as that script sets it by default",
    ),
}


def parse(options: type[T], description: str | None, argv: Sequence[str] | None = None) -> T:
    """The options of a recipe from its command line and from the file that --config names; see `parsing.parse`."""
    given: Any = parsing.parse(options, description or "", argv, ELSEWHERE)
    if getattr(given, "seed", 0) == -1:
        seed = [secrets.randbelow(2**31)]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState()
            broadcast_object_list(seed)  # every process draws the same
        print(f"--seed {seed[0]} was drawn", flush=True)
        given = replace(given, seed=seed[0])
    return given
