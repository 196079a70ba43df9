"""Which recipes there are, and a commented config for each: both are read from the recipes themselves.

A recipe that trains is a module of this folder whose docstring shows how it is launched. `accelerate launch` in there
is the example that its config starts from, so that a new recipe has a name and a config without a further line.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import SerialLoraError
from ..training.parsing import make_parser, specs_of

FOLDER = Path(__file__).parent
ACCELERATE_CONFIGS = FOLDER / "accelerate_configs"
CONFIGS = FOLDER / "configs"
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|~)$)[A-Za-z_./][\w./-]*", re.IGNORECASE)
_LAUNCHED = "accelerate launch "


def training_recipes() -> dict[str, str]:
    """{name: what it does} of the recipes that train, without importing any."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if _LAUNCHED in text:
            found[path.stem.replace("_", "-")] = text.partition("\n")[0]
    return found


def load(name: str) -> ModuleType:
    """The module of a training recipe.

    Raises:
        SerialLoraError: If there is none of that name.
    """
    known = training_recipes()
    if name.replace("_", "-") not in known:
        raise SerialLoraError(f"There is no recipe {name!r}; choose one of {', '.join(known)} (slora train --list).")
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def ready_configs() -> dict[str, tuple[str, str]]:
    """{name: (the recipe that it is for, the model and what it learns)} of the configs in `configs/`."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        first, _, command, *_ = path.read_text(encoding="utf-8").splitlines()
        found[path.stem] = (command.split()[3], first.removeprefix("# ").rstrip("."))
    return found


def ready_config(name: str, recipe: str) -> Path | None:
    """The file of a ready config; None if there is none of that name.

    Raises:
        SerialLoraError: If it is for another recipe.
    """
    if name not in (known := ready_configs()):
        return None
    if (meant := known[name][0]) != recipe.replace("_", "-"):
        raise SerialLoraError(f"The config {name} is for another recipe: slora train {meant} --config {name}")
    return CONFIGS / f"{name}.yaml"


def example(name: str) -> str:
    """A YAML config of a recipe: what its docstring's example gives, then every other option with its default."""
    module = load(name)
    specs = specs_of(module.Options)
    text = module.__doc__ or ""
    words = _example_flags(text)
    given = vars(make_parser(module.Options, "").parse_args(words))
    named = [word.lstrip("-") for word in words if word.startswith("--")]
    lines = [f"# {text.partition(chr(10))[0]}", "#", f"#     slora train {name} --config {name}.yaml", ""]
    for option in named:
        lines += [f"# {specs[option][0].help}", f"{option}: {_yaml(given[option])}", ""]
    lines.append("# Every other option with its default: take the # away to change it.")
    for option, (spec, _, default) in specs.items():
        if option not in named and not spec.secret:
            lines.append(f"# {option}: {_yaml(default)}  # {' '.join(spec.help.split())}")
    return "\n".join(lines) + "\n"


def _example_flags(text: str) -> list[str]:
    """The flags of the command in a recipe's docstring, as words."""
    command = text[text.index(_LAUNCHED) :].partition("\n\n")[0]
    words = shlex.split(command.replace("\\\n", " "))
    return words[next(i for i, word in enumerate(words) if word.startswith("--")) :]


def _yaml(value: Any) -> str:
    """A value on one line, in the YAML that --config reads."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(k)}: {_yaml(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(value) if _PLAIN.fullmatch(str(value)) else json.dumps(str(value), ensure_ascii=False)
