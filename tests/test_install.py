"""What an installation needs: the core runs with four packages, and importing it costs little more than torch."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("accelerate", "datasets", "matplotlib", "peft", "rich", "torchmetrics", "transformers", "typer")
WITHOUT = f"import sys\nfor name in {EXTRAS!r}:\n    sys.modules[name] = None\n"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_core_needs_torch_diffusers_safetensors_and_huggingface_hub():
    """Every verb on a model, and the pipelines' verbs, where no other package can be imported."""
    done = run(
        WITHOUT
        + textwrap.dedent("""
        import tempfile, torch, slora_diffusers as sl
        from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

        torch.manual_seed(0)
        model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                                      num_layers=1, sample_size=4, patch_size=2, norm_num_groups=4).eval()
        x = dict(hidden_states=torch.randn(1, 4, 4, 4), timestep=torch.tensor([7]), class_labels=torch.tensor([0]))
        with torch.no_grad():
            sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2))
            for parameter in sl.serial_lora_parameters(model):
                parameter.normal_()
            live = model(**x).sample
            folder = tempfile.mkdtemp()
            sl.save_serial_lora(model, folder)
            sl.export_lora(model, folder + "/lora", format="peft")
            sl.fuse_serial_lora(model)
            assert torch.allclose(model(**x).sample, live, atol=1e-4)
            sl.unfuse_serial_lora(model)
            sl.unload_serial_lora(model)
            assert not torch.equal(model(**x).sample, live)
            pipe = DiTPipeline(model, AutoencoderKL(), DDIMScheduler())
            pipe.load_serial_lora(folder)
            assert torch.equal(model(**x).sample, live)
        print(sorted(name for name in sys.modules if name in ("numpy", "torch")))
        """)
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("module", ["slora_diffusers.heads.classification", "slora_diffusers.convert.plots"])
def test_what_needs_more_can_be_imported_without_it(module: str):
    done = run(WITHOUT + f"import {module}")
    assert done.returncode == 0, done.stderr[-2000:]


def test_command_without_its_extra_says_which():
    done = run(WITHOUT + "from slora_diffusers.cli import main\nmain()")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'slora_diffusers[cli]'")
    assert "Traceback" not in done.stderr


def test_importing_it_imports_no_pipeline_and_little_of_its_own():
    code = """
    import sys, time
    import torch
    before, started = set(sys.modules), time.process_time()
    import slora_diffusers
    slora_diffusers.load_serial_lora, slora_diffusers.SerialLoraLoaderMixin  # each name is imported with its first use
    seconds = time.process_time() - started
    new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
    print(*sorted(name for name in new if not name.startswith("_")), sep=",")
    print(seconds)
    """
    packages, seconds = run(code).stdout.split()
    assert set(packages.split(",")) == {"slora_diffusers", "safetensors", "regex"}
    assert float(seconds) < 1  # 0.1 here; diffusers' own import takes 1.2 after torch's


@pytest.mark.parametrize(
    "lines",
    [
        "import slora_diffusers; from diffusers import DiffusionPipeline as P",
        "from diffusers import DiffusionPipeline as P; import slora_diffusers",
        "import slora_diffusers, importlib; importlib.reload(slora_diffusers); from diffusers import DiTPipeline as P",
    ],
)
def test_pipelines_get_the_verbs_whichever_is_imported_first(lines: str):
    done = run(WITHOUT + f"{lines}\nprint(*map(callable, (P.load_serial_lora, P.export_lora)))")
    assert done.stdout.split() == ["True", "True"], done.stderr


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[ ;<>=!\[]", requirement)[0] for requirement in requirements}


def pins(file: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def test_every_floor_is_what_the_oldest_tests_run_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Tools, replicas whose tests are slow ones, and the page, whose tests have an environment of their own.
    newest_alone = ("lint", "docs", "ray", "app")
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name not in newest_alone}
    promised = {need for needs in (project["dependencies"], *extras.values()) for need in needs if ">=" in need}
    floors = dict(need.split(">=") for need in promised)
    assert len(floors) == len(promised) > 20
    oldest = pins("constraints-oldest.txt")
    assert {name: oldest.get(name) for name in floors} == floors


def test_declared_requirements_are_those():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert names(requirements["dependencies"]) == {"torch", "diffusers", "safetensors", "huggingface_hub", "regex"}
    assert {"typer", "rich", "matplotlib"} <= names(requirements["optional-dependencies"]["cli"])
