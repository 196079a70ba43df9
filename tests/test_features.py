"""Where a backbone's class token and patches lie in its output, and what it is told of sizes and normalisation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.models.timm_wrapper import modeling_timm_wrapper

from slora_diffusers import SerialLoraConfig, SerialLoraError, add_serial_lora
from slora_diffusers.errors import ArchitectureError
from slora_diffusers.heads.backbones import last_features, layer_features, patch_size
from slora_diffusers.heads.preprocessing import IMAGENET_MEAN, Preprocessing
from slora_diffusers.heads.segmentation import SerialLoraForSemanticSegmentation
from tests.tiny.vision import SIZE, VISION, timm

BACKBONES = [
    *("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "CLIPVisionModel", "SiglipVisionModel"),
    *("IJepaModel", "SamVisionModel", "timm/vit", "timm/vit_reg4_dinov2", "timm/eva02", "timm/swin"),
]
WITHOUT_CLASS_TOKEN = {"SiglipVisionModel", "IJepaModel", "SamVisionModel", "timm/swin"}


def pixels(count: int = 2, height: int = SIZE, width: int | None = None) -> torch.Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BACKBONES)
def test_class_token_and_patches_lie_where_the_model_puts_them(name: str):
    """Where attentions give nothing, a change of one patch of the image is a change of that patch's feature."""
    backbone = VISION[name].build()
    for key, parameter in backbone.named_parameters():
        if any(part in key for part in ("o_proj.", "out_proj.", "attn.proj.")):
            parameter.zero_()
    token, maps = last_features(backbone, pixels())
    assert (token is None) == (name in WITHOUT_CLASS_TOKEN)
    assert maps.shape[0] == 2
    assert maps.shape[2] == maps.shape[3]
    h = maps.shape[2]
    changed = pixels()
    side = SIZE // h
    changed[:, :, -side:, :side] += 3.0  # the lower left corner
    difference = (last_features(backbone, changed)[1] - maps).norm(dim=1)[0]  # (h, w)
    assert difference.argmax().item() == (h - 1) * h


def test_features_equal_the_models_own_tokens():
    backbone = VISION["Dinov2WithRegistersModel"].build()
    hidden = backbone(pixels()).last_hidden_state  # class, two registers, 16 patches
    token, maps = last_features(backbone, pixels())
    assert torch.equal(token, hidden[:, 0])
    assert torch.equal(maps.flatten(2).transpose(1, 2), hidden[:, 3:])


def test_layer_features_are_the_hidden_states_after_each_block():
    backbone = VISION["ViTModel"].build()
    hidden = backbone(pixels(), output_hidden_states=True).hidden_states
    first, last = layer_features(backbone, pixels(), [0, -1])
    assert torch.equal(first.flatten(2).transpose(1, 2), hidden[1][:, 1:])
    assert torch.equal(last.flatten(2).transpose(1, 2), hidden[2][:, 1:])


def test_swin_stages_give_maps_of_their_own_resolution():
    swin = VISION["SwinForImageClassification"].build().swin
    expected = [x.shape[2:] for x in swin(pixels(), output_hidden_states=True).reshaped_hidden_states[1:]]
    assert [x.shape[2:] for x in layer_features(swin, pixels())] == expected
    assert last_features(swin, pixels())[1].shape[2:] == expected[-1]


def test_masked_autoencoder_sees_every_patch_in_its_place():
    """By hand: its own embeddings, none masked, through its own layers; pretraining's masking comes back afterwards."""
    backbone = VISION["ViTMAEForPreTraining"].build().vit
    token, maps = last_features(backbone, pixels())
    embeddings = backbone.embeddings
    x = embeddings.patch_embeddings(pixels()) + embeddings.position_embeddings[:, 1:]
    first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(2, -1, -1)
    x = torch.cat([first, x], 1)
    for layer in backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    x = backbone.layernorm(x)
    torch.testing.assert_close(token, x[:, 0])
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), x[:, 1:])
    assert torch.equal(last_features(backbone, pixels())[1], maps)
    assert backbone.config.mask_ratio == 0.75


def test_timm_wrapper_gives_what_its_model_gives(monkeypatch):
    monkeypatch.setattr(
        modeling_timm_wrapper, "requires_backends", lambda *_: None
    )  # it wants torchvision, unused here
    monkeypatch.setattr(modeling_timm_wrapper, "timm", timm(), raising=False)
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        **{"pretrained_cfg": {"input_size": [3, 8, 12], "mean": [0.1] * 3, "std": [0.2] * 3}},
    )
    wrapper = modeling_timm_wrapper.TimmWrapperModel(config).eval()
    assert patch_size(wrapper) == 4
    assert torch.equal(last_features(wrapper, pixels())[1], last_features(wrapper.timm_model, pixels())[1])
    assert len(layer_features(wrapper, pixels())) == 2
    assert Preprocessing.of(wrapper) == Preprocessing((SIZE, SIZE), (0.1,) * 3, (0.2,) * 3)
    add_serial_lora(wrapper, SerialLoraConfig(rank=2))


def test_registers_alone_are_no_class_token():
    backbone = VISION["timm/naflex"].build()  # four registers
    token, maps = last_features(backbone, pixels())
    assert token is None
    torch.testing.assert_close(maps.flatten(2).mT, backbone.fc_norm(backbone.forward_features(pixels()))[:, 4:])


