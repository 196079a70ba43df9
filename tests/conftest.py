"""One thread per test process, a fixed seed per test, and no network: what a test needs, it builds."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.graphs import fresh_dynamo  # noqa: F401  fixture
from tests.tiny_runs import dit_base, text_bases  # noqa: F401  fixtures
from tests.vision_recipes import scenes, stripes, vit_base  # noqa: F401  fixtures

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerator():
    """Let every run of a test choose its own precision and processes: accelerate keeps them for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
