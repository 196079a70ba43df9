"""Every public function takes a model or a pipeline, and does the same to both."""

from __future__ import annotations

import copy

import pytest
import torch

import slora_diffusers as sl
from tests.adapters import add_random_adapter
from tests.tiny.pipelines import tiny_dit_pipeline, tiny_sd3_pipeline

CONFIG = sl.SerialLoraConfig(rank=2)


def pipeline():
    pipe = tiny_dit_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for i, name in enumerate("ab"):
        add_random_adapter(pipe.transformer, name, seed=i)
    return pipe


def images(pipe):
    call = {"class_labels": [0, 1], "num_inference_steps": 2, "output_type": "np"}
    return torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(0)).images)


PEFT = "base_model.model."
STATE = sl.serial_lora_state_dict(pipeline().transformer, "b")
VERBS = {
    "add": lambda target, folder: sl.add_serial_lora(target, CONFIG, "c"),
    "load": lambda target, folder: sl.load_serial_lora(target, STATE, "c"),
    "save": lambda target, folder: _lora(
        sl.save_serial_lora(target, folder, "a", weight_name="lora.safetensors").parent
    ).keys(),
    "set": lambda target, folder: sl.set_serial_lora(target, "b", 0.5),
    "delete": lambda target, folder: sl.delete_serial_lora(target, "b"),
    "unload": lambda target, folder: sl.unload_serial_lora(target),
    "fuse": lambda target, folder: sl.fuse_serial_lora(target),
    "unfuse": lambda target, folder: (sl.fuse_serial_lora(target), sl.unfuse_serial_lora(target))[1],
    "reserve": lambda target, folder: sl.reserve_serial_lora(target, (4, 2)),
    "status": lambda target, folder: sl.serial_lora_status(target),
    "parameters": lambda target, folder: [p.sum().item() for p in sl.serial_lora_parameters(target, "a")],
    "state dict": lambda target, folder: sl.serial_lora_state_dict(target, "a").metadata,
    "export": lambda target, folder: sl.export_lora(target, folder, format="peft").modules,
    "compress": lambda target, folder: (
        sl.export_lora(target, folder, "a", format="peft", weight_name="lora.safetensors"),
        len(
            sl.compress_lora(target, {k.replace("base_model.model.", ""): t for k, t in _lora(folder).items()}, 4).sites
        ),
    )[1],
    "merge": lambda target, folder: sl.merge_serial_lora(target, ["a", "b"], [0.5, 1.0], "c").pairs,
}


def _lora(folder):
    from safetensors.torch import load_file

    (path,) = folder.rglob("lora.safetensors")
    return load_file(path)


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_verb_does_to_a_pipeline_what_it_does_to_its_model(verb, tmp_path):
    of_model, of_pipe = pipeline(), pipeline()
    torch.manual_seed(0)
    one = VERBS[verb](of_model.transformer, tmp_path / "model")
    torch.manual_seed(0)
    other = VERBS[verb](of_pipe, tmp_path / "pipe")
    assert (other["transformer"] if isinstance(other, dict) and "transformer" in other else other) == one
    assert torch.equal(images(of_model), images(of_pipe))
    assert str(sl.serial_lora_status(of_model)) == str(sl.serial_lora_status(of_pipe))


@pytest.mark.parametrize("context", ["scale", "disable", "batch"])
def test_a_context_does_to_a_pipeline_what_it_does_to_its_model(context):
    pipe = pipeline()
    enter = {
        "scale": lambda target: sl.serial_lora_scale(target, 0.5),
        "disable": sl.disable_serial_lora,
        "batch": lambda target: sl.serial_lora_batch(target, ["a", "b"]),
    }[context]
    with enter(pipe):
        one = images(pipe)
    with enter(pipe.transformer):
        other = images(pipe)
    assert torch.equal(one, other)


@pytest.mark.parametrize("target", ["a string", 3, None, {"transformer": 1}])
@pytest.mark.parametrize("verb", list(VERBS))
def test_what_is_neither_is_told_so_in_a_sentence(verb, target, tmp_path):
    with pytest.raises(sl.SerialLoraError, match="Give a model or a pipeline; got"):
        VERBS[verb](target, tmp_path)


def test_adding_to_a_pipeline_adapts_its_transformer_and_nothing_else():
    pipe = tiny_sd3_pipeline()
    before = {n: list(m.state_dict()) for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    report = sl.add_serial_lora(pipe, CONFIG)
    assert list(report) == ["transformer"]
    for name, keys in before.items():
        assert (list(getattr(pipe, name).state_dict()) == keys) == (name != "transformer")


def test_one_model_under_two_names_is_changed_once():
    pipe = tiny_sd3_pipeline()
    pipe.text_encoder_2 = pipe.text_encoder
    pipe.register_modules(text_encoder_2=pipe.text_encoder)
    add_random_adapter(pipe.text_encoder)
    assert list(sl.serial_lora_status(pipe)) == ["text_encoder"]
    before = copy.deepcopy(pipe.text_encoder.state_dict())
    sl.fuse_serial_lora(pipe)
    sl.unfuse_serial_lora(pipe)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.text_encoder.state_dict().items())
