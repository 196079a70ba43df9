"""Heads over vision backbones: what they read, compute, save, refuse and become when fused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput, SemanticSegmenterOutput

from slora_diffusers import SerialLoraConfig, SerialLoraError, load_serial_lora
from slora_diffusers.errors import AdapterFileError, ArchitectureError
from slora_diffusers.heads.classification import SerialLoraForImageClassification, pool
from slora_diffusers.heads.pixel_heads import ConvolutionalHead, UPerNet
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation
from tests.tiny.text import TEXT
from tests.tiny.vision import SIZE, VISION

CONFIG = SerialLoraConfig(rank=3)
PREPARE = Preprocessing((SIZE, SIZE))


def classifier(name: str = "Dinov2Model", **arguments) -> Any:
    backbone = VISION[name].build()
    return SerialLoraForImageClassification.from_backbone(backbone, 4, CONFIG, preprocessing=PREPARE, **arguments)


def segmenter(name: str = "Dinov2Model", **arguments) -> Any:
    backbone = VISION[name].build()
    return SerialLoraForSemanticSegmentation.from_backbone(backbone, 3, CONFIG, preprocessing=PREPARE, **arguments)


def shaken(model: nn.Module) -> Any:
    """Every trainable weight drawn anew: an adapter and a head that do something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def pixels(count: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("pooling", "width"), [("cls", 16), ("mean", 16), ("both", 32)])
def test_logits_are_linear_in_the_pooled_features(pooling: str, width: int):
    model = shaken(classifier(pooling=pooling))
    hidden = model.backbone(pixels()).last_hidden_state
    parts = {"cls": [hidden[:, 0]], "mean": [hidden[:, 1:].mean(1)], "both": [hidden[:, 0], hidden[:, 1:].mean(1)]}
    expected = torch.cat(parts[pooling], 1) @ model.head.weight.T + model.head.bias
    output = model(pixels())
    assert isinstance(output, ImageClassifierOutput)
    assert output.loss is None
    assert model.head.in_features == width
    torch.testing.assert_close(output.logits, expected)


def test_classification_loss_is_the_cross_entropy():
    model = shaken(classifier())
    labels = torch.tensor([1, 3])
    output = model(pixels(), labels=labels)
    expected = -output.logits.log_softmax(1)[[0, 1], labels].mean()
    torch.testing.assert_close(output.loss, expected)
    soft = model(pixels(), labels=F.one_hot(labels, 4).float())
    torch.testing.assert_close(soft.loss, expected)


def test_linear_segmentation_upsamples_the_logits_of_patches():
    model = shaken(segmenter())
    hidden = model.backbone(pixels()).last_hidden_state[:, 1:]  # (2, 16, 16)
    weight, bias = model.head.weight[:, :, 0, 0], model.head.bias
    coarse = (hidden @ weight.T + bias).transpose(1, 2).unflatten(2, (4, 4))
    output = model(pixels())
    assert isinstance(output, SemanticSegmenterOutput)
    torch.testing.assert_close(output.logits, F.interpolate(coarse, (SIZE, SIZE), mode="bilinear"))


def test_masks_of_another_size_count_at_theirs():
    model = shaken(segmenter())
    hidden = model.backbone(pixels()).last_hidden_state[:, 1:]
    coarse = model.head(hidden.transpose(1, 2).unflatten(2, (4, 4)))
    labels = torch.randint(3, (2, 24, 40))
    output = model(pixels(), labels=labels)
    expected = F.cross_entropy(F.interpolate(coarse, (24, 40), mode="bilinear"), labels)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (2, 3, SIZE, SIZE)


