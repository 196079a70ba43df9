"""No damaged file raises anything but one sentence, takes long, takes much memory, or changes a model."""

from __future__ import annotations

import pytest

from tests.fuzz.judge import judge
from tests.fuzz.readers import READERS, SHARES


@pytest.mark.parametrize("name", list(READERS))
def test_a_damaged_file_is_taken_or_refused_in_one_sentence(name, tmp_path):
    tally = judge(name, READERS[name](), range(round(1000 * SHARES[name])), tmp_path)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.outcomes["taken"] and tally.outcomes["refused"], "the damage is too little or too much to tell"


FOUND = {
    "a rank that no float can hold": ("compress", 757),
    "patterns by the hundred thousand, each compiled for every module": ("compress", 1682),
    "an optimizer told to step as on another machine": ("resume", 39),
}


@pytest.mark.parametrize("what", list(FOUND))
def test_what_the_long_runs_found_is_mended(what, tmp_path):
    name, number = FOUND[what]
    tally = judge(name, READERS[name](), [number], tmp_path)
    assert not tally.failures, "\n".join(tally.failures)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(READERS))
def test_twenty_thousand_are(name, tmp_path):
    start = 1000  # beyond those of the quick test
    tally = judge(name, READERS[name](), range(start, start + round(20_000 * SHARES[name])), tmp_path)
    assert not tally.failures, "\n".join(tally.failures)


def test_every_input_has_a_reader():
    assert sum(SHARES.values()) == pytest.approx(1) and set(SHARES) == set(READERS)
