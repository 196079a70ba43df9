"""The `slora` command on real folders: what it writes, says, and returns."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

import slora_diffusers as sl
from slora_diffusers.cli import app
from slora_diffusers.cli.verify import VerifyReport
from tests.adapters import add_random_adapter, read_adapter
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_sd3_pipeline
from tests.tiny.vision import VISION


def slora(*arguments, code=0):
    """Run the command; returns standard output, or what went to standard error if it failed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stderr if code == 1 else result.stdout


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", height=32, width=32, num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, a pipeline; `a` and `b`, adapters of its transformer and first text encoder; `vit` and `vit-a`."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_sd3_pipeline().save_pretrained(folder / "base")
    pipe = DiffusionPipeline.from_pretrained(folder / "base")
    for name, seed in (("a", 1), ("b", 2)):
        add_random_adapter(pipe.transformer, name, seed)
        add_random_adapter(pipe.text_encoder, name, seed + 5)
        pipe.save_serial_lora(folder / name, name)
    VISION["ViTForImageClassification"].build().save_pretrained(folder / "vit")
    vit = type(VISION["ViTForImageClassification"].build()).from_pretrained(folder / "vit")
    add_random_adapter(vit)
    sl.save_serial_lora(vit, folder / "vit-a")
    return folder


def pipeline(folder, **adapters):
    pipe = DiffusionPipeline.from_pretrained(folder / "base")
    for name, weight in adapters.items():
        pipe.load_serial_lora(folder / name, name, weight)
    return pipe


