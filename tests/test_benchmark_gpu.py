"""The GPU's benchmark runs without one: what can, at a toy size; what cannot is named; what is wrong fails."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu, gpu_checks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    options = ["--device", "cpu", "--small", "--rounds", "2", "--output", str(tmp_path_factory.mktemp("gpu"))]
    path = gpu.main(options)
    return path, json.loads(path.read_text())


def test_every_section_runs_or_says_why_not(results):
    path, measured = results
    assert path.name == "gpu_cpu_small.json" and measured["card"] == "cpu"
    sections = measured["sections"]
    assert set(sections) == set(gpu.SECTIONS)
    assert {name for name, s in sections.items() if "found" in s} == {"verbs", "compiled", "costs", "mixed", "offload"}
    for name in ("scaler", "quantized", "xformers"):
        assert sections[name]["skipped"] == "it needs a GPU"


def test_what_was_measured_is_there(results):
    sections = {name: s.get("found") for name, s in results[1]["sections"].items()}
    for case in gpu.CASES:
        assert set(sections["verbs"][case]) == {str(dtype) for dtype in gpu_checks.TOLERANCE}
        for errors in sections["verbs"][case].values():
            assert set(errors) == {"live", "set", "scale", "batch", "fuse", "load", "unload"}
        for what in ("forward", "train"):
            assert all(t["ms"]["median"] > 0 for t in sections["costs"][case][what].values())
    assert set(sections["mixed"]) == {"base", "mixed", "one by one"}
    assert sections["compiled"]["graphs"] > 0


def test_a_wrong_result_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "TOLERANCE", {torch.float32: 0.0})
    options = ["--device", "cpu", "--small", "--sections", "verbs", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="verbs: AssertionError: live"):
        gpu.main(options)
    assert "failed" in json.loads((tmp_path / "gpu_cpu_small.json").read_text())["sections"]["verbs"]


def test_no_section_begins_after_the_time(tmp_path):
    options = ["--device", "cpu", "--small", "--minutes", "0", "--output", str(tmp_path)]
    sections = json.loads(gpu.main(options).read_text())["sections"]
    assert all("skipped" in section for section in sections.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --small" in capsys.readouterr().err
