"""Heads leave the library: as plain models of transformers, exported, traced, as ONNX and in int8; live and fused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from slora_diffusers import SerialLoraConfig, SerialLoraError, add_serial_lora, serial_lora_status
from slora_diffusers.heads.prompts import SerialLoraForPromptClassification
from tests.test_vision import classifier, pixels, segmenter, shaken
from tests.test_vision_promptable import batch, make
from tests.test_vision_prompts import tokenizer
from tests.tiny.vision import SIZE, VISION

HEADS = {
    "dinov2": lambda: classifier("Dinov2Model", pooling="both"),
    "vit": lambda: classifier("ViTModel", pooling="mean"),
    "siglip": lambda: classifier("SiglipVisionModel", pooling="mean"),
    "timm": lambda: classifier("timm/vit"),
    "linear masks": segmenter,
    "convolutional masks": lambda: segmenter(head="convolutional", width=8),
    "UPerNet's masks": lambda: segmenter(head="upernet", width=8),
}
STATES = {"live": lambda model: model, "fused": lambda model: model.fuse()}
SLOW = ("vit", "timm", "linear masks")
CASES = [
    pytest.param(head, state, marks=pytest.mark.slow if head in SLOW else ()) for head in HEADS for state in STATES
]


def deployed(head: str, state: str) -> tuple[Any, Tensor, Tensor]:
    model = STATES[state](shaken(HEADS[head]())).requires_grad_(False)
    return model, pixels(), model(pixels()).logits


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head", "state"), CASES)
def test_exported_program_gives_the_logits_at_any_batch_size(head: str, state: str):
    model, x, expected = deployed(head, state)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    close(exported.module()(x).logits, expected)
    more = pixels(count=5)
    close(exported.module()(more).logits, model(more).logits)


@pytest.mark.parametrize(("head", "state"), CASES)
def test_traced_module_gives_the_logits(head: str, state: str):
    model, x, expected = deployed(head, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's: tracing fixes the image's size, and is old
        traced: Any = torch.jit.trace(model, (x,), strict=False)
    close(traced(x)["logits"], expected)
    more = pixels(count=3)
    close(traced(more)["logits"], model(more).logits)


@pytest.mark.parametrize(
    ("head", "state"),
    [("dinov2", "live"), ("dinov2", "fused"), ("convolutional masks", "live"), ("UPerNet's masks", "live")],
)
def test_onnx_gives_the_logits(head: str, state: str, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, expected = deployed(head, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), tmp_path / "model.onnx", dynamo=True, input_names=["pixel_values"], verbose=False
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits, *_) = session.run(None, {"pixel_values": x.numpy()})
    close(torch.from_numpy(logits), expected)


@pytest.mark.parametrize(("head", "state"), CASES)
def test_dynamic_int8_is_near_the_logits(head: str, state: str):
    model, x, expected = deployed(head, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's: torchao is to follow
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in small.modules())
    logits = small(x).logits
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.2 * expected.norm()


PLAIN = {
    ("Dinov2Model", "both"): "Dinov2ForImageClassification",
    ("ViTModel", "cls"): "ViTForImageClassification",
}


@pytest.mark.parametrize(("name", "pooling"), PLAIN)
def test_a_classifier_becomes_transformers_own_and_opens_as_a_pipeline(name: str, pooling: str, tmp_path):
    model = shaken(classifier(name, pooling=pooling, label_names=["ant", "bee", "cat", "dog"]))
    before = model(pixels()).logits
    plain = model.to_transformers(tmp_path)
    assert type(plain).__name__ == PLAIN[name, pooling]
    assert not any("serial_lora" in key for key in plain.state_dict())
    close(plain(pixels()).logits, before)
    assert torch.equal(model(pixels()).logits, before)
    assert serial_lora_status(model).active == ["default"]
    opened = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    close(opened(pixels()).logits, before)
    image = Image.effect_noise((37, 23), 80).convert("RGB")
    answer = transformers.pipeline("image-classification", str(tmp_path), top_k=4)(image)
    expected = model(model.preprocessing(image)[None]).logits.softmax(1)[0]
    got = {entry["label"]: entry["score"] for entry in answer}
    assert got == pytest.approx(dict(zip(model.label_names, expected.tolist(), strict=True)), abs=2e-2)


OTHERWISE = (("ViTModel", "mean"), ("Dinov2Model", "cls"), ("SiglipVisionModel", "mean"), ("timm/vit", "cls"))


@pytest.mark.parametrize(("name", "pooling"), OTHERWISE)
def test_where_transformers_class_reads_other_features_that_is_an_error(name: str, pooling: str):
    with pytest.raises(SerialLoraError, match=r"torch\.export"):
        shaken(classifier(name, pooling=pooling)).to_transformers()


def test_segmentation_heads_say_how_they_are_deployed():
    with pytest.raises(SerialLoraError, match=r"no class.*semantic segmentation.*torch\.export"):
        shaken(segmenter()).to_transformers()


def test_sam_and_clip_become_what_they_are(tmp_path):
    sam = shaken(make())
    given = {key: value for key, value in batch().items() if key != "masks"}
    plain = sam.to_transformers(tmp_path)
    close(
        type(plain).from_pretrained(tmp_path).eval()(**given, multimask_output=False).pred_masks,
        sam(**given).pred_masks,
    )
    base = VISION["CLIPModel"].build()
    clip = SerialLoraForPromptClassification.from_clip(
        base, ["cat", "dog"], SerialLoraConfig(rank=2), tokenizer=tokenizer, preprocessing=classifier().preprocessing
    )
    logits = shaken(clip)(pixels()).logits
    close(clip.to_transformers()(pixel_values=pixels(), **clip.head()).logits_per_image, logits)


def test_a_plain_classifier_with_a_live_adapter_serves_in_a_pipeline():
    model = VISION["ViTForImageClassification"].build()
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    run = transformers.pipeline("image-classification", model=model, image_processor=processor)
    image = Image.effect_noise((SIZE, SIZE), 80).convert("RGB")
    base = run(image)
    add_serial_lora(model, SerialLoraConfig(rank=2))
    shaken(model)
    assert run(image) != base
