"""Every option of every recipe stands once, has bounds, can be written down and read back, and is told when wrong."""

from __future__ import annotations

import contextlib
import math
from dataclasses import fields

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slora_diffusers import SerialLoraConfig
from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import (
    clip,
    dit,
    dreambooth_flux,
    dreambooth_pixart,
    dreambooth_sd3,
    vit_classification,
    vit_segmentation,
)
from slora_diffusers.training.diffusion.text_to_image import TextToImageOptions
from slora_diffusers.training.options import BaseOptions, parse
from slora_diffusers.training.parsing import FREE, REFUSED, WARNED, save_options, specs_of

RECIPES = {
    "dit": dit.Options,
    "sd3": dreambooth_sd3.Options,
    "flux": dreambooth_flux.Options,
    "pixart": TextToImageOptions,
    "classification": vit_classification.Options,
    "segmentation": vit_segmentation.Options,
    "clip": clip.Options,
}
assert dreambooth_pixart.TextToImageOptions is TextToImageOptions
NEEDED = {"pretrained_model_name_or_path": "base", "label_map": "labels.json"}
OPTIONS = [(recipe, name) for recipe, cls in RECIPES.items() for name in specs_of(cls)]
NUMBERS = [(r, n) for r, n in OPTIONS if specs_of(RECIPES[r])[n][1].scalar in (int, float)]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)


def needed(cls):
    return [part for name, value in NEEDED.items() if name in specs_of(cls) for part in (f"--{name}", value)]


def interval(within):
    low, high = (float(end) for end in within[1:-1].split(","))
    return low, high, within[0] == "[", within[-1] == "]"


@st.composite
def values(draw, spec, kind):
    """A value that an option may have."""
    if kind.scalar is bool:
        return draw(st.booleans())
    if spec.choices is not None:
        one = st.sampled_from(sorted(spec.choices))
    elif kind.scalar is str:
        one = (
            TEXT.map(spec.convert)
            if spec.convert
            else TEXT | st.sampled_from(["no", "1e-4", "null", "~", "12:30", "0x1F"])
        )
    else:
        low, high, closed_low, closed_high = interval(spec.within)
        low, high = max(low, -1e6), min(high, 1e6)
        if kind.scalar is int:
            one = st.integers(math.ceil(low) + (not closed_low), math.floor(high) - (not closed_high))
        else:
            one = st.floats(low, high, exclude_min=not closed_low, exclude_max=not closed_high)
    if kind.shape == "a list":
        return draw(st.lists(one, min_size=1, max_size=3))
    if kind.shape == "a mapping":
        return draw(st.dictionaries(TEXT, one, min_size=1, max_size=3))
    return draw(one)


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_a_run_wrote_down_reads_back_to_the_same_values(recipe, data, tmp_path_factory):
    cls = RECIPES[recipe]
    specs = specs_of(cls)
    chosen = data.draw(st.lists(st.sampled_from(sorted(specs)), max_size=12, unique=True))
    given_values = {n: data.draw(values(*specs[n][:2]), label=n) for n in chosen if n not in ("use_8bit_adam", "seed")}
    missing = {name: value for name, value in NEEDED.items() if name in specs and name not in given_values}
    options = cls(**given_values, **missing)
    path = tmp_path_factory.mktemp("options") / "config.yaml"
    save_options(options, path)
    again = parse(cls, "", ["--config", str(path)])
    for name, (spec, _, default) in specs.items():
        assert getattr(again, name) == (default if spec.secret else getattr(options, name)), name
    assert parse(cls, "", ["--config", str(path)]) == again


@pytest.mark.parametrize(
    "text", ["\x85", "a\u2028b", "a \u2029", "two\nlines", "a\rb", "\ufeff", " ", "#", "~", "1e-4", "no"]
)
def test_texts_that_yaml_would_change_read_back(text, tmp_path):
    options = RECIPES["dit"](pretrained_model_name_or_path="base", output_dir=text, logging_dir=text)
    save_options(options, tmp_path / "config.yaml")
    assert parse(RECIPES["dit"], "", ["--config", str(tmp_path / "config.yaml")]) == options