def test_ignored_pixels_do_not_count():
    model = shaken(segmenter())
    labels = torch.randint(3, (2, SIZE, SIZE))
    half = labels.clone()
    half[:, : SIZE // 2] = 255
    logits = model(pixels()).logits[:, :, SIZE // 2 :]
    expected = F.cross_entropy(logits, labels[:, SIZE // 2 :])
    torch.testing.assert_close(model(pixels(), labels=half).loss, expected)


@pytest.mark.parametrize(
    "name", ["Dinov2Model", "timm/vit", "timm/swin", "SamVisionModel", "SwinForImageClassification"]
)
@pytest.mark.parametrize("head", ["convolutional", "upernet"])
def test_a_head_reads_several_layers(head: str, name: str):
    backbone = VISION[name].build()
    backbone = backbone.swin if name.startswith("Swin") else backbone
    model = SerialLoraForSemanticSegmentation.from_backbone(
        backbone, 3, CONFIG, head=head, width=8, preprocessing=PREPARE
    )
    levels = model.head.levels if isinstance(model.head, ConvolutionalHead) else model.head.scales
    assert len(levels) == len(model.settings["layers"]) >= 2
    model(pixels(), labels=torch.zeros(2, SIZE, SIZE, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.head.parameters())
    assert model(pixels()).logits.shape == (2, 3, SIZE, SIZE)


def test_upernet_is_the_pyramid_of_its_paper():
    """Lateral 1 x 1 projections, added from the coarsest down; on the last level its own pools beside it."""
    torch.manual_seed(0)
    net: Any = UPerNet([4, 5, 6], 8, 3, [0, 0, 0]).double()
    maps = [torch.randn(2, d, n, n, dtype=torch.float64) for d, n in ((4, 12), (5, 6), (6, 6))]
    a, b, c = (scale(x) for scale, x in zip(net.scales, maps, strict=True))

    def sized(x: torch.Tensor, n: int) -> torch.Tensor:
        return F.interpolate(x, (n, n), mode="bilinear")

    pooled = []
    for n, both in zip((1, 2, 3, 6), net.pools, strict=True):
        cells = c.unflatten(3, (n, -1)).unflatten(2, (n, -1)).mean((3, 5))  # (2, 8, n, n)
        pooled.append(sized(both.get_submodule("1")(cells), 6))
    c = net.context(torch.cat([c, *pooled], 1))
    b = b + c
    a = a + sized(b, 12)
    together = torch.cat([sized(c, 12), sized(net.smooth[0](b), 12), net.smooth[1](a)], 1)
    torch.testing.assert_close(net(maps), net.classifier(net.together(together)))


def test_only_head_and_adapter_train():
    model = classifier()
    trained = {
        name.partition(".")[0] if "serial_lora" not in name else "adapter"
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert trained == {"head", "adapter"}
    alone = SerialLoraForImageClassification.from_backbone(VISION["ViTModel"].build(), 4, None, preprocessing=PREPARE)
    assert [name for name, p in alone.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    "make",
    [
        classifier,
        segmenter,
        lambda: segmenter(head="convolutional", layers=[0, 1]),
        lambda: segmenter(head="upernet", width=8),
    ],
)
def test_saved_model_comes_back_over_its_base(make, tmp_path):
    model = shaken(make())
    model.label_names = tuple("abcd"[: model.num_labels])
    path = model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path, backbone=VISION["Dinov2Model"].build())
    assert torch.equal(back(pixels()).logits, model(pixels()).logits)
    assert (back.label_names, back.preprocessing, back.settings) == (model.label_names, PREPARE, model.settings)
    assert not back.training
    assert all(key.startswith("head.") or ".serial_lora." in key for key in load_file(path))


def test_file_names_its_base_and_opens_it_alone(tmp_path):
    VISION["Dinov2Model"].build().save_pretrained(tmp_path / "base")
    model = SerialLoraForImageClassification.from_backbone(tmp_path / "base", 4, CONFIG, preprocessing=PREPARE)
    shaken(model).save_pretrained(tmp_path / "adapter")
    back = SerialLoraForImageClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(back(pixels()).logits, model(pixels()).logits)


def test_adapter_in_the_file_loads_into_a_plain_backbone(tmp_path):
    model = shaken(classifier())
    path = model.save_pretrained(tmp_path)
    assert {key.partition(".")[0] for key in load_file(path)} == {"model", "head"}
    plain = VISION["Dinov2Model"].build()
    load_serial_lora(plain, tmp_path)
    assert torch.equal(plain(pixels()).last_hidden_state, model.backbone(pixels()).last_hidden_state)


def test_head_alone_is_saved_and_opened(tmp_path):
    model = SerialLoraForImageClassification.from_backbone(VISION["ViTModel"].build(), 4, None, preprocessing=PREPARE)
    shaken(model).save_pretrained(tmp_path)
    back = SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=VISION["ViTModel"].build())
    assert torch.equal(back(pixels()).logits, model(pixels()).logits)
    assert not any(p.requires_grad for p in back.backbone.parameters())


def test_fused_model_is_plain_and_gives_the_same():
    model = shaken(classifier(pooling="both"))
    expected, keys = model(pixels()).logits, set(VISION["Dinov2Model"].build().state_dict())
    fused = copy.deepcopy(model).fuse()
    torch.testing.assert_close(fused(pixels()).logits, expected, rtol=1e-4, atol=1e-4)
    assert set(fused.backbone.state_dict()) == keys
    assert not any(m._forward_pre_hooks for m in fused.modules())
    assert torch.equal(model(pixels()).logits, expected)


def test_clip_model_gives_its_image_tower():
    model = SerialLoraForImageClassification.from_backbone(
        VISION["CLIPModel"].build(), 4, CONFIG, preprocessing=PREPARE
    )
    assert type(model.backbone).__name__ == "CLIPVisionModel"
    assert model(pixels()).logits.shape == (2, 4)


def test_position_embeddings_are_interpolated_for_other_sizes():
    model = classifier("ViTModel", pooling="both")
    assert model(pixels(size=24)).logits.shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of cls, mean, both"),
        ({"label_names": ["a", "b"]}, "num_labels=4"),
        ({"label_names": ["a", "b", "c", "a"]}, "each of its own name"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_backbone_alone(arguments, message):
    backbone = VISION["ViTModel"].build()
    keys = list(backbone.state_dict())
    with pytest.raises(SerialLoraError, match=message):
        SerialLoraForImageClassification.from_backbone(backbone, 4, CONFIG, preprocessing=PREPARE, **arguments)
    assert list(backbone.state_dict()) == keys


def test_class_token_pooling_needs_a_class_token():
    backbone = VISION["SiglipVisionModel"].build()
    with pytest.raises(SerialLoraError, match="no class token"):
        SerialLoraForImageClassification.from_backbone(backbone, 4, CONFIG, preprocessing=PREPARE)
    assert not hasattr(backbone, "_serial_lora")
    assert pool(None, torch.ones(1, 2, 3, 3), "mean").tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "unet"}, "head must be one of linear, convolutional"),
        ({"layers": [0]}, "with a head over several only"),
        ({"head": "convolutional", "layers": [7]}, "has 2 layers"),
        ({"head": "upernet", "layers": [0, 1, 0, 1, 0]}, "UPerNet reads at most four layers"),
        ({"head": "convolutional", "layers": []}, "one or more"),
        ({"head": "convolutional", "width": 0}, "width at least 1"),
    ],
)
def test_bad_segmentation_heads_are_refused(arguments, message):
    with pytest.raises(SerialLoraError, match=message):
        segmenter(**arguments)


def test_images_must_divide_into_patches():
    with pytest.raises(SerialLoraError, match="patches of 4 x 4"):
        classifier()(pixels(size=18))


def test_text_model_is_no_vision_backbone():
    with pytest.raises((ArchitectureError, ValueError, TypeError)):
        SerialLoraForImageClassification.from_backbone(TEXT["T5EncoderModel"].build(), 4, CONFIG)


def test_missing_model_is_named(tmp_path):
    with pytest.raises(SerialLoraError, match="not a model that transformers can open"):
        SerialLoraForImageClassification.from_backbone(tmp_path / "nothing", 4, CONFIG, preprocessing=PREPARE)


def test_other_tasks_heads_are_refused(tmp_path):
    classifier().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="a head for image classification"):
        SerialLoraForSemanticSegmentation.from_pretrained(tmp_path, backbone=VISION["Dinov2Model"].build())


