"""What users mistake for something else ends in one sentence that says what it is and what to do."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.files.storage import WEIGHT_NAME
from tests.adapters import add_random_adapter
from tests.tiny.flows import (
    tiny_lumina2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sana_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny.pipelines import tiny_flux_pipeline, tiny_sd3_pipeline

ROOT = Path(__file__).parents[1]
PIPELINES = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "sana": tiny_sana_pipeline,
    "qwen": tiny_qwen_image_pipeline,
    "z-image": tiny_z_image_pipeline,
    "lumina2": tiny_lumina2_pipeline,
    "wan": tiny_wan_pipeline,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`serial/` and the LoRAs that it equals, `lora/`, `kohya/` and `peft/`."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "default", 0)
    pipe.save_serial_lora("serial")
    for name, format in (("lora", "diffusers"), ("kohya", "kohya"), ("peft", "peft")):
        pipe.export_lora(name, format=format)
    return tmp_path


@pytest.mark.parametrize("ending", ["bin", "ckpt", "pt", "pth"])
def test_pickle_is_said_to_be_one(ending, tmp_path):
    torch.save({"x.lora_A.weight": torch.ones(2, 2)}, path := tmp_path / f"lora.{ending}")
    pipe = tiny_sd3_pipeline()
    for verb in (pipe.load_serial_lora, lambda file: sl.compress_lora(pipe, file, rank=2)):
        with pytest.raises(sl.AdapterFileError, match=r"is a pickle.*can run code.*safetensors\.torch\.save_file"):
            verb(path)
    assert not pipe.serial_lora_status()


@pytest.mark.parametrize("name", PIPELINES)
def test_serial_lora_given_to_load_lora_weights_is_said_to_be_one(name, tmp_path):
    pipe = PIPELINES[name]()
    add_random_adapter(pipe.transformer, "default", 0)
    path = pipe.save_serial_lora(tmp_path)
    pipe.unload_serial_lora()
    for source in (tmp_path, path, load_file(path)):
        with pytest.raises(sl.AdapterFileError, match=r"is a Serial LoRA.*load_serial_lora\(\).*export_lora\(\)"):
            pipe.load_lora_weights(source, weight_name=None if isinstance(source, dict) else WEIGHT_NAME)
    with pytest.raises(sl.AdapterFileError, match="is a Serial LoRA"):
        pipe.transformer.load_lora_adapter(path, prefix=None)
    assert not getattr(pipe.transformer, "peft_config", {})


def test_ordinary_loras_still_load_with_load_lora_weights(folder):
    pipe = tiny_sd3_pipeline()
    pipe.load_lora_weights("lora")
    assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("name", ["lora", "kohya", "peft"])
def test_ordinary_lora_given_to_us_is_said_to_be_one(name, folder):
    pipe = tiny_sd3_pipeline()
    (file,) = Path(name).rglob("*.safetensors")
    for source in (name, file, load_file(file)):
        for model in (pipe, pipe.transformer):
            with pytest.raises(sl.AdapterFileError, match=r"is an ordinary LoRA.*load_lora_weights.*compress_lora\(\)"):
                sl.load_serial_lora(model, source)
    assert not any("serial_lora" in key for key in pipe.transformer.state_dict())


@pytest.mark.parametrize("keys", [("x.hada_w1_a", "x.hada_w1_b"), ("x.lokr_w1",), ("lora_unet_x.lora_down.weight",)])
def test_other_kinds_of_lora_are_said_to_be_loras(keys):
    with pytest.raises(sl.AdapterFileError, match="is an ordinary LoRA"):
        sl.load_serial_lora(tiny_sd3_pipeline(), {key: torch.zeros(2, 2) for key in keys})


@pytest.mark.parametrize(
    "path", ["./serail", "serail/serial_lora_weights.safetensors", "/nowhere/serial", "~/dog", "a/b/c"]
)
def test_path_that_cannot_be_a_hub_id_never_reaches_the_hub(path, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(
        sl.AdapterFileError, match="neither a local file or folder, nor a Hub id: check the path"
    ) as said:
        tiny_sd3_pipeline().load_serial_lora(path)
    assert ("there is 'serial'" in str(said.value)) == ("serail" in path)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            LocalEntryNotFoundError("An error happened"),
            r"check the path \(there is 'serial'\), or, for a Hub id, the conn",
        ),
        (OSError("no space"), r"check the path \(there is 'serial'\)"),
        ("gated", "ask for access on its page"),
        ("entry", "has no serial_lora_weights.safetensors: name its file with weight_name"),
    ],
)
def test_what_could_be_a_hub_id_says_what_the_hub_made_of_it(error, remedy, folder, monkeypatch):
    response: Any = SimpleNamespace(headers={}, status_code=403, request=None)
    made = {"gated": GatedRepoError, "entry": RemoteEntryNotFoundError}
    error = made[error]("The Hub's own words", response=response) if isinstance(error, str) else error

    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(sl.AdapterFileError, match=remedy) as said:
        tiny_sd3_pipeline().load_serial_lora("serail")
    assert str(error) not in str(said.value)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16", "int8", torch.int8, torch.complex64, 16])
def test_dtype_that_is_none_of_floats_is_refused_before_anything_is_written(dtype, tmp_path):
    pipe = tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "default", 0)
    for verb in (
        lambda: pipe.save_serial_lora(tmp_path / "x", dtype=dtype),
        lambda: pipe.export_lora(tmp_path / "x", dtype=dtype),
        lambda: pipe.reserve_serial_lora((8, 2), dtype=dtype),
    ):
        with pytest.raises(sl.SerialLoraError, match=r"dtype must be .*: write torch\.bfloat16"):
            verb()
    assert not (tmp_path / "x").exists()
    assert sl.serial_lora_status(pipe.transformer).capacity is None


def test_push_to_hub_without_the_hub_keeps_the_file_and_says_how_to_upload_it(tmp_path, monkeypatch):
    def nothing(*_, **__):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "create_repo", nothing)
    pipe = tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "default", 0)
    with pytest.raises(sl.SerialLoraError, match=rf"is saved, but not uploaded.*hf upload you/dog {tmp_path}"):
        pipe.save_serial_lora(tmp_path, push_to_hub="you/dog")
    assert tiny_sd3_pipeline().load_serial_lora(tmp_path)["transformer"].pairs


def test_every_extra_that_a_remedy_or_a_page_names_is_one():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    files = [
        *(ROOT / "slora_diffusers").rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "Makefile",
    ]
    named = [
        (file.name, extra)
        for file in files
        for found in re.findall(r"(?:slora_diffusers|-e '\.)\[([\w,]+)\]", file.read_text(encoding="utf-8"))
        for extra in found.split(",")
    ]
    assert len(named) > 10
    assert [(file, extra) for file, extra in named if extra not in extras] == []