@pytest.mark.parametrize("name", ["timm/relpos", "timm/beit", "timm/eva02"])
def test_models_that_pool_by_mean_are_normed(name: str):
    """timm puts their last norm after the pooling; a head reads what it would have read."""
    backbone = VISION[name].build()
    assert isinstance(backbone.norm, nn.Identity)
    tokens = backbone.fc_norm(backbone.forward_features(pixels()))
    assert torch.equal(last_features(backbone, pixels())[1].flatten(2).mT, tokens[:, backbone.num_prefix_tokens :])


def test_class_token_of_clip_is_what_its_own_head_reads():
    backbone = VISION["CLIPVisionModel"].build()
    assert torch.equal(last_features(backbone, pixels())[0], backbone(pixels()).pooler_output)


def test_segformer_maps_are_channels_first_at_any_size():
    """Sides whose stages do not divide evenly: 20 x 12 becomes 10 x 6, then 5 x 3."""
    backbone = VISION["SegformerForSemanticSegmentation"].build().segformer
    image = pixels(1, 20, 12)
    expected = backbone(image, output_hidden_states=True)
    assert torch.equal(last_features(backbone, image)[1], expected.last_hidden_state)
    maps = layer_features(backbone, image)
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 10, 6), (16, 5, 3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected.hidden_states, strict=True))


def test_sam_maps_are_read_right_where_every_axis_is_of_one_length():
    """A map of 16 x 16 x 16 may be read either way: SAM's layers are channels last, its output channels first."""
    backbone = VISION["SamVisionModel"].build()
    large = transformers.SamVisionConfig(**{**backbone.config.to_dict(), "image_size": 64})
    backbone = transformers.SamVisionModel(large).eval()
    output = backbone(pixels(1, 64), output_hidden_states=True)
    assert output.last_hidden_state.shape == (1, 16, 16, 16)
    assert torch.equal(last_features(backbone, pixels(1, 64))[1], output.last_hidden_state)
    assert torch.equal(layer_features(backbone, pixels(1, 64), [0])[0], output.hidden_states[1].permute(0, 3, 1, 2))


def test_sam2_gives_maps_of_its_own_resolution():
    backbone = VISION["Sam2VisionModel"].build()
    output = backbone(pixels(1, 64))
    assert torch.equal(last_features(backbone, pixels(1, 64))[1], output.last_hidden_state.permute(0, 3, 1, 2))
    assert Preprocessing.of(backbone).size == (64, 64)


def test_timm_model_of_a_fixed_size_says_how_to_get_another():
    backbone = VISION["timm/vit"].build()
    with pytest.raises(SerialLoraError, match="dynamic_img_size=True"):
        last_features(backbone, pixels(1, 32))
    assert Preprocessing.of(backbone).size == (SIZE, SIZE)
    with pytest.raises(SerialLoraError, match="SamVisionModel does not take these images"):
        last_features(VISION["SamVisionModel"].build(), pixels(1, 32))


class Odd(nn.Module):
    """Gives a fixed number of tokens, whatever it is shown."""

    def __init__(self, tokens: int, patch: int | None) -> None:
        super().__init__()
        self.tokens, self.config = tokens, SimpleNamespace(patch_size=patch)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.zeros(len(pixel_values), self.tokens, 8))


@pytest.mark.parametrize(("tokens", "patch", "message"), [(50, None, "its patch size"), (9, 4, r"\(9, 8\), no map")])
def test_tokens_are_never_guessed_into_a_map(tokens: int, patch: int | None, message: str):
    with pytest.raises(ArchitectureError, match=message):
        last_features(Odd(tokens, patch), pixels())


def test_lists_of_patches_are_no_images():
    backbone = VISION["Siglip2VisionModel"].build()
    with pytest.raises(ArchitectureError, match="reads lists of patches"):
        SerialLoraForSemanticSegmentation.from_backbone(backbone, 2, None, preprocessing=Preprocessing((SIZE, SIZE)))


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"size": {"longest_edge": 64}}, 64),  # SAM
        ({"size": {"longest_edge": 64}, "pad_size": {"height": 96, "width": 96}}, 96),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}, 56),  # CLIP, DINOv2
        ({"size": {"height": 64, "width": 64}, "crop_size": 56, "do_center_crop": False}, 64),
        ({"size": 48}, 48),
    ],
)
def test_every_way_to_write_a_size_is_read(tmp_path, values: dict, size: int):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "X", **values}))
    assert Preprocessing.of(tmp_path).size == (size, size)


def test_model_from_a_folder_keeps_its_preprocessing(tmp_path):
    VISION["Dinov2Model"].build().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "X", "size": 16, "image_mean": [0.1] * 3, "image_std": [0.2] * 3})
    )
    opened = transformers.AutoModel.from_pretrained(tmp_path)
    assert Preprocessing.of(opened) == Preprocessing((16, 16), (0.1,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    ("name", "mean"), [("ViTModel", 0.5), ("SiglipVisionModel", 0.5), ("CLIPVisionModel", 0.48145466)]
)
def test_models_are_normalised_as_their_kind_was_trained(name: str, mean: float):
    assert Preprocessing.of(VISION[name].build()).mean[0] == mean
    assert Preprocessing.of(VISION["Dinov2Model"].build()).mean == IMAGENET_MEAN
