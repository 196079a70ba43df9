"""`slora train`, `generate`, `classify` and `segment`: the recipes, for those who have no clone."""

from __future__ import annotations

import importlib
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import SerialLoraError
from .console import ERR, OUT

RAW = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
OWN = ("--help", "--mixed_precision", "--gradient_accumulation_steps")
"""Flags that accelerate's launcher and the recipes both have: the recipe takes them, as it does in a config."""


def train(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="One of those that --list shows.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the recipes.")] = False,
) -> None:
    """Train with a recipe: RECIPE --config FILE, or its flags. RECIPE --example prints a commented config.

    --list also shows the ready configs, one for each model: they go where a FILE does, and flags beside them win.

    Flags of `accelerate launch` (--num_processes 2, --config_file ddp.yaml, ...) are passed on to it; what
    `accelerate config` has written holds, too. RECIPE --help shows every option.
    """
    from ..recipes import catalog

    if listed or name is None:
        table = Table("recipe", "", box=None)
        for recipe, summary in catalog.training_recipes().items():
            table.add_row(recipe, summary)
        OUT.print(table)
        ready = Table("\n--config", "\nof the recipe", "\n", box=None)
        for config, (recipe, summary) in catalog.ready_configs().items():
            ready.add_row(config, recipe, summary)
        OUT.print(ready)
        return
    launcher, own = split(context.args)
    config = _use_ready_config(own, name)
    if "--example" in own:
        sys.stdout.write(config.read_text(encoding="utf-8") if config else catalog.example(name))
        return
    if "--help" in own:
        sys.argv[0] = f"slora train {name}"
        catalog.load(name).main(["--help"])
    if name.replace("_", "-") not in catalog.training_recipes():
        catalog.load(name)  # says which there are
    raise typer.Exit(launch([*launcher, "--module", "slora_diffusers.recipes", name, *own]))


def generate(context: typer.Context) -> None:
    """Draw images of prompts (or of classes, with --labels) with a base and any number of adapters."""
    of_classes = any(word.partition("=")[0] == "--labels" for word in context.args)
    _run("generate_dit" if of_classes else "generate_text_to_image", "generate", context.args)


def classify(context: typer.Context) -> None:
    """Classify images with a model that `slora train vit-classification` or `clip` has saved."""
    _run("classify_images", "classify", context.args)


def segment(context: typer.Context) -> None:
    """Mark images with a model that `slora train vit-segmentation` has saved."""
    _run("segment_images", "segment", context.args)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what accelerate's launcher takes, what the recipe takes) of a command line."""
    from accelerate.commands.launch import launch_command_parser

    from ..recipes.catalog import ACCELERATE_CONFIGS

    takes = {flag: action for action in launch_command_parser()._actions for flag in action.option_strings}
    launcher, own, words = [], [], list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in OWN or flag not in takes:
            own.append(word)
        elif takes[flag].nargs == 0:
            launcher.append(word)
        else:
            value = value if equals else (words.pop(0) if words else "")
            ours = ACCELERATE_CONFIGS / value
            launcher += [flag, str(ours) if flag.endswith("config_file") and ours.is_file() else value]
    return launcher, own


def _use_ready_config(own: list[str], recipe: str) -> Path | None:
    """The ready config that --config names, where no file is called so; its path then stands in its place."""
    from ..recipes.catalog import ready_config

    for i, word in enumerate(own):
        flag, equals, value = word.partition("=")
        at = i if equals else i + 1
        if flag == "--config" and at < len(own):
            value = value if equals else own[at]
            if not Path(value).exists() and (path := ready_config(value, recipe)) is not None:
                own[at] = f"--config={path}" if equals else str(path)
                return path
    return None


def launch(arguments: Sequence[str]) -> int:
    """Run accelerate's launcher; the exit code of the run.

    What fails has said so itself, in one line: the launcher's own traceback would only push that line away.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Control-C reaches the run, too: it saves what it has, and is waited for.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except subprocess.CalledProcessError as error:
        return _ended(error.returncode)
    except ChildFailedError as error:
        return _ended(next(iter(error.failures.values())).exitcode)
    except ValueError as error:  # of the launcher's own checks
        raise SerialLoraError(f"accelerate launch: {error}") from error
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def _ended(code: int) -> int:
    if code < 0:
        name = signal.Signals(-code).name
        ERR.print(f"[bold red]error:[/] the run was ended by {name}" + (" (out of memory?)" if code == -9 else ""))
        return 128 - code
    return code


def _run(module: str, command: str, arguments: Sequence[str]) -> None:
    sys.argv[0] = f"slora {command}"
    importlib.import_module(f"slora_diffusers.recipes.{module}").main(list(arguments))


_WITHOUT_HELP = {**RAW, "help_option_names": []}  # the script behind it shows its own flags
COMMANDS: dict[Any, tuple[str, dict[str, Any]]] = {
    train: (
        """slora train --list
        slora train dreambooth-sd3 --example > dog.yaml
        slora train dreambooth-sd3 --config dog.yaml
        slora train dreambooth-sd3 --config dog.yaml --num_processes 2 --rank 8
        slora train dreambooth-flux --config flux-dev --instance_data_dir dog""",
        RAW,
    ),
    generate: ("slora generate --help", _WITHOUT_HELP),
    classify: ("slora classify --help", _WITHOUT_HELP),
    segment: ("slora segment --help", _WITHOUT_HELP),
}
"""The commands that hand their flags on: their examples, and how their words are read."""
