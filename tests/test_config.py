"""The settings of an adapter: what they mean, how they travel as JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from slora_diffusers import SerialLoraConfig, SerialLoraError

FULL = SerialLoraConfig(
    rank=8,
    alpha=12.0,
    dropout=0.1,
    inputs=("hidden_states", "attention_output"),
    targets=r".*\.attn1",
    exclude=[r".*\.0\.attn1"],
    layers=(1, 2),
    rank_pattern={r".*\.1\.attn1": 4},
    alpha_pattern={r".*\.2\.attn1": 2.0},
    rslora=True,
    init="gaussian",
)


def test_the_defaults_are_the_documented_ones():
    assert dataclasses.asdict(SerialLoraConfig()) == {
        "rank": 16, "alpha": None, "dropout": 0.0, "inputs": None, "targets": None, "exclude": None, "layers": None,
        "rank_pattern": {}, "alpha_pattern": {}, "rslora": False, "init": "kaiming", "modules_to_save": None,
    }  # fmt: skip


@pytest.mark.parametrize("config", [SerialLoraConfig(), FULL])
def test_json_and_back_gives_the_same_settings(config):
    assert SerialLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SerialLoraConfig().rank = 4


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (SerialLoraConfig(rank=16), 1.0),
        (SerialLoraConfig(rank=16, alpha=8), 0.5),
        (SerialLoraConfig(rank=16, alpha=8, rslora=True), 2.0),
        (SerialLoraConfig(rank=16, rslora=True), 4.0),
        (SerialLoraConfig(rank=16, alpha=8, rank_pattern={"a.*": 4}), 2.0),
        (SerialLoraConfig(rank=16, rank_pattern={"a.*": 4}), 1.0),
        (SerialLoraConfig(rank=16, alpha_pattern={"a.*": 4, ".*": 100}), 0.25),
        (SerialLoraConfig(rank=16, alpha=0), 0.0),
    ],
)
def test_the_scale_is_alpha_over_r_or_its_root(config, scale):
    assert config.scaling_of("attn") == pytest.approx(scale)


def test_patterns_are_anchored_at_both_ends_and_the_first_counts():
    config = SerialLoraConfig(rank=16, rank_pattern={"blocks.1": 2, r"blocks\.1.*": 4})
    assert [config.rank_of(path) for path in ("blocks.1", "blocks.10", "my.blocks.1")] == [2, 4, 16]
    config = SerialLoraConfig(targets=r"blocks\.1", exclude=None)
    assert [config.selects(path) for path in ("blocks.1", "blocks.10", "x.blocks.1")] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, [0, 1, 2, 10]),
        ({"layers": 1}, [1]),
        ({"layers": [0, 10]}, [0, 10]),
        ({"layers": range(2)}, [0, 1]),
        ({"targets": [r".*\.1\..*", r".*\.2\..*"]}, [1, 2]),
        ({"exclude": r".*\.1\..*"}, [0, 2, 10]),
        ({"targets": r"blocks\.\d\.attn", "exclude": r".*\.0\..*", "layers": (0, 1, 10)}, [1]),
    ],
)
def test_targets_exclude_and_layers_choose_sites_together(settings, chosen):
    config = SerialLoraConfig(**settings)
    assert [n for n in (0, 1, 2, 10) if config.selects(f"blocks.{n}.attn")] == chosen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": 2.0}, "got 2.0"),
        ({"rank": True}, "got True"),
        ({"rank": "8"}, "got '8'"),
        ({"rank_pattern": {"a": 0}}, "got 0 for 'a'"),
        ({"alpha": math.nan}, "alpha must be a finite number or None; got nan"),
        ({"alpha": "1"}, "got '1'"),
        ({"alpha_pattern": {"a": math.inf}}, "got inf for 'a'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": math.nan}, "got nan"),
        ({"dropout": "0.1"}, "got '0.1'"),
        ({"init": "zeros"}, "init must be one of kaiming, gaussian, gradient; got 'zeros'"),
        ({"targets": "("}, "is not a regular expression"),
        ({"exclude": ["a", "[z-a]"]}, "is not a regular expression"),
        ({"targets": [1]}, r"targets must be None, or one or several of str; got \(1,\)"),
        ({"rank_pattern": {"*": 1}}, "is not a regular expression"),
        ({"layers": "1"}, r"layers must be None, or one or several of int; got \('1',\)"),
        ({"layers": 0.5}, r"layers .* got \(0.5,\)"),
        ({"inputs": [1]}, r"inputs .* of str; got \(1,\)"),
        ({"inputs": {"hidden_states": 1}}, "inputs must be None, or one or several of str"),
        ({"layers": True}, r"layers .* got \(True,\)"),
        ({"rank": 10**30}, "rank must be at most 65536"),
        ({"rank_pattern": [["a", 2]]}, "rank_pattern must map regular expressions of sites to numbers"),
        ({"alpha_pattern": None}, "alpha_pattern must map"),
        ({"rank_pattern": {1: 2}}, "1 is not a regular expression"),
        ({"alpha": 10**400}, "alpha must be a finite number"),
        ({"alpha": True}, "alpha must be a finite number or None; got True"),
        ({"dropout": False}, "dropout must lie in"),
        ({"rslora": 1}, "rslora must be True or False; got 1"),
        ({"init": ["kaiming"]}, r"init must be one of .* got \['kaiming'\]"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings, message):
    with pytest.raises(SerialLoraError, match=message):
        SerialLoraConfig(**settings)


def test_a_message_is_one_line_however_long_or_odd_what_it_quotes():
    with pytest.raises(SerialLoraError) as raised:
        SerialLoraConfig(inputs={f"a\n\x1b[31m{i}": i for i in range(5000)})  # pyright: ignore[reportArgumentType]
    message = str(raised.value)
    assert message.isprintable() and 50 < len(message) <= 1000
    assert message.startswith("inputs must be None")


def test_an_unknown_setting_is_a_type_error():
    with pytest.raises(TypeError, match="ranks"):
        SerialLoraConfig(ranks=8)  # pyright: ignore[reportCallIssue]


def test_settings_of_a_newer_version_are_warned_of_and_dropped():
    with pytest.warns(UserWarning, match="does not know dora, lasso"):
        config = SerialLoraConfig.from_dict({"rank": 4, "dora": True, "lasso": 1})
    assert config == SerialLoraConfig(rank=4)
