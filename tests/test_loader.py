"""Every pipeline has the verbs: they give images, agree with the model's own functions, and leave stock folders."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from safetensors.torch import load_file

import slora_diffusers as sl
from slora_diffusers.files.storage import AdapterTensors
from slora_diffusers.loader import VERBS, install
from tests.adapters import add_random_adapter, traces
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline

TEXT = {"prompt": "a photo of a cat", "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
CALLS = {
    "dit": {"class_labels": [0, 1], "guidance_scale": 2.0, "num_inference_steps": 2},
    "sd3": {**TEXT, "max_sequence_length": 16},
    "pixart": {**TEXT, "use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False},
    "sigma": {**TEXT, "use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False},
}
BUILD = {
    "dit": tiny_dit_pipeline,
    "sd3": tiny_sd3_pipeline,
    "pixart": tiny_pixart_pipeline,
    "sigma": lambda: tiny_pixart_pipeline("sigma"),
}


def build(name):
    pipe = BUILD[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, name):
    out = pipe(**CALLS[name], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert out.shape[1:] == (32, 32, 3) and out.min() >= 0 and out.max() <= 1 and out.std() > 0
    return torch.from_numpy(out)


def visible(one, other):
    return (one - other).abs().mean() > 1e-3


def same(one, other):
    return torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("name", list(CALLS))
def test_the_verbs_of_a_pipeline_give_images(name, tmp_path):
    trainer = build(name)
    base = images(trainer, name)
    add_random_adapter(trainer.transformer, "style", std=0.5)
    styled = images(trainer, name)
    assert visible(styled, base)
    trainer.save_serial_lora(tmp_path)

    pipe = build(name)
    report = pipe.load_serial_lora(tmp_path, adapter_name="style")
    assert set(report) == {"transformer"} and report["transformer"].adapter_name == "style"
    assert same(images(pipe, name), styled)
    with pipe.serial_lora_scale(0.5):
        half = images(pipe, name)
    assert visible(half, base) and visible(half, styled)
    with pipe.disable_serial_lora():
        assert torch.equal(images(pipe, name), base)
    pipe.set_serial_lora("style", 0.5)
    assert same(images(pipe, name), half)
    pipe.fuse_serial_lora()
    assert same(images(pipe, name), half)
    assert pipe.serial_lora_status()["transformer"].fused == ["style"]
    pipe.unfuse_serial_lora()
    pipe.set_serial_lora([])
    assert torch.equal(images(pipe, name), base)
    pipe.delete_serial_lora("style")
    assert pipe.serial_lora_status() == {}
    pipe.load_serial_lora(tmp_path)
    pipe.unload_serial_lora()
    assert torch.equal(images(pipe, name), base)


def test_each_sample_of_a_pipelines_batch_has_its_own_adapter():
    pipe = build("dit")
    base = images(pipe, "dit")
    add_random_adapter(pipe.transformer, "style", std=0.5)
    styled = images(pipe, "dit")
    with pipe.serial_lora_batch([None, "style"]):
        mixed = images(pipe, "dit")
    assert same(mixed[:1], base[:1]) and same(mixed[1:], styled[1:])


@pytest.mark.parametrize("way", ["folder", "file", "state dict"])
def test_the_main_line_works_from_every_source(way, tmp_path):
    """`pipe = DiTPipeline.from_pretrained(base); pipe.load_serial_lora(path); pipe(...)`."""
    build("dit").save_pretrained(tmp_path / "base")
    trainer = build("dit")
    add_random_adapter(trainer.transformer, std=0.5)
    file = trainer.save_serial_lora(tmp_path / "adapter")
    source = {"folder": file.parent, "file": str(file), "state dict": sl.serial_lora_state_dict(trainer.transformer)}
    pipe = DiTPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_serial_lora(source[way])
    assert same(images(pipe, "dit"), images(trainer, "dit"))


def test_a_models_file_and_a_pipelines_file_are_the_same(tmp_path):
    pipe = build("sd3")
    add_random_adapter(pipe.transformer)
    one = sl.save_serial_lora(pipe.transformer, tmp_path / "model")
    other = pipe.save_serial_lora(tmp_path / "pipe")
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    fresh = build("sd3")
    sl.load_serial_lora(fresh.transformer, other)
    assert same(images(fresh, "sd3"), images(pipe, "sd3"))


def test_components_that_are_left_out_are_named():
    pipe = build("sd3")
    add_random_adapter(pipe.transformer, "style")
    add_random_adapter(pipe.text_encoder, "style")
    states = [sl.serial_lora_state_dict(pipe.transformer), sl.serial_lora_state_dict(pipe.text_encoder, None, "lost")]
    both = AdapterTensors({**states[0], **states[1]}, states[0].metadata)
    both.metadata["components"] |= states[1].metadata["components"]
    with pytest.raises(sl.AdapterFileError, match=r"components \['transformer', 'lost'\].*strict=False"):
        build("sd3").load_serial_lora(both)
    with pytest.warns(UserWarning, match=r"also for \['lost'\]"):
        assert set(build("sd3").load_serial_lora(both, strict=False)) == {"transformer"}
    with pytest.warns(UserWarning, match=r"also for \['lost'\]"):
        sl.load_serial_lora(build("sd3").transformer, both)


def test_the_scale_of_the_attention_kwargs_is_understood():
    pipe = build("sd3")
    add_random_adapter(pipe.transformer, std=0.5)
    with pipe.serial_lora_scale(0.5):
        wanted = images(pipe, "sd3")
    got = pipe(
        **CALLS["sd3"], generator=torch.Generator().manual_seed(0), output_type="np",
        joint_attention_kwargs={"scale": 0.5},
    ).images  # fmt: skip
    assert torch.equal(torch.from_numpy(got), wanted)


def test_pipelines_have_the_verbs_whichever_package_is_imported_first():
    """Each order in a process of its own, forked from one that has imported what all of them need."""
    orders = [
        "import slora_diffusers, diffusers",
        "import diffusers, slora_diffusers",
        "import slora_diffusers\nfrom diffusers import WanPipeline",
        "from diffusers import WanPipeline\nimport slora_diffusers",
        "from slora_diffusers import SerialLoraConfig\nimport diffusers",
    ]
    code = f"""
    import os, torch, transformers
    for order in {orders!r}:
        if not (child := os.fork()):
            exec(order)
            from diffusers import DiffusionPipeline
            os._exit(0 if DiffusionPipeline.load_serial_lora else 1)
        assert os.waitpid(child, 0)[1] == 0, order
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_install_is_idempotent_and_never_hides_an_attribute():
    before = {verb: inspect.getattr_static(DiffusionPipeline, verb) for verb in VERBS}
    install(DiffusionPipeline)
    assert {verb: inspect.getattr_static(DiffusionPipeline, verb) for verb in VERBS} == before

    class Own(DiffusionPipeline):
        def fuse_serial_lora(self):
            return "own"

        load_serial_lora = None

    class Foreign:
        def load_serial_lora(self):
            return "foreign"

    install(Own)
    install(Foreign)
    assert Own.fuse_serial_lora(None) == "own" and Own.load_serial_lora is None
    assert Foreign().load_serial_lora() == "foreign"
    assert Foreign.unload_serial_lora is before["unload_serial_lora"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.fuse_serial_lora(), "no Serial LoRA adapter"),
        (lambda pipe: pipe.unfuse_serial_lora(), "no Serial LoRA adapter"),
        (lambda pipe: pipe.set_serial_lora("a"), "no Serial LoRA adapter"),
        (lambda pipe: pipe.delete_serial_lora("a"), "no Serial LoRA adapter"),
        (lambda pipe: pipe.serial_lora_scale(0.5), "no Serial LoRA adapter"),
        (lambda pipe: pipe.save_serial_lora("nowhere"), "no Serial LoRA adapter"),
        (lambda pipe: pipe.load_serial_lora("/nowhere/at/all"), "neither a local file or folder"),
    ],
)
def test_a_verb_without_an_adapter_says_so(call, message):
    with pytest.raises(sl.SerialLoraError, match=message):
        call(build("dit"))


