"""The model card's code runs as it stands, and an upload carries what belongs to the adapter and nothing else."""

from __future__ import annotations

import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

import slora_diffusers as sl
from slora_diffusers.files.hub import write_model_card
from tests.adapters import add_random_adapter
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_sd3_pipeline
from tests.tiny.vision import VISION


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)


def run(card, folder, monkeypatch):
    """Run all the code of a card, as a reader would: from top to bottom, somewhere."""
    monkeypatch.chdir(folder)
    names = {}
    for code in blocks(card):
        exec(compile(code, str(card), "exec"), names)
    return names


@pytest.fixture
def saved(tmp_path):
    def save(make, **config):
        make().save_pretrained(tmp_path / "base")
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
        add_random_adapter(pipe.transformer, **config)
        return pipe, pipe.save_serial_lora(tmp_path / "adapter")

    return save


@pytest.mark.parametrize("make", [tiny_sd3_pipeline, tiny_dit_pipeline])
def test_the_code_of_a_pipelines_card_runs(saved, make, tmp_path, monkeypatch):
    pipe, path = saved(make)
    card = write_model_card(path)
    assert len(blocks(card)) == 2
    names = run(card, tmp_path, monkeypatch)
    assert isinstance(names["image"], Image.Image)
    loaded = names["pipe"].serial_lora_status()["transformer"]
    assert loaded.parameters == pipe.serial_lora_status()["transformer"].parameters
    written = {p.name for p in (tmp_path / "lora").rglob("*.safetensors")}
    assert written == {"adapter_model.safetensors" if make is tiny_dit_pipeline else "pytorch_lora_weights.safetensors"}


def test_the_code_of_a_models_card_runs(tmp_path, monkeypatch):
    model = VISION["ViTForImageClassification"].build()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    add_random_adapter(model)
    card = write_model_card(sl.save_serial_lora(model, tmp_path / "adapter"))
    names = run(card, tmp_path, monkeypatch)
    pixels = torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        # The code's model carries the adapter, exported or not: its output is ours.
        torch.testing.assert_close(names["model"](pixels).logits, model.eval()(pixels).logits)
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_the_code_for_a_model_of_no_library_runs(tmp_path, monkeypatch):
    model = VISION["nn.TransformerEncoder"].build()
    add_random_adapter(model)
    card = write_model_card(sl.save_serial_lora(model, tmp_path / "adapter"), base_model="mine")
    names = run(card, tmp_path, monkeypatch)
    fresh = VISION["nn.TransformerEncoder"].build()
    names["adapt"](fresh)
    names["export"](fresh)
    assert sl.serial_lora_status(fresh).active == ["default"]
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_the_card_tells_base_tags_pictures_and_parameters(saved):
    pipe, path = saved(tiny_sd3_pipeline)
    Image.new("RGB", (8, 8)).save(path.parent / "cat.png")
    card = ModelCard.load(write_model_card(path, "me/style", base_model="org/base", prompt="a cat", tags=["cats"]))
    assert card.data.base_model == "org/base"
    assert card.data.tags == ["serial-lora", "lora", "cats"]
    assert card.data.library_name == "diffusers"
    assert card.data.widget == [{"text": "a cat", "output": {"url": "cat.png"}}]
    parameters = pipe.serial_lora_status()["transformer"].parameters
    assert f"rank 4, alpha 6, 5 pairs (encoder_hidden_states, hidden_states), {parameters:,} parameters" in card.text
    assert "pipe.load_serial_lora('me/style')" in card.text


def test_a_folder_is_not_given_as_a_hub_id(saved):
    _, path = saved(tiny_dit_pipeline)
    assert ModelCard.load(write_model_card(path)).data.base_model is None


def test_names_of_cached_downloads_become_their_ids(saved):
    pipe, path = saved(tiny_dit_pipeline)
    pipe.transformer.config["_name_or_path"] = "/home/me/models--org--the-base/snapshots/0123/transformer"
    pipe.transformer.register_to_config(_name_or_path="/home/me/models--org--the-base/snapshots/0123/transformer")
    pipe.save_serial_lora(path.parent)
    assert ModelCard.load(write_model_card(path)).data.base_model == "org/the-base"


def test_without_a_base_the_card_is_refused(tmp_path):
    model = VISION["ViTModel"].build()
    add_random_adapter(model)
    path = sl.save_serial_lora(model, tmp_path)
    with pytest.raises(sl.SerialLoraError, match="base_model="):
        write_model_card(path)
    assert not (tmp_path / "README.md").exists()


class TestPush:
    @pytest.fixture
    def uploads(self, monkeypatch):
        made = []
        monkeypatch.setattr(
            huggingface_hub, "create_repo", lambda name, **o: made.append(o) or SimpleNamespace(repo_id=f"me/{name}")
        )
        monkeypatch.setattr(
            huggingface_hub,
            "upload_folder",
            lambda **o: made.append(o) or SimpleNamespace(commit_url="https://x/commit"),
        )
        return made

    def test_a_pipeline_uploads_its_adapter_with_a_card(self, saved, uploads):
        pipe, path = saved(tiny_sd3_pipeline)
        (path.parent / "private.txt").write_text("mine")
        assert pipe.save_serial_lora(path.parent, push_to_hub="style", private=True, commit_message="first") == path
        created, uploaded = uploads
        assert created["private"] is True
        assert uploaded["repo_id"] == "me/style"
        assert uploaded["commit_message"] == "first"
        sent = {
            name.relative_to(path.parent).as_posix()
            for name in path.parent.rglob("*")
            if any(name.match(pattern) for pattern in uploaded["allow_patterns"])
        }
        assert sent == {"serial_lora_weights.safetensors", "README.md"}
        assert "me/style" in (path.parent / "README.md").read_text()

    def test_a_model_uploads_under_its_folders_name(self, tmp_path, uploads):
        model = VISION["ViTModel"].build()
        add_random_adapter(model)
        sl.save_serial_lora(model, tmp_path / "vit-style", push_to_hub=True, base_model="org/vit")
        assert uploads[1]["repo_id"] == "me/vit-style"

    def test_only_the_main_process_uploads(self, tmp_path, uploads):
        model = VISION["ViTModel"].build()
        add_random_adapter(model)
        sl.save_serial_lora(model, tmp_path, push_to_hub=True, is_main_process=False, base_model="org/vit")
        assert not uploads

    def test_options_without_an_upload_are_refused(self, tmp_path):
        model = VISION["ViTModel"].build()
        add_random_adapter(model)
        with pytest.raises(sl.SerialLoraError, match="private only mean something with push_to_hub"):
            sl.save_serial_lora(model, tmp_path / "x", private=True)
        assert not (tmp_path / "x").exists()
