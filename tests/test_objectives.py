"""Objectives of one's own: they change the loss, weigh samples or ask the model twice; and what is built in."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.recipes import dit
from slora_diffusers.training.diffusion.objectives import Objective, objective_for
from slora_diffusers.training.diffusion.processes import COMPARISONS, process_for
from slora_diffusers.training.randomness import generators

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
DOCS = Path(__file__).parents[1] / "docs" / "training.md"


def options(*argv):
    return dit.parse(dit.Options, "", ["--pretrained_model_name_or_path", "x", *argv])


def train(base, out, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out), "--glyphs", "script"]
    argv += ["--glyph_variations", "1", "--train_batch_size", "2", "--rank", "4", "--max_train_steps", "3"]
    path = dit.main([*argv, "--validation_steps", "0", "--checkpointing_steps", "0", *flags])
    return path, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def examples():
    """{class: code} of the docs."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    return {m[1]: block for block in blocks if (m := re.search(r"^class (\w+)\(Objective\)", block, re.M))}


def test_the_docs_examples_are_at_most_fifteen_lines_and_train(dit_base, tmp_path):
    found = examples()
    assert set(found) == {"Charbonnier", "KeepTheBase"}
    _, plain = train(dit_base, tmp_path / "plain")
    for name, code in found.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        (tmp_path / "mine.py").write_text(code)
        _, log = train(dit_base, tmp_path / name, "--objective", f"{tmp_path}/mine.py:{name}")
        assert all(torch.isfinite(torch.tensor(line["loss"])) for line in log)
        assert log[0]["loss"] != plain[0]["loss"] or name == "KeepTheBase"  # which begins where the base is


def test_keeping_the_base_pulls_what_is_trained_towards_it(dit_base, tmp_path):
    (tmp_path / "mine.py").write_text(examples()["KeepTheBase"])
    flags = ["--learning_rate", "1e-2", "--max_train_steps", "15"]
    sizes = []
    for weight in ("0", "100"):
        own = ["--objective", f"{tmp_path}/mine.py:KeepTheBase", "--objective_args", f"weight={weight}"]
        path, _ = train(dit_base, tmp_path / weight, *flags, *own)
        tensors = load_file(path)
        sizes.append(sum((t**2).sum() for key, t in tensors.items() if "lora_B" in key))
        if weight == "0":
            plain, _ = train(dit_base, tmp_path / "plain", *flags)
            assert all(load_file(plain)[key].equal(tensors[key]) for key in tensors)
    assert sizes[1] < 0.5 * sizes[0]


WEIGHTED = '''
from dataclasses import dataclass
import torch
from slora_diffusers.training.diffusion.objectives import Objective

@dataclass(frozen=True)
class Weighted(Objective):
    """Pixels on the left alone, and samples by the number of their class."""
    calls = []
    power: float = 1.0

    def loss(self, prediction, target, noised):
        half = prediction.shape[-1] // 2
        weight = torch.tensor([float(item.label) ** self.power for item in noised.batch.items])
        loss = weight * ((prediction - target)[..., :half] ** 2).flatten(1).mean(1)
        self.calls.append((prediction.detach(), target, weight, loss.detach()))
        return loss
'''


def test_weights_and_masks_of_a_class_of_ones_own_reach_the_loss_that_is_logged(dit_base, tmp_path):
    (tmp_path / "weighted.py").write_text(WEIGHTED)
    flags = ["--objective", f"{tmp_path}/weighted.py:Weighted", "--objective_args", "power=2"]
    _, log = train(dit_base, tmp_path / "out", *flags)
    calls = sys.modules["objective_weighted"].Weighted.calls
    assert len(calls) == 3
    for (prediction, target, weight, _), line in zip(calls, log, strict=True):
        half = target.shape[-1] // 2
        error = ((prediction.double() - target.double())[..., :half] ** 2).mean(dim=(1, 2, 3))
        assert line["loss"] == pytest.approx((weight.double() * error).mean().item(), rel=1e-5)


