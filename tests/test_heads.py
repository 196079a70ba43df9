"""A model with a head as users hold it: the library's verbs work on it, and files that do not fit change nothing."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from slora_diffusers import (
    SerialLoraConfig,
    SerialLoraError,
    add_serial_lora,
    export_lora,
    load_serial_lora,
    save_serial_lora,
    serial_lora_scale,
    serial_lora_status,
    set_serial_lora,
    unload_serial_lora,
)
from slora_diffusers.errors import AdapterFileError, AdapterStateError
from slora_diffusers.heads.classification import SerialLoraForImageClassification
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.promptable import SerialLoraForPromptableSegmentation
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation, pixel_cross_entropy
from tests.test_vision import CONFIG, PREPARE, classifier, pixels, shaken
from tests.test_vision_promptable import MODELS, make
from tests.tiny.vision import SIZE, VISION


def rewrite(path, change) -> None:
    """Change a file's tensors and header in place."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    key = next(key for key in metadata if metadata[key].startswith("{") and '"head"' in metadata[key])
    header = json.loads(metadata[key])
    change(tensors, header)
    save_file(tensors, path, {**metadata, key: json.dumps(header)})


def test_status_scale_and_export_see_the_adapter_below_the_head(tmp_path):
    model = shaken(classifier())
    assert serial_lora_status(model) == serial_lora_status(model.backbone)
    live = model(pixels()).logits
    with serial_lora_scale(model, 0.0):
        off = model(pixels()).logits
    plain = copy.deepcopy(model)
    plain.backbone = VISION["Dinov2Model"].build()
    assert torch.equal(off, plain(pixels()).logits)
    assert not torch.equal(off, live)
    export_lora(model, tmp_path / "lora", format="peft")
    lora = PeftModel.from_pretrained(VISION["Dinov2Model"].build(), str(tmp_path / "lora"))
    features = lora(pixels()).last_hidden_state
    torch.testing.assert_close(features, model.backbone(pixels()).last_hidden_state, rtol=1e-4, atol=1e-4)
    save_serial_lora(model, tmp_path)
    load_serial_lora(plain, tmp_path)
    assert torch.equal(plain(pixels()).logits, live)


def test_adapter_added_below_a_head_leaves_the_head_trainable():
    model = SerialLoraForImageClassification.from_backbone(VISION["ViTModel"].build(), 4, None, preprocessing=PREPARE)
    add_serial_lora(model, CONFIG)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {"head.weight", "head.bias"} < set(trained)
    assert all(name.startswith("head.") or "serial_lora" in name for name in trained)


def test_fused_model_is_not_saved_as_a_head_alone(tmp_path):
    model = shaken(classifier())
    path = model.save_pretrained(tmp_path)
    before = path.read_bytes()
    with pytest.raises(AdapterStateError, match=r"save before fuse\(\)"):
        model.fuse().save_pretrained(tmp_path)
    assert path.read_bytes() == before


def test_gradients_are_checkpointed_by_transformers_own_name():
    model = shaken(classifier()).train()
    labels = torch.tensor([0, 1])
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(pixels(), labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert model.backbone.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("CLIPModel", transformers.CLIPConfig),
        ("SiglipModel", transformers.SiglipConfig),
    ],
)
def test_head_on_the_image_tower_of_two_finds_its_base_again(tmp_path, name: str, config: type):
    clip = VISION["CLIPModel"].build().config
    model = getattr(transformers, name)(
        config(text_config=clip.text_config.to_dict(), vision_config=clip.vision_config.to_dict())
    )
    model.save_pretrained(tmp_path / "base")
    pooling = "cls" if name == "CLIPModel" else "mean"
    headed = SerialLoraForImageClassification.from_backbone(
        tmp_path / "base", 4, CONFIG, pooling=pooling, preprocessing=PREPARE
    )
    shaken(headed).save_pretrained(tmp_path / "adapter")
    back = SerialLoraForImageClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(back(pixels()).logits, headed(pixels()).logits)


def test_damaged_decoder_leaves_the_model_as_it_was(tmp_path):
    trained = shaken(make("sam"))
    path = trained.save_pretrained(tmp_path)
    rewrite(path, lambda tensors, header: tensors.pop(next(key for key in tensors if "lora_A" in key)))
    base = MODELS["sam"][0].build()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(SerialLoraError):
        SerialLoraForPromptableSegmentation.from_pretrained(tmp_path, backbone=base)
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


