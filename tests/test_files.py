"""Adapter files: what is written, what is read, where it is looked for, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slora_diffusers as sl
from slora_diffusers.files.format import AdapterFile
from slora_diffusers.files.storage import AdapterTensors, find_file
from tests.adapters import add_random_adapter, read_adapter
from tests.reference import FAMILIES, places, width
from tests.tiny.models import TINY

KEY = "transformer.transformer_blocks.0.attn1.serial_lora.hidden_states.lora_A.weight"
NAME = "serial_lora_weights.safetensors"


@pytest.fixture
def saved(tmp_path):
    model = TINY["DiTTransformer2DModel"].build()
    add_random_adapter(model, dropout=0.1)
    return sl.save_serial_lora(model, tmp_path / "adapter"), model


def rewrite_header(path, **changes):
    """Change fields of the file's `serial_lora` metadata; None removes one."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["serial_lora"])
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    save_file(load_file(path), path, metadata={"format": "pt", "serial_lora": json.dumps(metadata)})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_the_documented_one(name, tmp_path):
    """Read with safetensors alone: keys, shapes and header."""
    model = TINY[name].build()
    add_random_adapter(model, rank=3, alpha=5)
    path = sl.save_serial_lora(model, tmp_path)
    assert path == tmp_path / NAME
    expected = {}
    for key, (site, row) in places(model).items():
        d = width(site, row)
        expected |= {f"transformer.{key}.lora_A.weight": (3, d), f"transformer.{key}.lora_B.weight": (d, 3)}
    with safe_open(path, "pt") as file:
        header = file.metadata()
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == expected  # noqa: SIM118
    assert header["format"] == "pt"
    metadata = json.loads(header["serial_lora"])
    assert metadata["format_version"] == 1 and metadata["library_version"] == sl.__version__
    (component, entry), *others = metadata["components"].items()
    assert component == "transformer" and not others
    assert sl.SerialLoraConfig.from_dict(entry["config"]) == sl.SerialLoraConfig(rank=3, alpha=5)
    assert entry["base"]["class"] == name and len(entry["base"]["fingerprint"]) > 100


def test_a_file_is_read_back_as_it_was(saved):
    path, model = saved
    state = sl.serial_lora_state_dict(model)
    for source in (path, str(path), path.parent, str(path.parent)):
        read = read_adapter(source)
        assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)
        assert read.metadata == state.metadata
    assert AdapterFile.of(state).components["transformer"].config == model._serial_lora.configs["default"]
    assert AdapterFile.of(AdapterTensors(state)).components["transformer"].config is None


def test_a_subfolder_and_another_name_are_found(saved, tmp_path):
    path, _ = saved
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path.rename(tmp_path / "deep" / "er" / "style.safetensors")
    found = find_file(tmp_path / "deep", subfolder="er", weight_name="style.safetensors")
    assert found == tmp_path / "deep" / "er" / "style.safetensors"


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_the_dtype_to_store_is_the_one_asked_for(saved, tmp_path, dtype):
    _, model = saved
    path = sl.save_serial_lora(model, tmp_path, dtype=dtype)
    state = sl.serial_lora_state_dict(model)
    for key, tensor in load_file(path).items():
        assert tensor.dtype == (dtype or torch.float32)
        assert torch.equal(tensor, state[key].to(tensor.dtype))
    assert {p.dtype for p in sl.serial_lora_parameters(model)} == {torch.float32}


def test_only_the_main_process_writes(saved, tmp_path):
    _, model = saved
    path = sl.save_serial_lora(model, tmp_path / "other", is_main_process=False)
    assert path == tmp_path / "other" / NAME and not path.exists()