@pytest.mark.parametrize(("recipe", "name"), NUMBERS)
def test_every_number_has_its_bounds_and_is_refused_outside_of_them_by_flag_and_by_file(recipe, name, tmp_path):
    cls = RECIPES[recipe]
    spec, kind, default = specs_of(cls)[name]
    assert spec.within, f"{name} has no bounds"
    low, high, closed_low, closed_high = interval(spec.within)
    if default is not None:
        assert (default > low or (closed_low and default == low)) and (
            default < high or (closed_high and default == high)
        )
    wrong = [] if math.isinf(low) else [low - 1] if closed_low else [low, low - 1]
    wrong += [] if math.isinf(high) else [high + 1] if closed_high else [high]
    texts = [f"{int(n)}" if kind.scalar is int else f"{n}" for n in wrong]
    texts += ["9" * 400] if kind.scalar is int else ["nan", "inf", "-inf", "1e999"]
    for text in texts:
        flag = f"key={text}" if kind.shape == "a mapping" else text
        with pytest.raises(SerialLoraError, match=name), contextlib.redirect_stderr(None):
            parse(cls, "", [*needed(cls), f"--{name}={flag}"])
        (tmp_path / "c.yaml").write_text(f"{name}: {{key: {text}}}" if kind.shape == "a mapping" else f"{name}: {text}")
        with pytest.raises(SerialLoraError, match=name):
            parse(cls, "", [*needed(cls), "--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_says_what_it_does_and_what_a_resume_may_do_to_it(recipe, capsys):
    specs = specs_of(RECIPES[recipe])
    flags = [flag for name, (spec, _, _) in specs.items() for flag in (name, *spec.aliases)]
    assert len(set(flags)) == len(flags)
    for name, (spec, _, _) in specs.items():
        assert spec.help.endswith("."), name
        assert spec.resume in (FREE, WARNED, REFUSED)
    with pytest.raises(SystemExit):
        parse(RECIPES[recipe], "What it does.", ["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{flag}" in shown for flag in flags)


def test_an_option_of_one_name_is_of_one_type_everywhere():
    kinds: dict[str, set] = {}
    for recipe, name in OPTIONS:
        kinds.setdefault(name, set()).add(specs_of(RECIPES[recipe])[name][1])
    assert {name for name, found in kinds.items() if len(found) > 1} == set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_set_every_field_of_the_adapters_config(recipe):
    cls = RECIPES[recipe]
    assert issubclass(cls, BaseOptions)
    assert {field.name for field in fields(SerialLoraConfig)} <= set(specs_of(cls))
    argv = ["--rank", "3", "--alpha", "6", "--dropout", "0.5", "--rslora", "--init", "gaussian", "--inputs", "a", "b"]
    argv += ["--targets", "x.*", "--exclude", "y", "--layers", "0", "2", "--rank_pattern", "x.*=2", "y=z=4"]
    config = parse(cls, "", [*needed(cls), *argv, "--alpha_pattern", "x.*=1.5"]).config()
    assert config == SerialLoraConfig(
        3, 6.0, 0.5, ("a", "b"), ("x.*",), ("y",), (0, 2), {"x.*": 2, "y=z": 4}, {"x.*": 1.5}, True, "gaussian"
    )


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("output_dir: 1e-4", "output_dir", "1e-4"),
        ('output_dir: "1e-4"', "output_dir", "1e-4"),
        ("output_dir: no", "output_dir", "no"),
        ("output_dir: 12:30", "output_dir", "12:30"),
        ("output_dir: 007", "output_dir", "007"),
        ('output_dir: "null"', "output_dir", "null"),
        ("output_dir: 2001-01-01", "output_dir", "2001-01-01"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ('learning_rate: "1e-4"', "learning_rate", 1e-4),
        ("rank: 010", "rank", 10),
        ("targets: a.*", "targets", ["a.*"]),
        ("targets: [a, 'b', 1]", "targets", ["a", "b", "1"]),
        ("rank_pattern: {a: 3}", "rank_pattern", {"a": 3}),
        ("rank_pattern:\n  a.*: 3\n  b: 4", "rank_pattern", {"a.*": 3, "b": 4}),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("rank: ~", "rank", 16),
        ("\ufeffrank: 3", "rank", 3),
        ("{rank: 3}", "rank", 3),
    ],
)
def test_a_files_values_mean_what_they_show(text, name, value, tmp_path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    options = parse(dit.Options, "", [*needed(dit.Options), "--config", str(tmp_path / "c.yaml")])
    assert getattr(options, name) == value and type(getattr(options, name)) is type(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rank: 3\nrank: 4", "rank is given twice"),
        (b"alpha: 3\nlora_alpha: 4", "alpha is given twice"),
        (b"learning-rate: 1\nlearning_rate: 2", "learning_rate is given twice"),
        (b"rank_pattern: {a: 3, a: 4}", "a key is given twice"),
        ("rank: 3".encode("utf-16"), "UTF-16 or binary; save it as UTF-8"),
        ("rank: 3".encode("utf-16-le"), "UTF-16 or binary; save it as UTF-8"),
        ("output_dir: Zürich".encode("latin-1"), "is not UTF-8 text"),
        (b"[" * 3000, "not YAML|nested too deeply"),
        (b"rank: 8.0", "rank cannot be '8.0'"),
        (b"rank: [8]", "rank cannot be a list"),
        (b"rank: {a: 8}", "rank cannot be a mapping"),
        (b"rank: !!python/object/apply:os.getpid []", "means nothing here|cannot be"),
        (b"rank_pattern: 3", "must be a mapping"),
        (b"targets: []", "the list is empty"),
        (b"targets: [a, ~]", "not a single value"),
        (b"? [a]\n: 3", "an option's name is a word"),
        (b"a: 1\n---\nb: 2", "is not YAML"),
        (b"", "got nothing"),
        (b"#" * (1 << 21), "a file of options has fewer"),
        (b"<<: {rank: 3}", "unknown option '<<'"),
        (b"use_ema: yes", "use_ema must be true or false; got 'yes'"),
    ],
    ids=range(21),
)
def test_a_file_that_could_be_misread_is_refused_in_one_sentence(content, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(SerialLoraError, match=message):
        parse(dit.Options, "", [*needed(dit.Options), "--config", str(tmp_path / "c.yaml")])


def test_a_folder_is_no_file_of_options(tmp_path):
    with pytest.raises(SerialLoraError, match="there is no such file"):
        parse(dit.Options, "", [*needed(dit.Options), "--config", str(tmp_path)])


def test_a_seed_of_minus_one_is_any_and_is_printed(capsys):
    seeds = [parse(dit.Options, "", [*needed(dit.Options), "--seed", "-1"]).seed for _ in range(4)]
    assert len(set(seeds)) == 4 and all(seed >= 0 for seed in seeds)
    assert capsys.readouterr().out.splitlines() == [f"--seed {seed} was drawn" for seed in seeds]


def test_a_token_is_in_no_file(tmp_path):
    options = parse(dit.Options, "", [*needed(dit.Options), "--hub_token", "secret"])
    save_options(options, tmp_path / "c.yaml")
    assert "hub_token" not in yaml.safe_load((tmp_path / "c.yaml").read_text())
