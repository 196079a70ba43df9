"""Regular expressions of sites: honest ones match as Python's do, and none of somebody else's takes long."""

from __future__ import annotations

import re
import time

import pytest

from slora_diffusers import SerialLoraConfig, SerialLoraError
from slora_diffusers.core.patterns import MOST, matches

PATHS = (
    "transformer_blocks.0.attn1",
    "transformer_blocks.12.attn",
    "single_transformer_blocks.3",
    "encoder.layers.1.self_attn",
    "",
)
HONEST = (
    *(".*", ".+", "", r"transformer_blocks\.0\.attn1", r"transformer_blocks\.\d+\.attn\d?", r".*attn.*"),
    r"(\w+\.)*attn1",
    *(r"(\w+\.)+(attn|attn1)", r"(?!single).*", r"(?i)TRANSFORMER.*", r"(.)\w*\.(\d).*", r"[a-z_]+\.(0|1[0-9])\.\w+"),
    *(r"(\.?\w+){3}", r"(?:single_)?transformer_blocks\.\d+(\.attn)?", r"encoder\.layers\.(?P<n>\d)\..*", r"\w+\.\d+$"),
)  # fmt: skip


@pytest.mark.parametrize("pattern", HONEST)
def test_a_pattern_matches_what_pythons_own_does(pattern):
    assert [matches(pattern, path) for path in PATHS] == [re.fullmatch(pattern, path) is not None for path in PATHS]


@pytest.mark.parametrize("field", ["targets", "exclude", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        r"([\w.]+)+!",
        r"(.*)*\1!",
        r"(\w*\w*\w*)*!",
        r"(?=(.+)+!)",
        r"((a{1,99}){1,99}){1,99}",
        r"(a|b+)+c",
        r"(\w+\.?)*!",
    ],
)
def test_repetition_of_repetition_is_refused_when_the_config_is_made(field, pattern):
    with pytest.raises(SerialLoraError, match="could take very long"):
        SerialLoraConfig(**{field: {pattern: 2} if field.endswith("_pattern") else [pattern]})


@pytest.mark.parametrize("pattern", [r"(\w|[a-z]|_|\.|\d)*[^\w.]", r"((\w{1,9}\.?){1,9}){1,9}[^\w.]"])
def test_what_turns_out_to_take_long_is_refused_within_a_moment(pattern):
    began = time.process_time()
    with pytest.raises(SerialLoraError, match="could take very long"):
        matches(pattern, "transformer_blocks.12.attn.serial_lora.hidden_states")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("pattern", ["[", "(?P<a>x)(?P<a>y)", "(?:" * 300, "*", r"\8", "a{5,2}"])
def test_what_is_no_regular_expression_is_said_to_be_none(pattern):
    with pytest.raises(SerialLoraError, match="is not a regular expression of sites"):
        SerialLoraConfig(targets=pattern)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "x" * 2000}, "at most 1000 letters"),
        ({"rank_pattern": {f"blocks.{i}": 2 for i in range(MOST + 1)}}, "holds 4,097 patterns"),
        ({"exclude": ["x" * 999 + str(i) for i in range(9)] * 40}, "holds 360 patterns of 360,000 letters"),
        ({"layers": list(range(10_000))}, "layers has 10,000 entries"),
    ],
)
def test_too_many_or_too_long_ones_are_refused_with_their_number(settings, message):
    with pytest.raises(SerialLoraError, match=message):
        SerialLoraConfig(**settings)


def test_thousands_of_places_written_by_the_library_are_matched_in_a_moment():
    """A merge of adapters on different places gives each pair its own pattern."""
    ranks = {re.escape(f"transformer_blocks.{i}.attn.serial_lora.hidden_states"): 2 + i % 7 for i in range(3000)}
    began = time.process_time()
    config = SerialLoraConfig(rank=1, rank_pattern=ranks)
    paths = [f"transformer_blocks.{i}.attn.serial_lora.hidden_states" for i in range(0, 3000, 30)]
    assert [config.rank_of(path) for path in paths] == [2 + i % 7 for i in range(0, 3000, 30)]
    assert time.process_time() - began < 3
