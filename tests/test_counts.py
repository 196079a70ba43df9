"""Parameters in the published shapes, on the meta device, against arithmetic by hand and PEFT's own count."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
from peft import LoraConfig, inject_adapter_in_model

from docs.build_tables import PUBLISHED, REGIONS, ROOT, count, counts, published, rebuilt

RANK = 16
# By hand. Pairs: DiT one a block; PixArt three (self; image and text of the cross-attention); SD3 two, and one more
# where the attention is dual; Flux two a double block, one a single block. Every input is as wide as the model.
PAIRS = {
    "DiT-XL/2": (28, 28, 1152),
    "PixArt-XL": (2 * 28, 3 * 28, 1152),
    "SD3-medium": (24, 2 * 24, 1536),
    "SD3.5-medium": (24 + 13, 2 * 24 + 13, 1536),
    "SD3.5-large": (38, 2 * 38, 2432),
    "Flux.1-dev": (19 + 38, 2 * 19 + 38, 3072),
}
RATIO = {
    "DiT-XL/2": Fraction(1, 4),
    "PixArt-XL": Fraction(2 + 4, 8 + 8),
    "SD3-medium": Fraction(24 * 4, 24 * 16 - 2),  # no text output in the last block
    "SD3.5-medium": Fraction(24 * 4 + 13 * 2, 24 * 16 - 2 + 13 * 8),
    "SD3.5-large": Fraction(38 * 4, 38 * 16 - 2),
    "Flux.1-dev": Fraction(19 * 4 + 38 * 2, 19 * 16 + 38 * 6),  # no output projection of its own in a single block
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def test_every_published_model_is_counted_by_hand():
    assert set(PUBLISHED) == set(PAIRS) == set(RATIO)


@pytest.mark.parametrize("name", list(PAIRS))
def test_pairs_and_parameters_are_those_counted_by_hand(name):
    sites, pairs, d = PAIRS[name]
    report = count(name, RANK)
    assert (report.sites, report.pairs, report.parameters) == (sites, pairs, pairs * 2 * d * RANK)
    assert Fraction(report.parameters, report.lora_parameters) == RATIO[name]


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_lora_beside_it_is_the_one_that_peft_makes(name):
    model = copy.deepcopy(published(name))
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=TARGETS), model)
    peft = sum(p.numel() for key, p in model.named_parameters() if "lora_" in key)
    assert count(name, RANK).lora_parameters == peft


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_the_ratio_does_not_depend_on_the_rank(rank):
    report = count("DiT-XL/2", rank)
    assert 4 * report.parameters == report.lora_parameters


def test_the_published_table_is_what_is_counted():
    page = ROOT / "docs" / "counts.md"
    assert "counts" in REGIONS[page]
    text = page.read_text(encoding="utf-8")
    assert f"<!-- counts:begin -->\n{counts()}\n<!-- counts:end -->" in text, "run: python -m docs.build_tables"
    assert rebuilt(page) == text
    assert "| DiT-XL/2 | 28 | 28 | 1,032,192 | 4,128,768 | 0.2500 |" in text