@pytest.mark.parametrize("adapter", ["serial", "lora"])
def test_the_model_without_its_adapter_is_the_base_to_the_bit(adapter, dit_base, tmp_path):
    (tmp_path / "twice.py").write_text(
        "from slora_diffusers.training.diffusion.objectives import Objective\n"
        "class Twice(Objective):\n    seen = []\n"
        "    def losses(self, model, noised):\n        output = model(noised)\n"
        "        self.seen.append((noised, output.detach(), model.base(noised)))\n"
        "        return self.compare(output, noised)\n"
    )
    flags = ["--objective", f"{tmp_path}/twice.py:Twice", "--adapter", adapter, "--learning_rate", "1e-1"]
    train(dit_base, tmp_path / "out", *flags, "--label_dropout", "0")
    transformer = dit.DiTTransformer2DModel.from_pretrained(dit_base / "transformer").eval()
    seen = sys.modules["objective_twice"].Twice.seen
    for number, (noised, ours, reference) in enumerate(seen):
        labels = torch.tensor([item.label for item in noised.batch.items])
        with torch.no_grad():
            expected = transformer(noised.xt, timestep=noised.timesteps, class_labels=labels).sample
        torch.testing.assert_close(reference, expected)
        assert torch.allclose(ours, expected, atol=1e-5) == (number == 0)


def test_a_base_that_is_gone_is_an_error(dit_base, tmp_path):
    (tmp_path / "mine.py").write_text(examples()["KeepTheBase"])
    with pytest.raises(SerialLoraError, match="this objective needs it"):
        train(dit_base, tmp_path / "out", "--objective", f"{tmp_path}/mine.py:KeepTheBase", "--adapter", "full")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "huber"], "must be auto, .*FILE.py:CLASS"),
        (["--objective", "nowhere.py:Thing"], "cannot be loaded"),
        (["--objective", "nowhere:Thing"], "cannot be loaded"),
        (["--objective", "json:JSONDecoder"], "has no class JSONDecoder that inherits Objective"),
        (["--objective_args", "c=1"], "Objective has no such setting; it has: none"),
        (["--logit_mean", "1"], "logit_mean shapes the times and weights of flows"),
        (["--weighting_scheme", "cosmap"], "--weighting_scheme shapes"),
        (["--min_timestep", "900", "--max_timestep", "100"], "no times are drawn between timesteps 900 and 100"),
    ],
)
def test_a_setting_that_no_objective_knows_is_an_error(flags, message):
    with pytest.raises(SerialLoraError, match=message):
        objective_for(DDIMScheduler(), options(*flags)).process.stratified_times(2)