class TestInspect:
    def test_an_adapter_in_json(self, folder, tmp_path):
        found = json.loads(slora("inspect", folder / "a", "--plot", tmp_path / "s.png", "--json"))
        part = found["components"]["transformer"]
        state = read_adapter(folder / "a")
        assert found["kind"] == "adapter"
        assert found["bytes"] == (folder / "a" / "serial_lora_weights.safetensors").stat().st_size
        assert part["ranks"] == [4]
        assert part["sites"] == 3
        assert part["pairs"] == {"encoder_hidden_states": 2, "hidden_states": 3}
        assert part["parameters"] == sum(t.numel() for k, t in state.items() if k.startswith("transformer."))
        assert not part["lora_exact"]
        key = "transformer.transformer_blocks.1.attn.serial_lora.hidden_states.lora_{}.weight"
        norm = torch.linalg.norm(1.5 * state[key.format("B")] @ state[key.format("A")]).item()  # alpha 6 at rank 4
        assert part["norms"]["1"]["hidden_states"] == pytest.approx(norm, rel=1e-5)
        with Image.open(tmp_path / "s.png") as picture:
            assert picture.size[0] > 600

    def test_the_base_makes_the_lora_equivalent_exact(self, folder):
        part = json.loads(slora("inspect", folder / "a", "--base", folder / "base", "--json"))["components"][
            "transformer"
        ]
        d, r = 32, 4
        linears = 3 * 3 + 2 * 3 + 3 + 1  # q, k, v of three inputs and of two texts; outputs, one of them the text's
        assert part["lora_exact"]
        assert part["lora_parameters"] == linears * 2 * d * r

    def test_tables_for_people(self, folder):
        shown = slora("inspect", folder / "a" / "serial_lora_weights.safetensors")
        assert "rank" in shown
        assert "text_encoder" in shown

    def test_an_ordinary_lora_says_what_it_is_and_what_turns_it_into_ours(self, folder, tmp_path):
        slora("export", folder / "a", "--base", folder / "base", "-o", tmp_path, "-f", "kohya")
        shown = slora("inspect", tmp_path)
        for part in ("an ordinary LoRA", "slora compress", "kohya's sd-scripts", "SD3Transformer2DModel", "LoRA"):
            assert part in re.sub(r"\s+", " ", shown.replace("│", ""))
        found = json.loads(slora("inspect", tmp_path / "pytorch_lora_weights.safetensors", "--json"))
        assert found["kind"] == "lora"
        assert found["families"][0] == "SD3Transformer2DModel"
        assert found["ranks"] == [4]
        assert found["carried"] is None

    def test_with_a_base_it_says_what_would_be_carried(self, folder, tmp_path):
        slora("export", folder / "a", "--base", folder / "base", "-o", tmp_path)
        path = tmp_path / "pytorch_lora_weights.safetensors"
        more = {f"transformer.proj_out.lora_{x}.weight": torch.ones((2, 32) if x == "A" else (16, 2)) for x in "AB"}
        more |= {f"text_encoder_9.x.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        more |= {f"transformer.nowhere.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        save_file(load_file(path) | more, tmp_path / "more.safetensors")
        carried = json.loads(slora("inspect", tmp_path / "more.safetensors", "--base", folder / "base", "--json"))[
            "carried"
        ]
        assert carried["pairs"]["transformer"] == {"hidden_states": 3, "encoder_hidden_states": 2}
        assert carried["not_carried"] == ["transformer.proj_out"]
        assert carried["elsewhere"] == ["text_encoder_9.x"]
        assert carried["unknown"] == ["transformer.nowhere"]
        shown = slora("inspect", tmp_path / "more.safetensors", "--base", folder / "base")
        assert "compressed on this base" in shown

    def test_a_pipeline_and_a_model(self, folder):
        found = json.loads(slora("inspect", folder / "base", "--json"))
        assert set(found["components"]) == {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}
        assert json.loads(slora("inspect", folder / "vit", "--json"))["components"]["model"]["sites"] == 2


class TestConversions:
    def test_export_writes_a_lora_that_the_stock_pipeline_draws_alike(self, folder, tmp_path):
        report = json.loads(slora("export", folder / "a", "--base", folder / "base", "-o", tmp_path, "--json"))
        assert report["files"] == [str(tmp_path / "pytorch_lora_weights.safetensors")]
        stock = pipeline(folder)
        stock.load_lora_weights(tmp_path)
        torch.testing.assert_close(image(stock), image(pipeline(folder, a=1.0)), atol=1e-5, rtol=0)

    def test_export_of_two_weighted_adapters_to_a_rank(self, folder, tmp_path):
        arguments = ("export", folder / "a", folder / "b", "-w", 0.5, "-w", 2, "--json")
        exact = json.loads(slora(*arguments, "-o", tmp_path / "exact"))  # the files name their base
        cut = json.loads(slora(*arguments, "-o", tmp_path / "cut", "--rank", 3))
        assert exact["ranks"] == [8]
        assert exact["relative_error"] == 0
        assert cut["ranks"] == [3]
        assert 0 < cut["relative_error"] < 1

    @pytest.mark.parametrize("command", ["export", "export peft", "compress", "merge"])
    def test_nothing_is_overwritten_without_force(self, folder, tmp_path, command):
        slora("export", folder / "a", "-o", tmp_path / "lora")
        name, *more = command.split()
        arguments = {
            "export": ("export", folder / "a", *(("-f", *more) if more else ())),
            "compress": ("compress", tmp_path / "lora", "-b", folder / "base", "-r", 4),
            "merge": ("merge", folder / "a", folder / "b"),
        }[name]
        output = tmp_path / "out"
        slora(*arguments, "-o", output)
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        path = next(iter(before))
        path.write_bytes(b"theirs")
        shown = slora(*arguments, "-o", output, code=1)
        assert "would be overwritten" in shown
        assert "--force" in shown
        assert path.read_bytes() == b"theirs"
        slora(*arguments, "-o", output, "--force")
        assert path.read_bytes() != b"theirs"

    def test_export_to_the_least_rank_that_is_as_good(self, folder, tmp_path):
        report = json.loads(slora("export", folder / "a", folder / "a", "-o", tmp_path, "--rank", "auto", "--json"))
        assert max(report["ranks"]) == 4
        assert report["relative_error"] < 1e-6
        assert report["load"] == [f'pipe.load_lora_weights("{tmp_path}")']

    def test_compress_gives_the_exported_adapter_back(self, folder, tmp_path):
        slora("export", folder / "a", "--base", folder / "base", "-o", tmp_path / "lora", "-f", "kohya")
        report = json.loads(
            slora(
                *("compress", tmp_path / "lora", "--base", folder / "base", "-r", 4, "-o", tmp_path / "back"),
                *("--keep-rest", "--plot", tmp_path / "e.png", "--json"),
            )
        )
        assert report["relative_error"] < 1e-5
        assert report["not_carried"] == []
        back = pipeline(folder)
        back.load_serial_lora(report["adapter"])
        torch.testing.assert_close(image(back), image(pipeline(folder, a=1.0)), atol=1e-5, rtol=0)
        assert (tmp_path / "e.png").stat().st_size > 5000

    @pytest.mark.parametrize("with_base", [False, True])
    def test_merge_adds_with_weights(self, folder, tmp_path, with_base):
        base = ("--base", folder / "base") if with_base else ()
        report = json.loads(
            slora("merge", folder / "a", folder / "b", "-w", 0.5, "-w", -1, "-o", tmp_path, *base, "--json")
        )
        assert report["ranks"] == [8]
        merged = pipeline(folder)
        merged.load_serial_lora(report["file"])
        torch.testing.assert_close(image(merged), image(pipeline(folder, a=0.5, b=-1.0)), atol=1e-5, rtol=0)

    def test_fuse_writes_a_checkpoint_that_needs_no_adapter(self, folder, tmp_path):
        slora("fuse", folder / "a", folder / "b", "-w", 1, "-w", 0.5, "--scale", 0.5, "-o", tmp_path / "fused")
        fused = DiffusionPipeline.from_pretrained(tmp_path / "fused")
        assert not any("serial_lora" in name for name in fused.transformer.state_dict())
        torch.testing.assert_close(image(fused), image(pipeline(folder, a=0.5, b=0.25)), atol=1e-5, rtol=0)

    def test_fuse_does_not_write_into_another_checkpoint(self, folder):
        before = sorted(path.name for path in (folder / "vit").iterdir())
        assert "is not empty" in slora("fuse", folder / "a", "-o", folder / "vit", code=1)
        assert sorted(path.name for path in (folder / "vit").iterdir()) == before


class TestVerify:
    def test_a_pipeline_passes(self, folder):
        report = json.loads(slora("verify", folder / "a", "--base", folder / "base", "--size", 32, "--json"))
        assert report["passed"]
        assert set(report["outputs"]) == {"fused", "unfused", "exported"}
        assert report["effect"] > 0.01
        assert report["base_restored"] is True

    def test_a_vision_transformer_passes(self, folder):
        report = json.loads(slora("verify", folder / "vit-a", "--json"))
        assert report["passed"]
        assert set(report["outputs"]) == {"fused", "unfused", "exported"}

    def test_a_class_conditional_pipeline_passes(self, tmp_path):
        tiny_dit_pipeline().save_pretrained(tmp_path / "dit")
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "dit")
        add_random_adapter(pipe.transformer)
        pipe.save_serial_lora(tmp_path / "a")
        assert "passed" in slora("verify", tmp_path / "a", "--base", tmp_path / "dit")

    def test_a_bare_transformer_is_checked_pair_by_pair_and_says_so(self, folder, tmp_path):
        pipe = pipeline(folder)
        add_random_adapter(pipe.transformer)
        sl.save_serial_lora(pipe.transformer, tmp_path)
        report = json.loads(slora("verify", tmp_path, "--base", folder / "base" / "transformer", "--json"))
        assert report["passed"]
        assert report["outputs"] == {}
        assert "no inputs of its own" in report["skipped"][0]

    def test_a_difference_is_exit_code_3(self, folder):
        arguments = ("verify", folder / "vit-a", "--tolerance", 0, "--json")
        assert json.loads(slora(*arguments, code=3))["passed"] is False

    @pytest.mark.parametrize("wrong", ["pairs", "outputs", "base_restored"])
    def test_every_kind_of_difference_fails(self, wrong):
        fields = {"pairs": {"fused": 0.0}, "outputs": {"fused": 0.0}, "base_restored": True}
        rest = {"effect": 1.0, "tolerance": 1e-5, "skipped": ()}
        assert VerifyReport(**fields, **rest).passed
        fields[wrong] = False if wrong == "base_restored" else {"fused": 1e-3}
        assert not VerifyReport(**fields, **rest).passed


