"""Random walks over everything that can be done to a model; `--hypothesis-seed` and the printed steps repeat one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.walks.neighbours import WalkAmongOthers, WalkCompiled

pytestmark = [
    pytest.mark.filterwarnings("ignore:The adapter was trained on"),  # a walk loads other checkpoints
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # a fault inside a destructor
]
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.parametrize(("walk", "count"), [(WalkAmongOthers, 195), (WalkCompiled, 5)])
def test_walks_give_the_outputs_of_the_float64_model(walk, count):
    run_state_machine_as_test(
        walk, settings=settings(**QUIET, max_examples=count, stateful_step_count=12, derandomize=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("walk", "count"), [(WalkAmongOthers, 9800), (WalkCompiled, 200)])
def test_ten_thousand_walks_do(walk, count):
    run_state_machine_as_test(walk, settings=settings(**QUIET, max_examples=count, stateful_step_count=16))
