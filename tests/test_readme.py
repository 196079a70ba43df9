"""What the README shows is there: its code compiles and names what exists, its commands take the flags it gives."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from typer.main import get_command

from slora_diffusers.cli import app  # with it, every DiffusionPipeline gets the verbs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_compiles_and_uses_names_that_exist(code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and "serial_lora" in node.attr:
            assert hasattr(DiffusionPipeline, node.attr)


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py " in c])
def test_scripts_and_their_flags_exist(command):
    script = next(word for word in command.split() if word.endswith(".py"))
    folders = ("training", "training/diffusion", "recipes")
    sources = [ROOT / script, *(path for name in folders for path in (ROOT / "slora_diffusers" / name).glob("*.py"))]
    text = "\n".join(path.read_text() for path in sources)
    for flag in re.findall(r"--(\w+)", command):
        assert flag == "help" or re.search(rf"\b{flag}\b", text), flag


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("slora ")])
def test_subcommands_exist(command):
    assert command.split()[1] in get_command(app).commands


def test_pictures_and_pages_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
