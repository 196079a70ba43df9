"""Nothing between: whatever is raised at whatever line of a verb, the model is as before or as after."""

from __future__ import annotations

import contextlib
import random

import pytest

import slora_diffusers as sl
from slora_diffusers.convert.merge import merge_serial_lora
from tests.adapters import add_random_adapter, output_of
from tests.faults import PACKAGE, check_faults, state_of
from tests.tiny.models import TINY

# A fault may come inside a destructor or a weak reference's callback, whose exceptions Python reports and swallows.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NAME = "DiTTransformer2DModel"
TINY_DIT = TINY[NAME]
ALL = ("hidden_states", "attention_output", "feed_forward")


def with_two():
    model = TINY_DIT.build()
    add_random_adapter(model, "a", seed=1)
    add_random_adapter(model, "b", seed=2, inputs=ALL)
    return model


def state():
    other = TINY_DIT.build()
    add_random_adapter(other, "c", seed=3, inputs=ALL)
    return sl.serial_lora_state_dict(other, "c")


def fused():
    model = with_two()
    sl.fuse_serial_lora(model)
    return model


def reserved():
    model = TINY_DIT.build()
    sl.reserve_serial_lora(model, (4, 3), inputs=ALL)
    sl.load_serial_lora(model, state(), "a")
    return model


CONFIG = sl.SerialLoraConfig(rank=2, inputs=ALL)
VERBS = {
    "add to a base": (TINY_DIT.build, lambda model: sl.add_serial_lora(model, CONFIG, "c")),
    "add beside others": (with_two, lambda model: sl.add_serial_lora(model, CONFIG, "c")),
    "load into a base": (TINY_DIT.build, lambda model: sl.load_serial_lora(model, STATE, "c")),
    "load beside others": (with_two, lambda model: sl.load_serial_lora(model, STATE, "c")),
    "swap in reserved room": (reserved, lambda model: sl.load_serial_lora(model, STATE, "c")),
    "set in reserved room": (reserved, lambda model: sl.set_serial_lora(model, "a", 0.5)),
    "set": (with_two, lambda model: sl.set_serial_lora(model, "b", {r".*\.0\..*": 0.5})),
    "fuse": (with_two, lambda model: sl.fuse_serial_lora(model, scale=0.7)),
    "unfuse": (fused, sl.unfuse_serial_lora),
    "delete one": (with_two, lambda model: sl.delete_serial_lora(model, "b")),
    "delete all": (with_two, lambda model: sl.delete_serial_lora(model, ["a", "b"])),
    "unload": (with_two, sl.unload_serial_lora),
    "unload fused": (fused, sl.unload_serial_lora),
    "reserve": (TINY_DIT.build, lambda model: sl.reserve_serial_lora(model, (4, 2))),
    "reserve over adapters": (with_two, lambda model: sl.reserve_serial_lora(model, (4, 2), inputs=ALL)),
    "merge": (with_two, lambda model: merge_serial_lora(model, ["a", "b"], [0.5, 2.0], "c")),
}
STATE = state()


def run(model):
    return output_of(model, TINY_DIT)


def check(verb, lines, within=PACKAGE):
    make, call = VERBS[verb]
    return check_faults(make(), call, lambda model: state_of(model, lambda: run(model)), lines, within)


def some(total):
    return sorted(random.Random(0).sample(range(1, total + 1), min(total, 30)))


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_fault_at_some_lines_of_a_verb_leaves_the_model_before_or_after(verb):
    check(verb, some)


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_fault_inside_what_a_verb_calls_leaves_the_model_before_or_after(verb):
    """In torch, contextlib and all else: where an allocation fails, or Ctrl-C comes."""
    check(verb, some, within="")


@pytest.mark.parametrize("verb", ["set", "load into a base", "reserve", "unfuse"])
def test_a_fault_where_a_verb_leaves_its_block_leaves_other_threads_free(verb):
    """In contextlib, where Python suspends what a `with` block has left to do for as long as the exception is kept."""
    check(verb, lambda total: range(1, total + 1), within=contextlib.__file__)


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(VERBS))
def test_a_fault_at_any_of_many_lines_of_a_verb_leaves_the_model_before_or_after(verb):
    check(verb, lambda total: sorted(random.Random(1).sample(range(1, total + 1), min(total, 400))))