def test_bad_calls_change_no_component():
    pipe = build("sd3")
    add_random_adapter(pipe.transformer, "a")
    add_random_adapter(pipe.text_encoder, "b")
    before = traces(pipe.transformer), traces(pipe.text_encoder)
    state = sl.serial_lora_state_dict(pipe.transformer)
    for call, error in (
        (lambda: pipe.set_serial_lora(["a", "nobody"]), sl.AdapterStateError),
        (lambda: pipe.set_serial_lora({"a": 1}, [1, 2]), sl.AdapterStateError),
        (lambda: pipe.delete_serial_lora(["a", "nobody"]), sl.AdapterStateError),
        (lambda: pipe.fuse_serial_lora("nobody"), sl.AdapterStateError),
        (lambda: pipe.fuse_serial_lora(scale=float("nan")), sl.AdapterStateError),
        (lambda: pipe.load_serial_lora(state, adapter_name="a"), sl.AdapterStateError),
        (lambda: pipe.load_serial_lora(state, weight=None), sl.AdapterStateError),
        (lambda: pipe.load_serial_lora(state, weights=1), TypeError),
        (lambda: pipe.save_serial_lora("nowhere"), sl.AdapterStateError),  # a or b?
        (lambda: pipe.unfuse_serial_lora(), sl.AdapterStateError),
        (lambda: pipe.load_serial_lora(build_state("dit")), sl.AdapterFileError),
    ):
        with pytest.raises(error):
            call()
    assert (traces(pipe.transformer), traces(pipe.text_encoder)) == before
    assert not Path("nowhere").exists()


def build_state(name):
    pipe = build(name)
    add_random_adapter(pipe.transformer)
    return sl.serial_lora_state_dict(pipe.transformer)


