"""The code of docs/vision.md runs as it stands, on tiny models under the names that it uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from slora_diffusers import SerialLoraConfig, SerialLoraForImageClassification
from tests.test_trainer_callback import Stripes
from tests.test_trainer_callback import model as adapted
from tests.test_vision_promptable import batch, sam
from tests.test_vision_prompts import tokenizer
from tests.tiny.vision import VISION

PAGE = Path(__file__).resolve().parents[1] / "docs" / "vision.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
assert len(BLOCKS) == 8


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    models = {
        "facebook/dinov2-small": VISION["Dinov2Model"].build(),
        "facebook/sam-vit-base": sam(),
        "openai/clip-vit-base-patch32": VISION["CLIPModel"].build(),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    inputs = batch()
    names = {
        "pixel_values": inputs["pixel_values"],
        "labels": torch.tensor([0, 1]),
        "masks": torch.randint(3, (2, 16, 16)),
        "objects": inputs["masks"],
        "boxes": inputs["input_boxes"],
        "corners": torch.tensor([[0.0, 0.0, 9.0, 9.0]]),
        "image": Image.effect_noise((50, 21), 90),
        "mask": Image.new("L", (50, 21), 1),
        "model": adapted(),
        "images": Stripes(),
    }
    if "to_transformers" in BLOCKS[number]:  # goes on from what the page's classifier wrote
        base = tmp_path / "facebook" / "vit"
        VISION["ViTModel"].build().save_pretrained(base)
        made = SerialLoraForImageClassification.from_backbone(base, 3, SerialLoraConfig(rank=2))
        made.save_pretrained("outputs/classifier")
    exec(compile(BLOCKS[number], f"docs/vision.md, block {number + 1}", "exec"), names)
    model = names["model"]
    assert any(".serial_lora." in key for key, _ in model.named_parameters()) or "logits" in names
