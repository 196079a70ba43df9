"""What the `slora` command says and refuses: help, options checked before anything is loaded, errors in one line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slora_diffusers as sl
from slora_diffusers.cli import app
from tests.test_cli import folder, slora  # noqa: F401 (a fixture)

# ruff: noqa: F811 (tests take the fixture by its name)

COMMANDS = ["demo", "inspect", "export", "compress", "merge", "fuse", "verify"]


class TestHelp:
    def test_lists_every_command(self):
        shown = slora("--help")
        assert all(command in shown for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_shows_examples(self, command):
        shown = slora(command, "--help")
        assert f"slora {command}" in shown.partition("Examples")[2]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_example_is_on_a_line_of_its_own(self, command):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout.partition("Examples")[2]
        lines = [line.strip() for line in shown.splitlines() if line.strip()]
        assert len(lines) >= 2
        assert all(line.startswith(f"slora {command} ") or line == f"slora {command}" for line in lines)

    @pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"]])
    def test_help_is_there_without_torch(self, arguments):
        code = (
            "import sys\nsys.argv[:] = ['slora', *sys.argv[1:]]\nfrom slora_diffusers.cli import app\n"
            "try:\n    app()\nexcept SystemExit:\n    pass\n"
            "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'heavy imports'\n"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "slora" in done.stdout

    def test_version(self):
        assert re.fullmatch(r"slora \d+\.\d+\.\d+.*\n", slora("--version"))

    def test_a_wrong_usage_is_exit_code_2(self):
        assert CliRunner().invoke(app, ["export"]).exit_code == 2
        assert CliRunner().invoke(app, ["nothing"]).exit_code == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "remedy"),
        [
            (("export", "{}/a", "-o", "{}/x", "--format", "onnx"), "diffusers, peft, kohya"),
            (("export", "{}/a", "-o", "{}/x", "--dtype", "int8"), "float32, float16, bfloat16"),
            (("export", "{}/vit", "-o", "{}/x"), "weight_name="),
            (("export", "{}/a", "--base", "{}/a", "-o", "{}/x"), "Give the base"),
            (("export", "{}/a", "{}/b", "-w", "1", "-o", "{}/x"), "2 adapters need as many --weight"),
            (("merge", "{}/a", "-o", "{}/x"), "at least two adapters"),
            (("merge", "{}/a", "{}/vit-a", "-o", "{}/x"), "--base"),
            (("compress", "{}/a", "--base", "{}/base", "-r", "4", "-o", "{}/x"), "is a Serial LoRA already"),
            (("inspect", "{}/vit", "--plot", "{}/x.png"), "--plot draws an adapter"),
            (("verify", "{}/vit-a", "--base", "{}/base"), "component 'model'"),
        ],
    )
    def test_are_one_line_with_the_remedy(self, folder, arguments, remedy):
        shown = slora(*(a.format(folder) for a in arguments), code=1)
        lines = [line for line in shown.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert remedy in lines[0]
        assert "Traceback" not in shown
        assert not (folder / "x").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            "export {}/a -o {}/x --format onnx",
            "export {}/a -o {}/x --dtype int8",
            "export {}/a -o {}/x --rank 0",
            "export {}/a -o {}/x --rank some",
            "export {}/a -o {}/x -w nan",
            "export {}/a -o {}/a/serial_lora_weights.safetensors/x",
            "compress {}/nothing -b {}/base -r 4 -o {}/x",
            "compress {}/vit-a -b {}/base -r 4 -o {}/x",
            "compress {}/a -b {}/base -r 0 -o {}/x",
            "compress {}/a -b {}/base -r 4 -o {}/x --plot {}/x.doc",
            "merge {}/a {}/b -o {}/x --rank -3 -b {}/base",
            "merge {}/a {}/b -o {}/x -w 1 -b {}/base",
            "fuse {}/a -b {}/base -o {}/vit",
            "fuse {}/a -b {}/base -o {}/x --dtype int8",
            "fuse {}/a -b {}/base -o {}/x --scale inf",
            "verify {}/a -b {}/base --tolerance nan",
            "verify {}/a -b {}/base --size 0",
            "inspect {}/base --plot {}/x.png",
            "inspect {}/vit --base {}/base",
            "inspect {}/a --base {}/base --plot {}/x.doc",
        ],
    )
    def test_options_are_checked_before_a_base_is_loaded(self, folder, arguments, monkeypatch):
        def load(*_, **__):
            raise AssertionError("a base was loaded")

        monkeypatch.setattr("slora_diffusers.cli.bases.load_base", load)
        shown = slora(*shlex.split(arguments.replace("{}", str(folder))), code=1)
        assert shown.startswith("error:")
        assert "AssertionError" not in shown
        assert not (folder / "x").exists()

    def test_an_interrupt_ends_quietly_with_130(self, folder, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("slora_diffusers.cli.bases.load_base", interrupted)
        result = CliRunner().invoke(app, ["export", str(folder / "a"), "-o", str(folder / "x")])
        assert result.exit_code == 130
        assert result.output == ""

    def test_progress_is_plain_lines_without_a_terminal(self, folder, tmp_path):
        result = CliRunner().invoke(app, ["export", str(folder / "a"), "-o", str(tmp_path)])
        lines = result.stderr.splitlines()
        assert lines[0] == f"Loading {folder / 'base'} ..."
        assert re.fullmatch(r"Multiplying with the base's weights: (\d+)/\1", lines[-1])
        assert "\x1b" not in result.stderr
        assert "\r" not in result.stderr

    def test_no_message_names_an_extra_that_does_not_exist(self):
        root = Path(__file__).parents[1]
        section = (root / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        extras = re.findall(r"^([\w-]+) = \[", section.partition("\n[")[0], re.MULTILINE)
        assert "train" in extras
        for path in [*root.glob("slora_diffusers/**/*.py"), *root.glob("*_scripts/**/*.py"), *root.glob("docs/*.md")]:
            for named in re.findall(r"slora_diffusers\[([\w,-]+)\]", path.read_text(encoding="utf-8")):
                assert set(named.split(",")) <= set(extras), path

    def test_debug_shows_where(self, folder):
        result = CliRunner().invoke(app, ["merge", str(folder / "a"), "-o", str(folder / "x"), "--debug"])
        assert isinstance(result.exception, sl.SerialLoraError)
