"""What tests of torch.compile share: a process without graphs, and how many were made since."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def fresh_dynamo():
    """No graph of another test is left, and none stays."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """How many graphs were made."""
    return counters["stats"]["unique_graphs"]