def test_a_fuse_that_fails_in_one_component_leaves_all_live():
    pipe = build("sd3")
    add_random_adapter(pipe.transformer, "style")
    add_random_adapter(pipe.text_encoder, "style")
    with torch.no_grad():
        sl.serial_lora_parameters(pipe.text_encoder)[-1].fill_(float("nan"))
    before = copy.deepcopy(pipe.transformer.state_dict())
    with pytest.raises(sl.AdapterStateError, match="not finite"):
        pipe.fuse_serial_lora()
    assert [status.fused for status in pipe.serial_lora_status().values()] == [[], []]
    assert all(torch.equal(t, before[k]) for k, t in pipe.transformer.state_dict().items())


def test_only_components_with_an_active_adapter_are_fused():
    pipe = build("sd3")
    add_random_adapter(pipe.transformer, "a")
    add_random_adapter(pipe.text_encoder, "b")
    pipe.set_serial_lora("a")
    pipe.fuse_serial_lora()
    assert {n: s.fused for n, s in pipe.serial_lora_status().items()} == {"transformer": ["a"], "text_encoder": []}
    pipe.unfuse_serial_lora()
    pipe.set_serial_lora([])
    with pytest.raises(sl.AdapterStateError, match="nothing to fuse"):
        pipe.fuse_serial_lora()


ROOT = Path(__file__).parents[1]
STATES = {
    "loaded": lambda pipe: None,
    "two": lambda pipe: add_random_adapter(pipe.transformer, "second", seed=7),
    "fused": lambda pipe: pipe.fuse_serial_lora(),
    "fused-unloaded": lambda pipe: (pipe.fuse_serial_lora(), pipe.unload_serial_lora()),
    "fused-unfused": lambda pipe: (pipe.fuse_serial_lora(), pipe.unfuse_serial_lora()),
    "deleted": lambda pipe: pipe.delete_serial_lora("default"),
}
CASES = [("dit", state) for state in STATES] + [("sd3", "loaded"), ("sd3", "fused"), ("pixart", "loaded")]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What a process without slora_diffusers made of the saved folders, and (base images, images when saved) here."""
    tmp = tmp_path_factory.mktemp("stock")
    jobs, wanted = [], []
    for name, state in CASES:
        pipe = build(name)
        base = images(pipe, name)
        add_random_adapter(pipe.transformer, std=0.5)
        if name == "sd3":  # a component of transformers
            add_random_adapter(pipe.text_encoder, std=0.5)
        STATES[state](pipe)
        pipe.save_pretrained(tmp / f"{name}-{state}")
        jobs.append({"folder": str(tmp / f"{name}-{state}"), "call": CALLS[name]})
        wanted.append((base, images(pipe, name)))
    (tmp / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests" / "stock_reload.py"), str(tmp / "jobs.json"), str(tmp / "out.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(tmp / "out.pt", weights_only=True), wanted


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_saved_pipeline_reloads_in_stock_diffusers(elsewhere, case):
    """The base where adapters were live or gone, the fused weights where they were fused; and not a word about keys."""
    got, (base, when_saved) = (part[CASES.index(case)] for part in (elsewhere[0]["results"], elsewhere[1]))
    assert got["log"] == [] and got["pairs"] == []
    fused = case[1] in ("fused", "fused-unloaded")
    assert visible(when_saved, base) == (case[1] != "deleted")
    assert torch.equal(got["images"], when_saved if fused else base)


def test_import_adds_the_verbs_and_changes_nothing_else(elsewhere):
    assert elsewhere[0]["import"] == {"new": sorted(VERBS), "other": []}


def test_a_model_is_saved_as_stock_whatever_the_arguments(tmp_path):
    pipe = build("dit")
    stock = set(pipe.transformer.state_dict())
    add_random_adapter(pipe.transformer)
    live = set(pipe.transformer.state_dict())
    pipe.transformer.save_pretrained(tmp_path, variant="fp16")
    assert set(load_file(tmp_path / "diffusion_pytorch_model.fp16.safetensors")) == stock
    assert set(pipe.transformer.state_dict()) == live
    encoder = build("sd3").text_encoder
    stock = set(encoder.state_dict())
    add_random_adapter(encoder)
    encoder.save_pretrained(tmp_path / "own")
    encoder.save_pretrained(tmp_path / "given", state_dict=encoder.state_dict())  # as accelerate's recipes do
    for folder in ("own", "given"):
        saved = set(load_file(tmp_path / folder / "model.safetensors"))
        assert saved and not any("serial_lora" in key for key in saved) and saved <= stock
    sl.unload_serial_lora(encoder)
    assert "save_pretrained" not in vars(encoder)


def test_a_save_that_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = build("dit").transformer
    add_random_adapter(model)
    before = traces(model)
    monkeypatch.setattr(type(model), "save_config", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert traces(model) == before
    assert list(model.state_dict()) == before["keys"]
