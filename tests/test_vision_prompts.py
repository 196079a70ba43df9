"""Classification by prompts: CLIP's own zero-shot logits, adapted in one tower or both."""

from __future__ import annotations

import pytest
import torch

from slora_diffusers import SerialLoraConfig, SerialLoraError
from slora_diffusers.errors import ArchitectureError
from slora_diffusers.heads.preprocessing import Preprocessing
from slora_diffusers.heads.prompts import SerialLoraForPromptClassification
from tests.tiny.vision import SIZE, VISION

CONFIG = SerialLoraConfig(rank=3)
PREPARE = Preprocessing((SIZE, SIZE))


def tokenizer(prompts: list[str], padding: bool) -> dict[str, list[list[int]]]:
    """One token per letter, up to ten, then the end token; padded with 1."""
    rows = [[ord(c) % 40 + 2 for c in prompt][:10] + [49] for prompt in prompts]
    longest = max(map(len, rows))
    return {
        "input_ids": [row + [1] * (longest - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
    }


def make(config: SerialLoraConfig | None = CONFIG, **arguments) -> SerialLoraForPromptClassification:
    return SerialLoraForPromptClassification.from_clip(
        VISION["CLIPModel"].build(), ["ox", "bee", "cat"], config, template="a {}",
        tokenizer=tokenizer, preprocessing=PREPARE, **arguments,
    ).eval()  # fmt: skip


def shake(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3


def pixels() -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("config", [None, CONFIG])
def test_untrained_it_is_the_models_zero_shot_classification(config):
    clip = VISION["CLIPModel"].build()
    tokens = {k: torch.tensor(v) for k, v in tokenizer(["a ox", "a bee", "a cat"], True).items()}
    texts = clip.get_text_features(**tokens).pooler_output
    images = clip.get_image_features(pixels()).pooler_output
    cosine = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    torch.testing.assert_close(make(config)(pixels()).logits, clip.logit_scale.exp() * cosine)


@pytest.mark.parametrize(("towers", "count"), [("both", 4), ("vision", 2), ("text", 2)])
def test_pairs_go_into_the_towers_that_are_named(towers: str, count: int):
    model = make(towers=towers)
    paths = {name.partition(".")[0] for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert paths == {f"{tower}_model" for tower in ("vision", "text") if towers in ("both", tower)}
    assert sum(p.requires_grad for p in model.parameters()) == 2 * count


@pytest.mark.parametrize(("towers", "share"), [("both", 0.3), ("text", 0.85)])
def test_few_steps_teach_it_the_classes(towers: str, share: float):
    model, labels = make(towers=towers), torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    first = model(pixels(), labels=labels).loss.item()
    for _ in range(30):
        model(pixels(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(pixels(), labels=labels).loss.item() < share * first


def test_saved_adapter_needs_no_tokenizer_to_open(tmp_path):
    model = make()
    shake(model)
    model.save_pretrained(tmp_path)
    back = SerialLoraForPromptClassification.from_pretrained(tmp_path, VISION["CLIPModel"].build())
    assert torch.equal(back(pixels()).logits, model(pixels()).logits)
    assert back.label_names == ("ox", "bee", "cat")
    torch.testing.assert_close(model.fuse()(pixels()).logits, back(pixels()).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"towers": "left"}, "towers must be one of both, vision, text"),
        ({"template": "a thing"}, "for the class's name"),
        ({"towers": "text", "config": SerialLoraConfig(targets=".*self_attn")}, "not by both"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = VISION["CLIPModel"].build()
    arguments = {"template": "a {}", "config": CONFIG, **arguments}
    with pytest.raises(SerialLoraError, match=message):
        SerialLoraForPromptClassification.from_clip(
            model, ["ox", "bee"], tokenizer=tokenizer, preprocessing=PREPARE, **arguments
        )
    assert not hasattr(model, "_serial_lora")


def test_models_without_two_towers_are_refused():
    with pytest.raises(ArchitectureError, match="no text_model"):
        SerialLoraForPromptClassification.from_clip(
            VISION["ViTModel"].build(), ["ox", "bee"], CONFIG, tokenizer=tokenizer, preprocessing=PREPARE
        )
    with pytest.raises(SerialLoraError, match="pass tokenizer="):
        SerialLoraForPromptClassification.from_clip(VISION["CLIPModel"].build(), ["ox", "bee"], CONFIG)
