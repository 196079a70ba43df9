"""save_pretrained leaves the pairs out, and says so where a trained adapter would be lost."""

from __future__ import annotations

import warnings

import pytest
import torch

import slora_diffusers as sl
from tests.adapters import add_random_adapter
from tests.tiny.models import TINY
from tests.tiny.pipelines import tiny_sd3_pipeline
from tests.tiny.vision import VISION

SAVERS = {
    "diffusers": TINY["DiTTransformer2DModel"].build,
    "transformers": VISION["Dinov2Model"].build,
}


def train(model, adapter="default"):
    for parameter in sl.serial_lora_parameters(model, adapter):
        parameter.data.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("library", list(SAVERS))
def test_saving_a_model_whose_trained_adapter_nothing_saved_warns_once_with_the_remedy(library, tmp_path):
    model = SAVERS[library]()
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2))
    train(model)
    with pytest.warns(UserWarning, match=r"'default' trained since.*save_serial_lora\(model, folder\)") as warned:
        model.save_pretrained(tmp_path / "one")
    assert len([w for w in warned if "save_serial_lora" in str(w.message)]) == 1
    sl.save_serial_lora(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "two")
    train(model)  # through .data, which no version counts
    with pytest.warns(UserWarning, match="'default' trained since"):
        model.save_pretrained(tmp_path / "three")


def test_saving_a_pipeline_warns_too_and_of_the_adapter_in_question(tmp_path):
    pipe = tiny_sd3_pipeline()
    add_random_adapter(pipe.transformer, "loaded")  # frozen, as a loaded one is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.save_pretrained(tmp_path / "one")
    sl.add_serial_lora(pipe, sl.SerialLoraConfig(rank=2), "mine")
    train(pipe, "mine")
    with pytest.warns(UserWarning, match=r"and 'mine' trained since"):
        pipe.save_pretrained(tmp_path / "two")


def test_fused_weights_are_saved_and_need_no_warning(tmp_path):
    model = SAVERS["diffusers"]()
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2))
    train(model)
    sl.fuse_serial_lora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
