"""Command-line options: groups of flags that recipes put together, a YAML file with the same keys, and what was used.

Flags are called as in diffusers' own training scripts where they mean the same.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from diffusers.optimization import SchedulerType

from ..config import SerialLoraConfig
from ..errors import SerialLoraError
from .diffusion.objectives import DENSITIES, WEIGHTINGS
from .optim import OPTIMIZERS
from .precision import QUANTIZATIONS

Group = Sequence[tuple[str, dict[str, Any]]]
SCHEMES = (*DENSITIES, *WEIGHTINGS)
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)  # needs rules
KINDS = ("serial", "lora", "full")  # of adapters, for a model without a head of its own


def switch(help: str, default: bool = False) -> dict[str, Any]:
    """An option that is on or off."""
    return {"action": argparse.BooleanOptionalAction, "default": default, "help": help}


def value(kind: Any, default: Any, help: str, **more: Any) -> dict[str, Any]:
    """An option that takes a value; `aliases` are other names for it."""
    return {"type": kind, "default": default, "help": help, **more}


MODEL: Group = (
    ("pretrained_model_name_or_path", value(str, None, "Folder or Hub id of the pipeline to adapt.", required=True)),
    ("revision", value(str, None, "Revision on the Hub.")),
    ("variant", value(str, None, "Variant of the weight files, e.g. fp16.")),
    ("cache_dir", value(str, None, "Folder that files of the Hub are downloaded to.")),
    (
        "mixed_precision",
        value(str, None, "Precision of the forward pass; accelerate's by default.", choices=("no", "fp16", "bf16")),
    ),
    ("quantize", value(str, None, "Load the base weights quantized.", choices=QUANTIZATIONS)),
    ("gradient_checkpointing", switch("Recompute activations in the backward pass to save memory.")),
    ("allow_tf32", switch("Let matrix products round to TF32 on GPUs.")),
    ("compile", switch("Compile the transformer with torch.compile.")),
)
ADAPTER: Group = (
    ("adapter", value(str, "serial", "What to train: Serial LoRA, PEFT's LoRA or every weight.", choices=KINDS)),
    ("rank", value(int, 16, "Rank of the adapter.")),
    (
        "alpha",
        value(float, None, "Numerator of the scale alpha / rank; the rank itself by default.", aliases=("lora_alpha",)),
    ),
    ("dropout", value(float, 0.0, "Dropout on the adapter's input.", aliases=("lora_dropout",))),
    ("rslora", switch("Scale by alpha / sqrt(rank).")),
    ("inputs", value(str, None, "Attention inputs that get a pair; all by default.", nargs="+")),
    ("targets", value(str, None, "Regular expressions of the attentions to adapt.", nargs="+")),
    ("exclude", value(str, None, "Regular expressions of the attentions to leave out.", nargs="+")),
    ("layers", value(int, None, "Blocks to adapt, by index.", nargs="+")),
)
DATA: Group = (
    ("resolution", value(int, None, "Side of the training images in pixels; the model's own by default.")),
    ("aspect_ratio_buckets", value(str, None, "auto, or 'height,width;...': shapes other than the square.")),
    ("random_flip", switch("Mirror half of the images, anew each epoch.")),
    ("center_crop", switch("Cut images from the centre; without, at a random place, anew each epoch.", default=True)),
    ("cache_latents", switch("Encode the images once, before training.")),
    ("encodings_dir", value(str, None, "Folder of encoded images and texts; <output_dir>/cache by default.")),
    ("dataloader_num_workers", value(int, 0, "Processes that read images ahead.")),
)
OPTIMIZER: Group = (
    ("train_batch_size", value(int, 4, "Samples per step and process.")),
    ("gradient_accumulation_steps", value(int, 1, "Batches per optimizer step.")),
    ("max_train_steps", value(int, None, "Optimizer steps; 500 unless --num_train_epochs says otherwise.")),
    ("num_train_epochs", value(int, None, "Passes over the images, if --max_train_steps is not given.")),
    ("learning_rate", value(float, 1e-4, "Learning rate.")),
    ("scale_lr", switch("Multiply the learning rate by the samples of a step, over all processes.")),
    ("lora_plus_ratio", value(float, 1.0, "LoRA+: learning rate of B over that of A.")),
    ("lr_scheduler", value(str, "constant", "Schedule of the learning rate, as in diffusers.", choices=SCHEDULES)),
    ("lr_warmup_steps", value(int, 0, "Steps of warm-up.")),
    ("lr_num_cycles", value(int, 1, "Restarts of cosine_with_restarts.")),
    ("lr_power", value(float, 1.0, "Power of the polynomial schedule.")),
    ("optimizer", value(str.lower, "adamw", "Optimizer.", choices=OPTIMIZERS)),
    ("use_8bit_adam", switch("The same as --optimizer adamw8bit.")),
    ("adam_beta1", value(float, 0.9, "Decay of the first moment.")),
    ("adam_beta2", value(float, 0.999, "Decay of the second moment.")),
    ("adam_weight_decay", value(float, 1e-4, "Weight decay.")),
    ("adam_epsilon", value(float, 1e-8, "Epsilon of Adam.")),
    ("max_grad_norm", value(float, 1.0, "Norm to clip gradients to.")),
    ("use_ema", switch("Keep, validate and save an exponential moving average of the trained weights.")),
    ("ema_decay", value(float, 0.999, "Decay of that average.")),
)
OBJECTIVE: Group = (
    ("snr_gamma", value(float, None, "Gamma of min-SNR weighting, for noise-prediction models.")),
    ("weighting_scheme", value(str, "logit_normal", "How a flow's times are drawn, or weighted.", choices=SCHEMES)),
    ("logit_mean", value(float, 0.0, "Mean of the logit-normal distribution.")),
    ("logit_std", value(float, 1.0, "Standard deviation of the logit-normal distribution.")),
    ("mode_scale", value(float, 1.29, "Scale of the mode distribution.")),
    ("precondition_outputs", switch("Compare clean latents instead of velocities, which weighs by sigma squared.")),
)
RUN: Group = (
    ("output_dir", value(str, "outputs/adapter", "Where the adapter, checkpoints and logs go.")),
    ("seed", value(int, 0, "Seed of everything that is drawn.")),
    ("validation_steps", value(int, 100, "Validate every so many steps, and at step 0; 0 for never.")),
    ("validation_loss_images", value(int, 8, "Images in the fixed-noise validation loss.")),
    ("num_validation_images", value(int, 4, "Validation images per prompt.")),
    ("validation_inference_steps", value(int, 25, "Sampling steps of the validation images.")),
    ("validation_guidance_scale", value(float, 4.0, "Guidance scale of the validation images.")),
    ("checkpointing_steps", value(int, 500, "Write a checkpoint every so many steps; 0 for none.")),
    ("checkpoints_total_limit", value(int, None, "Keep at most so many checkpoints.")),
    ("resume_from_checkpoint", value(str, None, "'latest', or a checkpoint's folder.")),
    ("logging_dir", value(str, "logs", "Folder of the tracker's files, inside output_dir.")),
    ("report_to", value(str, None, "Tracker: tensorboard, wandb, trackio, ...")),
    ("push_to_hub", switch("Upload the result to the Hub.")),
    ("hub_model_id", value(str, None, "Name on the Hub; that of output_dir by default.")),
    ("hub_token", value(str, None, "Token for the Hub.")),
)
COMMON = (*MODEL, *ADAPTER, *DATA, *OPTIMIZER, *OBJECTIVE, *RUN)  # what every recipe of a diffusion transformer has
# What to use for flags of diffusers' DreamBooth script that have no namesake.
ELSEWHERE = {
    "--lora_layers": "--targets and --exclude choose attentions, --inputs what gets a pair there",
    "--lora_blocks": "--layers 12 13 chooses blocks",
    "--validation_epochs": "--validation_steps counts steps",
    "--repeats": "give more --num_train_epochs, or --max_train_steps",
    "--upcast_before_saving": "adapters stay fp32, and are saved so",
    "--prior_generation_precision": "class images are drawn in the precision of the run",
    "--adam_weight_decay_text_encoder": "--adam_weight_decay holds for all",
    "--local_rank": "accelerate launch tells each process its rank",
    **dict.fromkeys(
        ("--prodigy_beta3", "--prodigy_decouple", "--prodigy_use_bias_correction", "--prodigy_safeguard_warmup"),
        "prodigy runs as that script sets it by default",
    ),
}
_SWITCH = argparse.BooleanOptionalAction
_NOT_SAVED = frozenset({"config", "hub_token"})


def make_parser(description: str, *groups: Group) -> argparse.ArgumentParser:
    """A parser of the groups' flags, and of --config."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags given beside it win.")
    for name, settings in (option for group in groups for option in group):
        names = (name, *settings.get("aliases", ()))
        settings = {key: setting for key, setting in settings.items() if key != "aliases"}
        parser.add_argument(*(f"--{alias}" for alias in names), **settings)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the flags and from the file that --config names.

    Raises:
        SerialLoraError: If the file is missing or no mapping, or a key or a value of it is not allowed.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is not None:
        parser.set_defaults(**_read_config(parser, Path(path)))
    options, unknown = parser.parse_known_args(argv)
    for flag in (argument.partition("=")[0] for argument in unknown):
        if flag in ELSEWHERE:
            raise SerialLoraError(f"{flag} of diffusers' script is not here: {ELSEWHERE[flag]}.")
    switches = {flag for a in parser._actions if isinstance(a, _SWITCH) for flag in a.option_strings}
    for flag, stray in pairwise(sys.argv[1:] if argv is None else argv):
        if flag in switches and stray in unknown and not stray.startswith("-"):
            raise SerialLoraError(f"{flag} is a switch here: give it, or its --no- form, without {stray}.")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if getattr(options, "use_8bit_adam", False):
        if options.optimizer not in ("adamw", "adamw8bit"):
            raise SerialLoraError(
                f"--use_8bit_adam is an optimizer, and so is --optimizer {options.optimizer}: give one."
            )
        options.optimizer = "adamw8bit"
    return options