def examples(page):
    """The commands of a page's code blocks."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    return [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


class TestDocs:
    @pytest.mark.parametrize("line", examples("cli.md"))
    def test_every_command_of_the_page_is_one_that_the_program_takes(self, line):
        program, name, *arguments = shlex.split(line)
        assert program == "slora"
        command = get_command(app).commands[name]  # pyright: ignore
        context = command.make_context(name, arguments)
        assert context.params or context.args  # those that are handed on have tests in test_recipes.py

    def test_the_code_of_the_conversion_page_runs(self, folder, tmp_path, monkeypatch):
        text = (Path(__file__).parents[1] / "docs" / "convert.md").read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        assert code.count("stabilityai/stable-diffusion-3.5-medium") == 2
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folder / "a", tmp_path / "my-adapter")
        names: dict = {}
        exec(code.replace("stabilityai/stable-diffusion-3.5-medium", str(folder / "base")), names)
        assert names["report"].relative_error < 1e-5
        assert names["base"].serial_lora_status()["transformer"].active == ["both"]
        torch.testing.assert_close(image(names["base"]), image(names["pipe"]), atol=1e-4, rtol=0)  # 0.7 a + 0.3 a


def test_demo_runs_the_demo(monkeypatch, tmp_path):
    from slora_diffusers.demo.run import run_demo

    calls = []
    monkeypatch.setattr(
        "slora_diffusers.demo.run.run_demo", lambda folder, **o: calls.append((folder, o)) or {"rows": []}
    )
    assert json.loads(slora("demo", "-o", tmp_path, "--style", "script", "--seed", 3, "--json")) == {"rows": []}
    assert calls[0][0] == tmp_path
    assert (calls[0][1]["style"], calls[0][1]["seed"]) == ("script", 3)
    # The real one takes exactly these.
    assert set(calls[0][1]) <= set(inspect.signature(run_demo).parameters)