MISTAKEN = {
    "a mean over the batch": ("def loss(self, p, t, noised): return ((p - t) ** 2).mean()",
                              r"Mistaken.loss\(\) must return one loss per sample, .*\(2,\); it returned shape \(\)"),
    "no mean at all": ("def loss(self, p, t, noised): return (p - t) ** 2", r"it returned shape \(2, 4, "),
    "a float": ("def loss(self, p, t, noised): return 1.0", "it returned a float"),
    "a mean of the model's": ("def losses(self, model, noised): return self.compare(model(noised), noised).mean()",
                              r"Mistaken.losses\(\) must return one loss per sample"),
    "no gradient": ("def loss(self, p, t, noised): return ((p - t) ** 2).detach().flatten(1).mean(1)", "no gradient"),
    "no total": ("def total(self, losses, batch): return losses", r"total\(\) returned a tensor of shape \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKEN)
def test_a_loss_that_is_not_one_number_per_sample_is_an_error(mistake, dit_base, tmp_path):
    method, message = MISTAKEN[mistake]
    imports = "from slora_diffusers.training.diffusion.objectives import Objective\n"
    (tmp_path / "mistaken.py").write_text(f"{imports}class Mistaken(Objective):\n    {method}\n")
    with pytest.raises(SerialLoraError, match=message):
        train(dit_base, tmp_path / "out", "--objective", f"{tmp_path}/mistaken.py:Mistaken")


SETTINGS = """
from dataclasses import dataclass
from slora_diffusers.training.diffusion.objectives import Objective

@dataclass(frozen=True)
class Settings(Objective):
    width: float = 1
    hard: bool = False
    name: str = "a"

class Forgotten(Objective):
    width: float = 1.0
"""


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        ("Settings", "width=0.5", 0.5),
        ("Settings", "width=wide", "width must be a number, as its default 1 is; got 'wide'"),
        ("Settings", "width=True", "width must be a number"),
        ("Settings", "width=0,5", "width must be a number"),
        ("Settings", "hard=True", True),
        ("Settings", "hard=1", "hard must be True or False"),
        ("Settings", "hard=false", "hard must be True or False"),
        ("Settings", "name=7", "7"),
        ("Settings", "widht=1", "Settings has no such setting; it has: width, hard, name"),
        ("Forgotten", "width=2", "it has: none. Put @dataclass"),
    ],
)
def test_a_setting_is_of_the_kind_of_its_default(kind, given, wanted, tmp_path):
    (tmp_path / "settings.py").write_text(SETTINGS)
    flags = options("--objective", f"{tmp_path}/settings.py:{kind}", "--objective_args", given)
    if wanted in (0.5, True, "7"):
        assert getattr(objective_for(DDIMScheduler(), flags), given.partition("=")[0]) == wanted
    else:
        with pytest.raises(SerialLoraError, match=wanted):
            objective_for(DDIMScheduler(), flags)


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("c", [0.05, 1.0])
def test_each_comparison_is_its_formula(name, c):
    p, t = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    difference = p - t
    expected = {
        "l2": difference**2,
        "l1": difference.abs(),
        "huber": 2 * c * ((difference**2 + c**2).sqrt() - c),  # as kohya's scripts
        "smooth_l1": 2 * ((difference**2 + c**2).sqrt() - c),
    }[name]
    objective = objective_for(DDIMScheduler(), options("--loss_type", name, "--huber_c", str(c)))
    without = types.SimpleNamespace(mask=None)
    torch.testing.assert_close(objective.loss(p, t, without), expected.mean(dim=(1, 2, 3)))
    mask = torch.rand(3, 1, 5, 5, dtype=torch.float64)
    masked = (mask * expected).sum(dim=(1, 2, 3)) / (4 * mask.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(objective.loss(p, t, types.SimpleNamespace(mask=mask)), masked)


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 700), (0, 50), (950, 1000)])
@pytest.mark.parametrize("kind", ["diffusion", "uniform", "logit_normal", "mode"])
def test_a_range_of_timesteps_is_the_distribution_inside_it(kind, low, high):
    """Against sampling the whole distribution and throwing away what lies outside."""
    scheduler = DDIMScheduler() if kind == "diffusion" else FlowMatchEulerDiscreteScheduler(shift=3.0)
    more = {} if kind == "diffusion" else {"density": kind}
    whole = process_for(scheduler, **more)
    part = process_for(scheduler, **more, between=(float(low), float(high)))
    everywhere = whole.timesteps(whole.stratified_times(2_000_000)).double()
    inside = everywhere[(everywhere >= low) & (everywhere < high)]
    drawn = part.timesteps(part.sample_times(generators(0, "times", 0, range(3000)))).double()
    assert drawn.min() >= low - 1e-3 and drawn.max() <= high
    at = torch.linspace(0.05, 0.95, 15, dtype=torch.float64)
    torch.testing.assert_close(drawn.quantile(at), inside.quantile(at), atol=0.05 * (high - low), rtol=0)


def test_noise_offset_is_one_number_per_channel(dit_base):
    class Still:
        """A batch whose noise is known."""

        prior, masks = torch.zeros(64, dtype=torch.bool), None

        def noise(self, like):
            return torch.zeros_like(like)

        def draws(self, purpose):
            return generators(0, purpose, 0, range(64))

    objective = objective_for(DDIMScheduler(), options("--noise_offset", "0.5"))
    noise = objective.draw(torch.zeros(64, 4, 6, 6), Still()).noise
    assert (noise - noise[:, :, :1, :1]).abs().max() == 0
    assert abs(noise[:, :, 0, 0].std().item() - 0.5) < 0.06


def test_the_log_has_the_loss_by_range_of_timesteps(dit_base, tmp_path):
    flags = ["--max_train_steps", "8", "--train_batch_size", "1", "--weighting_scheme", "uniform"]
    _, log = train(dit_base, tmp_path, *flags, "--max_timestep", "499")
    assert {name for line in log for name in line if name.startswith("loss/")} == {"loss/t0-250", "loss/t250-500"}
    for line in log:
        assert [line[name] for name in line if name.startswith("loss/")] == pytest.approx([line["loss"]], rel=1e-5)


def test_auto_is_the_process_and_its_plain_loss():
    objective = objective_for(FlowMatchEulerDiscreteScheduler(), options("--objective", "auto"))
    assert type(objective) is Objective and objective.loss_type == "l2"
