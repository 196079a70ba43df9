"""The gradient start on every architecture that has a tiny model: pairs of all inputs, against the gradient in full."""

from __future__ import annotations

import pytest
import torch

import slora_diffusers as sl
from slora_diffusers.core.sites import find_slots
from tests.gradients import backward_of, best, caught, full_gradients, rows_of
from tests.tiny.models import TINY
from tests.tiny.text import TEXT
from tests.tiny.vision import VISION

EVERY = {**TINY, **VISION, **TEXT}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EVERY))
def test_the_start_catches_the_gradient_in_every_family(name):
    tiny = EVERY[name]
    model = tiny.build()
    inputs = list(dict.fromkeys(slot.pair.name for slot in find_slots(model)))
    torch.manual_seed(0)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=2, inputs=inputs))
    backward = backward_of(model, tiny, batches=1)
    try:
        usual, gradients = rows_of(model), full_gradients(model, backward)
    except NotImplementedError as error:
        pytest.skip(str(error))  # FlexAttention has no backward pass on a CPU
    report = sl.initialize_serial_lora(model, backward, passes=20)
    for key, A in rows_of(model).items():
        if key in report.unchanged:
            assert key not in gradients or not gradients[key].any()
            assert A.equal(usual[key])
        else:
            assert caught(A, gradients[key]) >= 0.95 * best(gradients[key], 2)
