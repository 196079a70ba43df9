"""Options from flags and files, and optimizers by name."""

import types
from dataclasses import dataclass

import pytest
import torch

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.training.diffusion.objectives import process_settings
from slora_diffusers.training.diffusion.processes import RectifiedFlow
from slora_diffusers.training.optim import evaluation_weights, make_optimizer, optimizer_class, parameter_groups
from slora_diffusers.training.options import CommonOptions, ObjectiveOptions, OptimizerOptions, parse
from slora_diffusers.training.parsing import save_options
from slora_diffusers.training.precision import check_trainables_fp32, quantization_config
from slora_diffusers.training.preflight import check_options

NEEDED = ["--pretrained_model_name_or_path", "base"]


@dataclass(frozen=True)
class Losses(ObjectiveOptions, OptimizerOptions):
    """Some of the options."""


def options(*argv):
    return parse(CommonOptions, "test", argv)


def config_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_gives_options_flags_beside_it_win_and_what_was_used_reads_back_the_same(tmp_path):
    text = "pretrained_model_name_or_path: base\nrank: 8\nlearning-rate: 1e-3\nlayers: [0, 2]\nuse_ema: true\n"
    used = options("--config", config_file(tmp_path, text), "--rank", "4")
    assert (used.rank, used.learning_rate, used.layers, used.use_ema) == (4, 1e-3, [0, 2], True)
    assert used.config().layers == (0, 2)
    save_options(used, tmp_path / "used.yaml")
    assert options("--config", str(tmp_path / "used.yaml")) == used


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--precondition_outputs", "1"], "is a switch here"),
        (["--prodigy_beta3", "0.9"], "--prodigy_beta3 of diffusers' script is not here"),
        (["--lora_blocks", "12"], "--layers"),
    ],
)
def test_flags_of_diffusers_script_that_mean_something_else_are_explained(argv, message):
    with pytest.raises(SerialLoraError, match=message):
        parse(Losses, "test", argv)


def test_yaml_truth_values_mean_what_was_written(tmp_path):
    text = "pretrained_model_name_or_path: base\nmixed_precision: no\n"
    assert options("--config", config_file(tmp_path, text)).mixed_precision == "no"
    with pytest.raises(SerialLoraError, match="did you mean scale_lr"):
        options("--config", config_file(tmp_path, "pretrained_model_name_or_path: base\nno-scale_lr: true\n"))


def test_schedules_that_need_more_than_flags_can_say_are_not_offered(capsys):
    with pytest.raises(SystemExit):
        options(*NEEDED, "--lr_scheduler", "piecewise_constant")
    assert "invalid choice" in capsys.readouterr().err


def test_the_names_of_diffusers_scripts_mean_the_same_as_flags_and_in_files(tmp_path):
    text = "pretrained_model_name_or_path: base\nlora_dropout: 0.1\n"
    used = options("--config", config_file(tmp_path, text), "--lora_alpha", "4")
    assert (used.dropout, used.alpha) == (0.1, 4.0)


