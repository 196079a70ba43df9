"""SAM and SAM 2 with points and boxes: adapted in the image encoder, with the mask decoder trained or frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import Sam2Config, Sam2Model, SamConfig, SamModel

from slora_diffusers import SerialLoraConfig, SerialLoraError
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.promptable import SerialLoraForPromptableSegmentation, mask_loss
from tests.tiny.vision import VISION, TinyVision

CONFIG = SerialLoraConfig(rank=3)
DECODER = {
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
    "num_hidden_layers": 1,
}


def sam() -> nn.Module:
    vision = VISION["SamVisionModel"].build().config
    vision.num_pos_feats = 8  # half of the prompts' width
    prompt = {"hidden_size": 16, "image_size": 16, "patch_size": 4, "image_embedding_size": 4, "mask_input_channels": 4}
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER))


def sam2() -> nn.Module:
    vision = VISION["Sam2VisionModel"].build().config
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER))


MODELS = {"sam": (TinyVision(sam, lambda draw: {}), 16), "sam2": (TinyVision(sam2, lambda draw: {}), 64)}


def make(name: str = "sam", **arguments) -> Any:
    tiny, size = MODELS[name]
    return SerialLoraForPromptableSegmentation.from_sam(
        tiny.build(), CONFIG, preprocessing=Preprocessing((size, size)), **arguments
    ).eval()


def batch(name: str = "sam") -> dict[str, torch.Tensor]:
    size, draw = MODELS[name][1], torch.Generator().manual_seed(2)
    masks = torch.zeros(2, 1, size, size)
    masks[:, :, : size // 2, : size // 2] = 1
    boxes = torch.tensor([0.0, 0.0, size / 2, size / 2]).expand(2, 1, 4)
    return {"pixel_values": torch.randn(2, 3, size, size, generator=draw), "masks": masks, "input_boxes": boxes}


@pytest.mark.parametrize("name", MODELS)
def test_untrained_it_is_the_model_itself(name: str):
    inputs = batch(name)
    masks = inputs.pop("masks")
    expected = MODELS[name][0].build()(**inputs, multimask_output=False).pred_masks
    model = make(name)
    output = model(masks=masks, **inputs)
    torch.testing.assert_close(output.pred_masks, expected)
    logits = F.interpolate(expected[:, :, 0], masks.shape[-2:], mode="bilinear")
    torch.testing.assert_close(output.loss, mask_loss(logits, masks))


def test_mask_loss_is_the_formula():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(2, (2, 3, 4, 4)).float()
    p = 1 / (1 + (-logits).exp())
    entropy = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean()
    dice = [
        (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1)
        for a, b in zip(p.flatten(0, 1), masks.flatten(0, 1), strict=True)
    ]
    torch.testing.assert_close(mask_loss(logits, masks), entropy + 1 - torch.stack(dice).mean())


@pytest.mark.parametrize("decoder", ["trained", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_it_learns_and_trains_only_what_it_says(name: str, decoder: str):
    model, inputs = make(name, decoder=decoder), batch(name)
    trained = {key for key, p in model.backbone.named_parameters() if p.requires_grad}
    encoder = {key for key in trained if ".serial_lora." in key}
    assert encoder
    assert all(key.startswith("vision_encoder.") for key in encoder)
    assert any(key.startswith("mask_decoder.") for key in trained - encoder) == (decoder == "trained")
    first = model(**inputs).loss.item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(30):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**inputs).loss.item() < 0.97 * first


@pytest.mark.parametrize("decoder", ["trained", "frozen"])
def test_saved_model_comes_back_with_its_decoder(decoder: str, tmp_path):
    model = make(decoder=decoder)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    path = model.save_pretrained(tmp_path)
    assert any(key.startswith("head.") for key in load_file(path)) == (decoder == "trained")
    back = SerialLoraForPromptableSegmentation.from_pretrained(tmp_path, MODELS["sam"][0].build())
    torch.testing.assert_close(back(**batch()).pred_masks, model(**batch()).pred_masks)
    fused = model.fuse()(**batch()).pred_masks
    torch.testing.assert_close(fused, back(**batch()).pred_masks, rtol=1e-3, atol=1e-3)


def test_bad_arguments_are_refused():
    with pytest.raises(SerialLoraError, match="no mask_decoder"):
        SerialLoraForPromptableSegmentation.from_sam(VISION["ViTModel"].build(), CONFIG)
    with pytest.raises(SerialLoraError, match="trained or frozen"):
        make(decoder="half")