@pytest.mark.parametrize("make_one", [classifier, lambda: make("sam"), lambda: make("sam", decoder="frozen")])
def test_reopened_model_trains_what_it_trained(tmp_path, make_one):
    model = make_one()
    model.save_pretrained(tmp_path)
    base = VISION["Dinov2Model"] if isinstance(model, SerialLoraForImageClassification) else MODELS["sam"][0]
    back = type(model).from_pretrained(tmp_path, backbone=base.build())
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, back)]
    assert trained[0] == trained[1]


def test_backbone_that_is_adapted_already_is_refused(tmp_path):
    model = shaken(classifier())
    model.save_pretrained(tmp_path)
    weights = copy.deepcopy(model.backbone.state_dict())
    with pytest.raises(AdapterStateError, match="has a Serial LoRA adapter already"):
        SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=model.backbone)
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.backbone.state_dict().items())


def test_head_over_other_weights_than_it_was_trained_on_warns(tmp_path):
    base = VISION["ViTModel"]
    SerialLoraForImageClassification.from_backbone(base.build(), 4, None, preprocessing=PREPARE).save_pretrained(
        tmp_path
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=base.build())
    with pytest.warns(UserWarning, match="the results will not be the same"):
        SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=base.build(seed=1))


@pytest.mark.parametrize("field", ["base", "settings", "label_names", "preprocessing"])
def test_header_without_a_field_is_damaged(tmp_path, field: str):
    path = classifier().save_pretrained(tmp_path)
    rewrite(path, lambda tensors, header: header["head"].pop(field))
    with pytest.raises(AdapterFileError, match=f"damaged: its header lacks {field}"):
        SerialLoraForImageClassification.from_pretrained(tmp_path, backbone=VISION["Dinov2Model"].build())


def test_label_255_is_taken():
    with pytest.raises(SerialLoraError, match="At most 255 labels"):
        SerialLoraForSemanticSegmentation.from_backbone(VISION["ViTModel"].build(), 256, None, preprocessing=PREPARE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_masks_of_any_integer_type_give_the_same_loss(dtype: torch.dtype):
    logits, labels = torch.randn(2, 3, SIZE, SIZE), torch.randint(3, (2, SIZE, SIZE))
    labels[0, 0] = 255
    assert pixel_cross_entropy(logits, labels.to(dtype)) == pixel_cross_entropy(logits, labels)


def test_padded_batches_of_pytorchs_encoder_go_through_the_pairs():
    """In eval mode nn.TransformerEncoder packs a padded batch into a nested tensor; what counts stays the same."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    add_serial_lora(encoder, SerialLoraConfig(rank=3))
    shaken(encoder)
    x, padded = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    padded[1, 4:] = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's nested tensors call themselves a prototype
        got = encoder(x, src_key_padding_mask=padded)
        expected = encoder(x[1:, :4])
    torch.testing.assert_close(got[1:, :4], expected, rtol=1e-4, atol=1e-5)


def test_model_inside_an_adapted_one_is_saved_without_pairs(tmp_path):
    model = VISION["Dinov2ForImageClassification"].build()
    keys = set(model.dinov2.state_dict())
    add_serial_lora(model, CONFIG)
    model.dinov2.save_pretrained(tmp_path / "inside")
    opened, report = transformers.AutoModel.from_pretrained(tmp_path / "inside", output_loading_info=True)
    assert set(opened.state_dict()) == keys
    assert not report["unexpected_keys"]
    unload_serial_lora(model)
    assert not any("save_pretrained" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_semantic_head_on_a_sam_sits_on_its_image_encoder(tmp_path, name: str):
    size = MODELS[name][1]
    MODELS[name][0].build().save_pretrained(tmp_path / "base")
    model = SerialLoraForSemanticSegmentation.from_backbone(
        tmp_path / "base", 3, CONFIG, preprocessing=Preprocessing((size, size))
    )
    assert "Vision" in type(model.backbone).__name__
    shaken(model).save_pretrained(tmp_path / "adapter")
    back = SerialLoraForSemanticSegmentation.from_pretrained(tmp_path / "adapter")
    image = pixels(size=size)
    assert torch.equal(back(image).logits, model(image).logits)


def test_weights_that_a_file_does_not_hold_are_named(tmp_path):
    model = shaken(classifier())
    set_serial_lora(model, "default", 0.5)
    with pytest.warns(UserWarning, match="weights other than 1"):
        model.save_pretrained(tmp_path)