@pytest.mark.parametrize(
    ("scheme", "density", "weighting"),
    [("mode", "mode", "none"), ("none", "uniform", "none"), ("cosmap", "uniform", "cosmap")],
)
def test_a_weighting_scheme_draws_times_or_weighs_them(scheme, density, weighting):
    settings = process_settings(parse(Losses, "test", ["--weighting_scheme", scheme]))
    process = RectifiedFlow(lambda u: u, **settings)
    assert (process.density, process.weighting) == (density, weighting)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 8", "unknown option 'rnak'; did you mean rank"),
        ("rank: many", "rank cannot be 'many'"),
        ("rank: true", "rank cannot be True"),
        ("use_ema: 3", "use_ema must be true or false"),
        ("adapter: serail", "adapter must be one of serial, lora, full"),
        ("- rank", "option: value"),
        ("rank: [8", "is not YAML"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(SerialLoraError, match=message):
        options("--config", config_file(tmp_path, text), *NEEDED)
    with pytest.raises(SerialLoraError, match="no such file"):
        options("--config", str(tmp_path / "none.yaml"), *NEEDED)


def test_a_token_is_never_written_down(tmp_path):
    save_options(options(*NEEDED, "--hub_token", "secret"), tmp_path / "used.yaml")
    assert "secret" not in (tmp_path / "used.yaml").read_text()


def test_an_unknown_flag_ends_the_program(capsys):
    with pytest.raises(SystemExit):
        options(*NEEDED, "--rnak", "3")
    assert "--rnak" in capsys.readouterr().err


def test_a_key_that_flags_give_twice_ends_the_program(capsys):
    with pytest.raises(SystemExit):
        options(*NEEDED, "--rank_pattern", "a=1", "b=2", "a=3")
    assert "--rank_pattern: a key is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_train_steps", "0"], "max_train_steps must be at least 1"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--run_name", "../elsewhere"], "leads out of --logging_dir"),
        (["--run_name", "/elsewhere"], "leads out of --logging_dir"),
        (["--adapter", "full", "--quantize", "nf4"], "is for frozen ones"),
    ],
)
def test_numbers_out_of_range_and_contradictions_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr("slora_diffusers.training.preflight.quantization_config", lambda *_: None)
    with pytest.raises(SerialLoraError, match=message):
        check_options(options(*NEEDED, *flags))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    packages = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}
    with monkeypatch.context() as patch:
        patch.setattr("importlib.import_module", missing)
        for name, package in packages.items():
            with pytest.raises(SerialLoraError, match=f"pip install {package}"):
                optimizer_class(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SerialLoraError, match="pip install bitsandbytes"):
        quantization_config("nf4", torch.float32)
    with pytest.raises(SerialLoraError, match="adamw, adamw8bit"):
        optimizer_class("adamx")


def matrices():
    return [("block.lora_A_default", torch.nn.Parameter(torch.ones(2, 3))),
            ("block.lora_B_default", torch.nn.Parameter(torch.ones(3, 2)))]  # fmt: skip


def test_lora_plus_moves_b_by_the_ratio_and_a_by_the_rate():
    named = matrices()
    optimizer = make_optimizer("sgd", parameter_groups(named, 0.01, 16.0), (0.9, 0.999), 0.0, 1e-8)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(named[0][1].data, torch.full((2, 3), 1 - 0.01))
    torch.testing.assert_close(named[1][1].data, torch.full((3, 2), 1 - 0.16))
    with pytest.raises(SerialLoraError, match="needs an adapter"):
        parameter_groups([("weight", torch.nn.Parameter(torch.ones(1)))], 0.01, 16.0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit", "schedulefree", "prodigy"])
def test_every_optimizer_comes_down_a_parabola(name):
    try:
        optimizer_class(name)
    except SerialLoraError as error:
        pytest.skip(str(error))
    x = torch.nn.Parameter(torch.full((4096,), 3.0))
    lr = {"prodigy": 1.0, "sgd": 0.1}.get(name, 0.05)
    optimizer = make_optimizer(name, parameter_groups([("x", x)], lr), (0.9, 0.99), 0.0, 1e-8)
    for _ in range(120):
        optimizer.zero_grad()
        (x**2).sum().div(2).backward()
        optimizer.step()
    with evaluation_weights(optimizer):
        assert x.abs().max() < 1.0


def test_schedule_free_weights_are_swapped_in_and_back():
    schedulefree = pytest.importorskip("schedulefree")
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = schedulefree.AdamWScheduleFree([x], lr=0.1)
    optimizer.train()
    for _ in range(5):
        x.grad = x.detach().clone()
        optimizer.step()
    training = x.detach().clone()
    with evaluation_weights(optimizer):
        assert not torch.equal(x, training)
    torch.testing.assert_close(x.detach(), training)


def test_trained_weights_in_half_precision_are_refused():
    check_trainables_fp32(matrices())
    with pytest.raises(SerialLoraError, match=r"w \(torch.bfloat16\)"):
        check_trainables_fp32([("w", types.SimpleNamespace(dtype=torch.bfloat16))])