def save_options(options: argparse.Namespace, path: Path) -> None:
    """Write the options in the form that --config reads."""
    kept = {name: value for name, value in vars(options).items() if name not in _NOT_SAVED and value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(kept, sort_keys=True), encoding="utf-8")


def adapter_config(options: argparse.Namespace) -> SerialLoraConfig:
    """The adapter's config from the options."""
    names = ("rank", "alpha", "dropout", "rslora", "inputs", "targets", "exclude", "layers")
    return SerialLoraConfig(**{name: getattr(options, name) for name in names})


def objective_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that shape the loss, by the names that `objective_for` takes."""
    return {
        "snr_gamma": options.snr_gamma,
        "density": options.weighting_scheme if options.weighting_scheme in DENSITIES else "uniform",
        "weighting": options.weighting_scheme if options.weighting_scheme in WEIGHTINGS else "none",
        "logit_mean": options.logit_mean,
        "logit_std": options.logit_std,
        "mode_scale": options.mode_scale,
        "precondition": options.precondition_outputs,
    }


def _read_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SerialLoraError(f"--config {path}: there is no such file.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise SerialLoraError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SerialLoraError(f"--config {path} must hold 'option: value' lines; got {type(values).__name__}.")
    flags = {
        flag.removeprefix("--"): action
        for action in parser._actions
        for flag in action.option_strings
        if not flag.startswith("--no-")
    }
    actions = {flag: action for flag, action in flags.items() if action.dest not in ("help", "config")}
    values = {str(key).replace("-", "_").lstrip("_"): value for key, value in values.items()}
    for key in values:
        if key not in actions:
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(actions))}."
            raise SerialLoraError(f"--config {path}: unknown option {key!r}; {hint}")
    for key, value in values.items():
        actions[key].required &= value is None
    # Null stands for the option's default.
    given = {key: value for key, value in values.items() if value is not None}
    return {actions[key].dest: _checked(actions[key], value, path) for key, value in given.items()}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads 1e-4 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$"),
    list("-+0123456789."),
)


def _checked(action: argparse.Action, value: Any, path: Path) -> Any:
    """A file's value as the flag would give it."""
    if isinstance(action, _SWITCH):
        if isinstance(value, bool):
            return value
        raise SerialLoraError(f"--config {path}: {action.dest} must be true or false; got {value!r}.")
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML 1.1 reads as a truth value
    entries = value if isinstance(value, list) and action.nargs else [value]
    convert = action.type if callable(action.type) else str
    try:
        if any(isinstance(entry, bool | list | dict) for entry in entries):
            raise ValueError("not a single value")
        entries = [convert(str(entry)) for entry in entries]
    except ValueError as error:
        raise SerialLoraError(f"--config {path}: {action.dest} cannot be {value!r}: {error}.") from error
    for entry in entries:
        if action.choices is not None and entry not in action.choices:
            raise SerialLoraError(
                f"--config {path}: {action.dest} must be one of {', '.join(map(str, action.choices))}; got {entry!r}."
            )
    return entries if action.nargs else entries[0]