def test_damaged_head_is_refused(tmp_path):
    path = classifier().save_pretrained(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for bad in (torch.zeros(4, 15), torch.full((4, 16), float("nan"))):
        save_file({**tensors, "head.weight": bad}, path, metadata)
        with pytest.raises(AdapterFileError, match=r"does not fit|NaN"):
            SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=VISION["Dinov2Model"].build())


def test_preprocessing_equals_the_formula():
    prepare = Preprocessing((4, 6), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    expected = (np.asarray(image).transpose(2, 0, 1) / 255 - np.array([[[0.5]], [[0.4]], [[0.3]]])) / np.array(
        [[[0.2]], [[0.3]], [[0.4]]]
    )
    np.testing.assert_allclose(prepare(image).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert prepare(image.convert("L")).shape == (3, 4, 6)
    assert Preprocessing.from_dict(json.loads(json.dumps(prepare.to_dict()))) == prepare


def test_preprocessing_is_found_beside_the_model(tmp_path):
    VISION["ViTModel"].build().save_pretrained(tmp_path)
    assert Preprocessing.of(tmp_path) == Preprocessing((SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)
    values = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 12},
        "image_mean": [0.4] * 3,
        "image_std": [0.3] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert Preprocessing.of(tmp_path) == Preprocessing((8, 12), (0.4,) * 3, (0.3,) * 3)
    assert Preprocessing.of(VISION["timm/vit"].build()).mean == (0.5, 0.5, 0.5)


def test_vision_needs_torch_alone_at_import():
    code = (
        "import sys, types; package = types.ModuleType('slora_diffusers'); package.__path__ = ['slora_diffusers'];"
        "sys.modules['slora_diffusers'] = package; import slora_diffusers.heads.segmentation;"
        "print(sorted({'transformers', 'diffusers', 'timm', 'PIL', 'peft'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
