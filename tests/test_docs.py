"""What the pages and the README show runs as it stands, on tiny models in folders of the names that they use.

vision.md, convert.md and architectures.md have tests of their own, beside what they describe.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline

import slora_diffusers as sl
from slora_diffusers.loader import VERBS
from slora_diffusers.recipes import catalog
from slora_diffusers.training.parsing import parse
from tests.adapters import add_random_adapter
from tests.test_vision_promptable import batch, sam
from tests.test_vision_prompts import tokenizer
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_sd3_pipeline
from tests.tiny.vision import SIZE, VISION

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = ("README", "index", "concepts", "choosing", "adapters", "api")
SD3 = ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3-medium-diffusers")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def page_of(name: str) -> Path:
    return ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder in which the ids of the pages are tiny models, and the adapters that they load are there."""
    monkeypatch.chdir(tmp_path)
    pipe: Any = tiny_sd3_pipeline()
    for name in SD3:
        pipe.save_pretrained(name)
    tiny_dit_pipeline().save_pretrained("facebook/DiT-XL-2-256")
    pipe = DiffusionPipeline.from_pretrained(SD3[0])
    for seed, name in enumerate(("my-adapter", "style", "subject")):
        add_random_adapter(pipe.transformer, name, seed)
        pipe.save_serial_lora(name, name)
    # The pictures' size belongs to the tiny models, not to the page.
    call = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, *a, **k: call(self, *a, **{"height": 32, "width": 32, **k})
    )
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_blocks_of_a_page_run_one_after_the_other(page, world, monkeypatch):
    code = blocks(page_of(page), "python")
    images, labels = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    names: dict[str, Any] = {"model": VISION["ViTForImageClassification"].build(), "batches": [(images, labels)]}
    if page == "api":
        pretend = {"facebook/dinov2-small": VISION["Dinov2Model"].build(), "facebook/sam-vit-base": sam()}
        pretend["openai/clip-vit-base-patch32"] = VISION["CLIPModel"].build()
        for name, model in pretend.items():
            model.save_pretrained(name)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
        inputs = batch()
        names |= {"pixel_values": inputs["pixel_values"], "labels": labels, "objects": inputs["masks"]}
        names["boxes"] = inputs["input_boxes"]
    assert code
    for number, block in enumerate(code):
        exec(compile(block, f"{page}.md, block {number + 1}", "exec"), names)


def test_every_python_block_is_run_somewhere():
    elsewhere = {"vision", "convert", "architectures", "coming-from-peft", "training", "format"}
    assert {path.stem for path in (ROOT / "README.md", *PAGES) if blocks(path, "python")} == {*RUN, *elsewhere}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `slora train`, recipe and script that a page or the README shows in full."""
    found = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for block in re.findall(
            r"^```(?:bash)?\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#.*", "", line).strip()
                if re.match(r"(accelerate launch.* train_scripts/|slora train \w)", line) and "..." not in line:
                    found.append((path.name, line))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_is_one_that_the_recipe_takes(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word == "train" or word.endswith(".py"))
    name = words[at + 1] if words[at] == "train" else Path(words[at]).stem.removeprefix("train_")
    flags = words[at + (2 if words[at] == "train" else 1) :]
    if "--example" in flags or "--help" in flags:
        return
    from slora_diffusers.cli.train import _use_ready_config, split

    recipe = catalog.load(name)
    own = split(flags)[1]
    if "--config" in own and _use_ready_config(own, name) is None:
        Path(own[own.index("--config") + 1]).write_text(catalog.example(name))
    assert parse(recipe.Options, "", own)


def anchors(path: Path) -> set[str]:
    """The places in a page that a link can name."""
    text = path.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*re.findall(r"^::: (\S+)$", text, re.MULTILINE)} | {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: slora_diffusers\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(sl.__all__)
    assert all(getattr(sl, name).__doc__ for name in listed)
    code = "\n".join(blocks(ROOT / "docs" / "api.md", "python"))
    assert [name for name in listed if not re.search(rf"\b{name}\b", code)] == []
    assert [verb for verb in VERBS if f"pipe.{verb}(" not in code or f"`pipe.{verb}(" not in page] == []
