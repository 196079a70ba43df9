"""Two processes find the start that one finds with all their samples: by themselves, under DDP, sharded, in recipes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training_distributed import ROOT, SCRIPT, TORCHRUN, WEIGHTS, base, flags, run  # noqa: F401  a fixture

pytestmark = pytest.mark.slow


def assert_same_spans(ours, theirs, tolerance=1e-3):
    assert ours.keys() == theirs.keys()
    for key, A in theirs.items():
        if "lora_A" in key:
            overlap = torch.linalg.svdvals(ours[key].double() @ A.double().mT) / A.double().norm(dim=1).square().mean()
            assert overlap.min() > 1 - tolerance, key
        else:
            assert not ours[key].any() and not A.any()


@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp2"])
def test_two_processes_find_what_one_finds(how, tmp_path):
    worker = str(ROOT / "tests" / "initialise_worker.py")
    two = run(*TORCHRUN, worker, str(tmp_path / "two"), "2", how)
    assert two.returncode == 0, two.stderr[-3000:]
    one = run(worker, str(tmp_path / "one"), "1", how)
    assert one.returncode == 0, one.stderr[-3000:]
    folders = ["."] if how == "fsdp2" else ["0", "1"]
    found = [load_file(tmp_path / "two" / folder / WEIGHTS) for folder in folders]
    assert_same_spans(found[0], load_file(tmp_path / "one" / folders[0] / WEIGHTS))
    # Pairs that no gradient reaches keep what each process has drawn: training's own wrapper makes them one.
    started = [key for key, A in found[0].items() if "lora_A" in key and _orthogonal(A)]
    assert started and all(other[key].equal(found[0][key]) for other in found for key in started)


def _orthogonal(A):
    return torch.allclose(A @ A.mT, torch.eye(len(A)) / 3, atol=1e-5)


def test_a_recipe_of_two_processes_starts_as_one_at_the_same_global_batch(base, tmp_path):  # noqa: F811
    options = {"init": "gradient", "init_batches": 2, "max_train_steps": 1, "learning_rate": 0, "validation_steps": 0}
    two = run(*TORCHRUN, *SCRIPT, *flags(base, tmp_path / "two", 3, **options))
    assert two.returncode == 0, two.stderr[-3000:]
    one = run(*SCRIPT, *flags(base, tmp_path / "one", 6, **options))
    assert one.returncode == 0, one.stderr[-3000:]
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("two", "one"))
    assert_same_spans(ours, theirs)


def test_a_new_head_is_warmed_up_by_two_processes_as_by_one(vit_base, stripes, tmp_path):
    script = str(ROOT / "train_scripts" / "train_vit_classification.py")
    common = ["--pretrained_model_name_or_path", str(vit_base), "--train_data_dir", str(stripes), "--rank", "4"]
    common += ["--max_train_steps", "1", "--learning_rate", "0", "--head_learning_rate", "0", "--validation_steps", "0"]
    common += ["--init", "gradient", "--init_batches", "2", "--smallest_crop", "1"]
    for count, launch in ((2, TORCHRUN), (1, [])):
        out = ["--output_dir", str(tmp_path / str(count)), "--train_batch_size", str(8 // count)]
        done = run(*launch, script, *common, *out)
        assert done.returncode == 0, done.stderr[-3000:]
    two, one = (load_file(tmp_path / name / WEIGHTS) for name in ("2", "1"))
    assert all(not tensors[f"head.{name}"].any() for tensors in (two, one) for name in ("weight", "bias"))
    pairs = [{key: A for key, A in tensors.items() if "lora" in key} for tensors in (two, one)]
    assert_same_spans(*pairs, tolerance=0.02)
