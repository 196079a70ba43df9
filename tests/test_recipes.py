"""`slora train` and its siblings: the recipes from the installed package, through accelerate's own launcher."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from slora_diffusers.cli import app
from slora_diffusers.cli.train import OWN, split
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes.catalog import (
    ACCELERATE_CONFIGS,
    CONFIGS,
    FOLDER,
    example,
    load,
    ready_configs,
    training_recipes,
)
from slora_diffusers.training.parsing import parse, specs_of
from tests.test_training_distributed import ENVIRONMENT, ROOT, WEIGHTS, base, flags, log, wait_until  # noqa: F401

NAMES = list(training_recipes())
CPU = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def slora(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_every_training_script_is_a_recipe_and_is_listed():
    scripts = {path.stem.removeprefix("train_").replace("_", "-") for path in (ROOT / "train_scripts").glob("train_*")}
    assert set(NAMES) == scripts
    listed = slora("train", "--list")
    assert all(name in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_a_config_that_the_recipe_takes(name, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(slora("train", name, "--example"))
    assert path.read_text() == example(name)
    kind = load(name).Options
    given = yaml.safe_load(path.read_text())
    options = dataclasses.asdict(parse(kind, "", ["--config", str(path)]))
    defaults = {key: default for key, (_, _, default) in specs_of(kind).items()}
    for key, value in options.items():
        wanted = given.get(key, defaults[key])
        assert value == wanted or str(value) == str(wanted), key
    assert {"pretrained_model_name_or_path", "output_dir"} & set(given)


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_an_example_says_the_default_in_a_form_that_can_be_read(name, tmp_path):
    """Taking away every # changes nothing."""
    text = example(name)
    head, _, rest = text.partition("take the # away to change it.\n")
    path, all_of_it = tmp_path / "example.yaml", tmp_path / "all.yaml"
    path.write_text(text)
    all_of_it.write_text(head + "\n" + "".join(line.removeprefix("# ") + "\n" for line in rest.splitlines()))
    kind = load(name).Options
    assert parse(kind, "", ["--config", str(all_of_it)]) == parse(kind, "", ["--config", str(path)])
    secret = {key for key, (spec, _, _) in specs_of(kind).items() if spec.secret}
    assert set(yaml.safe_load(all_of_it.read_text())) == set(specs_of(kind)) - secret


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name, (recipe, _) in ready_configs().items()])
def test_ready_config_is_one_that_its_recipe_takes(name, recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = slora("train", recipe, "--config", name, "--example")
    assert text == (CONFIGS / f"{name}.yaml").read_text()
    given = yaml.safe_load(text)
    options = parse(load(recipe).Options, "", ["--config", str(CONFIGS / f"{name}.yaml")])
    for key, value in given.items():
        taken = getattr(options, key)
        assert taken in (value, [value]) or float(taken) == float(value), key
    assert {"pretrained_model_name_or_path", "output_dir", "rank", "learning_rate", "max_train_steps"} <= set(given)
    flags = shlex.split(re.findall(r"^# +slora train \S+ (.*)$", text, re.MULTILINE)[0])
    assert flags[:2] == ["--config", name]
    assert parse(load(recipe).Options, "", ["--config", str(CONFIGS / f"{name}.yaml"), *flags[2:]])
    assert name in slora("train", "--list")


@pytest.mark.parametrize("config", [["--config", "flux-dev"], ["--config=flux-dev"]])
def test_ready_config_reaches_the_recipe_unless_a_file_has_its_name(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    launched = []
    monkeypatch.setattr("slora_diffusers.cli.train.launch", lambda words: launched.append(words) or 0)
    slora("train", "dreambooth-flux", *config, "--rank", "4")
    assert str(CONFIGS / "flux-dev.yaml") in " ".join(launched[0]) and launched[0][-2:] == ["--rank", "4"]
    Path("flux-dev").write_text("rank: 3")
    slora("train", "dreambooth-flux", *config)
    assert str(CONFIGS) not in " ".join(launched[1])
    Path("flux-dev").unlink()
    assert "slora train dreambooth-flux --config flux-dev" in slora("train", "dit", *config, code=1)


def test_flags_of_both_belong_to_the_recipe():
    """No flag of a recipe is taken away by the launcher, whatever flags are added on either side."""
    launcher = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    ours = {
        f"--{flag}"
        for name in NAMES
        for key, (s, _, _) in specs_of(load(name).Options).items()
        for flag in (key, *s.aliases)
    }
    assert launcher & ours == set(OWN) - {"--help"}


def test_launchers_flags_are_told_from_the_recipes():
    words = ["--config", "dog.yaml", "--num_processes", "2", "--rank=8", "--cpu", "--main_process_port=0", "--use_fsdp"]
    launcher, own = split(
        [*words, "--mixed_precision", "bf16", "--config_file", "ddp.yaml", "--instance_prompt", "a dog"]
    )
    assert own == ["--config", "dog.yaml", "--rank=8", "--mixed_precision", "bf16", "--instance_prompt", "a dog"]
    assert launcher == [
        *("--num_processes", "2", "--cpu", "--main_process_port", "0", "--use_fsdp"),
        *("--config_file", str(ACCELERATE_CONFIGS / "ddp.yaml")),
    ]
    assert split(["--config_file", "mine.yaml"])[0] == ["--config_file", "mine.yaml"]


def test_unknown_recipe_says_which_there_are():
    for words in (["train", "sd5"], ["train", "sd5", "--example"], ["train", "sd5", "--help"], ["train", "catalog"]):
        message = slora(*words, code=1)
        assert "no recipe" in message and "dreambooth-sd3" in message
    with pytest.raises(SerialLoraError, match="--list"):
        load("../train")


@pytest.mark.parametrize("command", ["generate", "classify", "segment"])
def test_help_of_a_handed_on_command_is_its_scripts(command):
    assert f"usage: slora {command}" in slora(command, "--help")


def test_recipes_that_are_listed_are_in_the_folder_that_is_packaged():
    assert {path.stem.replace("_", "-") for path in FOLDER.glob("*.py")} >= set(NAMES)
    assert {path.name for path in ACCELERATE_CONFIGS.glob("*.yaml")} >= {"ddp.yaml", "fsdp2.yaml"}


def train(*arguments, **more):
    command = [sys.executable, "-m", "slora_diffusers.cli", "train", "dit", *CPU, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_is_the_last_line_and_no_launchers_traceback_follows(base, tmp_path, processes):  # noqa: F811
    process = train("--num_processes", processes, *flags(base, tmp_path / "out", 3, train_batch_size=0))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors and "CalledProcessError" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: ") and "train_batch_size" in errors


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_trains_through_the_launcher(base, tmp_path, processes):  # noqa: F811
    process = train("--num_processes", processes, *flags(base, tmp_path / "out", 4 // processes, validation_steps=0))
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    assert (tmp_path / "out" / WEIGHTS).is_file() and max(log(tmp_path / "out", "loss")) == 4


@pytest.mark.slow
def test_control_c_saves_what_there_is(base, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    endless = flags(base, out, 3, max_train_steps=100000, checkpointing_steps=0, validation_steps=0)
    process = train("--num_processes", 1, *endless, start_new_session=True)
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(log(out, "loss")) > 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    assert (out / WEIGHTS).is_file() and list(out.glob("checkpoint-*"))