def test_a_write_that_fails_leaves_the_earlier_file_and_no_other(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                sl.save_serial_lora(model, path.parent)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [NAME]


def test_an_adapter_that_is_not_finite_is_not_written(saved):
    path, model = saved
    before = path.read_bytes()
    with torch.no_grad():
        sl.serial_lora_parameters(model)[-1][0, 0] = float("nan")
    with pytest.raises(sl.AdapterFileError, match=r"lora_B.*NaN"):
        sl.save_serial_lora(model, path.parent)
    assert path.read_bytes() == before
    with torch.no_grad():
        sl.serial_lora_parameters(model)[-1][0, 0] = 1e6
    with pytest.raises(sl.AdapterFileError, match=r"lora_B.*infinity"):
        sl.save_serial_lora(model, path.parent, dtype=torch.float16)  # overflows
    assert path.read_bytes() == before


def test_a_folder_is_asked_for_where_a_file_is_given(saved):
    path, model = saved
    with pytest.raises(sl.AdapterFileError, match="must be a folder"):
        sl.save_serial_lora(model, path)


def test_a_folder_without_the_file_lists_what_it_has(saved):
    path, _ = saved
    path.rename(path.with_name("other.safetensors"))
    with pytest.raises(sl.AdapterFileError, match=rf"no {NAME}.*other.safetensors.*weight_name"):
        read_adapter(path.parent)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:200],
        lambda data: data[:-8],
        lambda data: data + b"tail",
        lambda data: struct.pack("<Q", 2**60) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: pickle.dumps({KEY: Evil()}),
        lambda data: b"PK\x03\x04" + data,
        lambda data: b"<html>404</html>",
    ],
)
def test_a_damaged_file_or_a_pickle_is_refused_and_never_run(saved, damage, tmp_path, monkeypatch):
    path, _ = saved
    monkeypatch.chdir(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(sl.AdapterFileError, match=rf"{re.escape(str(path))} is not a readable safetensors file"):
        read_adapter(path)
    assert not (tmp_path / "pwned").exists()


def test_torch_files_are_refused(tmp_path):
    torch.save({KEY: torch.zeros(2, 16)}, tmp_path / "adapter.bin")
    with pytest.raises(sl.AdapterFileError, match="is a pickle"):
        read_adapter(tmp_path / "adapter.bin")


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, [1], True])
def test_an_unknown_format_version_is_refused(saved, version):
    path, model = saved
    rewrite_header(path, format_version=version)
    with pytest.raises(sl.AdapterFileError, match=rf"format version {re.escape(repr(version))}.*reads version 1"):
        read_adapter(path)
    state = sl.serial_lora_state_dict(model)
    state.metadata["format_version"] = version
    with pytest.raises(sl.AdapterFileError, match="format version"):
        read_adapter(state)


def test_unknown_header_fields_are_warned_of(saved):
    path, _ = saved
    rewrite_header(path, licence="none", hue=3)
    with pytest.warns(UserWarning, match=r"unknown here.*\['hue', 'licence'\]"):
        read_adapter(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "3", '{"components": []}', '{"components": {"transformer": []}}', '{"components": {"a": {"base": 1}}}'],
)
def test_a_header_that_is_not_ours_is_refused(saved, text):
    path, _ = saved
    save_file(load_file(path), path, metadata={"serial_lora": text})
    with pytest.raises(sl.AdapterFileError, match=r"damaged header|readable|format version None"):
        read_adapter(path)


def test_an_unknown_keyword_is_a_type_error_that_lists_the_known_ones(saved):
    path, _ = saved
    with pytest.raises(TypeError, match=r"'weights_name'.*revision.*weight_name"):
        read_adapter(path, weights_name="x")


HUB = {
    "subfolder": "styles",
    "revision": "v2",
    "token": "secret",
    "cache_dir": "/tmp/somewhere",
    "local_files_only": True,
    "force_download": True,
}


@pytest.mark.parametrize("arguments", [{}, HUB, {**HUB, "weight_name": "other.safetensors"}])
@pytest.mark.parametrize("of", ["model", "pipeline"])
def test_a_hub_id_is_downloaded_with_every_argument(saved, monkeypatch, arguments, of, tmp_path):
    from tests.tiny.pipelines import tiny_dit_pipeline

    path, _ = saved
    pipe = tiny_dit_pipeline()
    if of == "pipeline":
        add_random_adapter(pipe.transformer)
        path = pipe.save_serial_lora(tmp_path)
        pipe.unload_serial_lora()
    calls = []

    def download(repo_id, filename, **options):
        calls.append((repo_id, filename, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if of == "model":
        model = TINY["DiTTransformer2DModel"].build()
        report = sl.load_serial_lora(model, "someone/adapter", **arguments)
    else:
        report = pipe.load_serial_lora("someone/adapter", **arguments)["transformer"]
    assert report.pairs == 2
    options = {key: value for key, value in arguments.items() if key != "weight_name"}
    ((repo_id, filename, given),) = calls
    assert (repo_id, filename) == ("someone/adapter", arguments.get("weight_name", NAME))
    assert given.pop("library_name") == "slora_diffusers"
    assert given == options


@pytest.mark.parametrize("kind", ["offline", "no repository", "bad id"])
def test_a_hub_id_that_cannot_be_reached_says_what_was_tried(monkeypatch, kind, tmp_path):
    def missing(*args, **options):
        if kind == "offline":
            raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache")
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404 Client Error", response=response)

    source = "someone/adapter"
    if kind == "bad id":
        source = "a/b/c/d"
    else:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(sl.AdapterFileError, match=rf"'{source}' is neither a local file or folder, nor a Hub"):
        read_adapter(source, cache_dir=tmp_path)


def test_a_file_holds_tensors_that_were_views_of_others(tmp_path):
    whole = torch.randn(8, 16)
    AdapterFile.of(AdapterTensors({"t.a": whole[:2], "t.b": whole.T[:4]})).write(tmp_path)
    read = read_adapter(tmp_path)
    assert torch.equal(read["t.a"], whole[:2]) and torch.equal(read["t.b"], whole.T[:4])
