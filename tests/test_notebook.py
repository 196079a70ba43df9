"""The notebook runs from top to bottom on the built-in base, and learns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs_whose_code_compiles():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in CELLS}) == len(CELLS) > 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
    for number, code in enumerate(CODE):
        compile(code, f"cell {number}", "exec")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **shorter: str) -> dict[str, Any]:
    """The names that the cells leave, run in this folder, with some of their text replaced."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for number, code in enumerate(CODE):
        for text, instead in shorter.items():
            code = code.replace(SHORT[text], instead)
        exec(compile(code, f"cell {number}", "exec"), names)
    assert names["difference"] <= 2
    assert Path("notebook-adapter/serial_lora_weights.safetensors").is_file() and any(
        Path("notebook-lora").rglob("*.json")
    )
    return names


SHORT = {"training": "STEPS, SEED = 60, 0", "drawing": "steps=20", "copies": "SEEN_LETTERS, 32"}


def test_it_runs_from_top_to_bottom_with_fewer_steps(tmp_path, monkeypatch):
    assert all(any(text in code for code in CODE) for text in SHORT.values())
    short = {"training": "STEPS, SEED = 2, 0", "drawing": "steps=2", "copies": "SEEN_LETTERS, 1"}
    assert len(run(tmp_path, monkeypatch, **short)["losses"]) == 2


@pytest.mark.slow
def test_the_loss_falls(tmp_path, monkeypatch, capsys):
    assert len(run(tmp_path, monkeypatch)["losses"]) == 60
    first, last = map(float, re.findall(r"ten steps ([\d.]+), of the last ten ([\d.]+)", capsys.readouterr().out)[0])
    assert last < 0.97 * first
