"""What the README shows is there: commands, pages, pictures, and numbers that the results carry; on PyPI, too.

Its Python is run by test_docs.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks import front, starts
from benchmarks.harness import read_results
from docs.build_tables import front_table
from setup import pypi_page
from slora_diffusers.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("slora ")])
def test_subcommands_exist(command):
    assert command.split()[1] in get_command(app).commands


def test_pictures_and_pages_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_table_says_what_was_measured():
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in front_table().splitlines()[2:]]
    rows = {name: values for name, *values in cells}
    step = read_results("step")["cases"]["SD3-medium"]["precisions"]["bf16 autocast"]["train"]
    (train,) = (values for name, values in rows.items() if name.startswith("train step"))
    for cell, name in ((train[0], "serial"), (train[2], "peft")):
        measured = [(step[name]["over_base"][q] - 1) * 100 for q in ("median", "q1", "q3")]
        assert [float(number) for number in re.findall(r"[+-][\d.]+", cell)[:3]] == pytest.approx(measured, abs=0.05)
    accuracy = next(values for name, values in rows.items() if name.startswith("accuracy"))
    summary = read_results(starts.DIGITS)["summary"]
    for cell, method in zip(accuracy, front.METHODS, strict=True):
        mean, low, high = (float(number) for number in re.findall(r"[\d.]+", cell)[:3])
        assert low < mean < high and mean == pytest.approx(summary[method]["mean"], abs=0.06)
    assert len(summary["serial-r8"]["test"]) == 20  # the seeds that the text beside it speaks of


def test_on_pypi_links_and_pictures_are_addresses_or_are_left_out():
    def relative(page):
        return [link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("https://")]

    without, at = pypi_page(README, None), pypi_page(README, "https://example.org/slora/")
    assert relative(README) and not relative(without) and not relative(at)
    assert "![" not in without and "](https://example.org/slora/raw/HEAD/docs/images/demo.png)" in at
    assert "](https://example.org/slora/blob/HEAD/docs/training.md)" in at
    assert "Training" in without and "https://arxiv.org/abs/2503.17750" in without and "<!--" not in without
