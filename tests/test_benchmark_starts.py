"""Differences and intervals of the ViT benchmark, against scipy; the plot is drawn from its JSON."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks import faces, starts
from benchmarks.harness import read_results


def runs(method, scores, rate=1.0, tuning=False):
    return [{"method": method, "rate": rate, "seed": s, "tuning": tuning, "score": x} for s, x in scores.items()]


def test_an_interval_is_that_of_scipys_bootstrap():
    values = np.random.default_rng(1).normal(0.7, 2.0, 20)
    mean, low, high = starts.interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.05)
    assert starts.interval(values) == (mean, low, high), "the same numbers each time"


def test_a_difference_is_over_the_seeds_that_both_have_at_their_best_rates():
    tuned = [*runs("a", {9: 1.0}, 1.0, True), *runs("a", {9: 2.0}, 2.0, True), *runs("b", {9: 1.0}, 1.0, True)]
    a, b = {0: 5.0, 1: 6.0, 2: 7.0, 3: 100.0}, {2: 5.0, 1: 5.0, 0: 4.0, 7: 0.0}
    results = {"runs": [*tuned, *runs("a", a, 2.0), *runs("a", {0: -50.0}, 1.0), *runs("b", b)]}
    assert starts.difference(results, "a", "b") == starts.interval([1.0, 1.0, 2.0])
    assert starts.difference(results, "a", "c") is None
    assert starts.scores(results, "a") == a


def test_every_number_of_the_table_is_in_the_results():
    results, table = read_results(starts.DIGITS), starts.starts_table()
    for method, label in starts.ROWS.items():
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {label} |"))
        assert f" {np.mean(results['summary'][method]['test']):.1f} " in row


@pytest.mark.parametrize("theme", starts.THEMES)
def test_the_plot_is_drawn_in_both_themes(theme, tmp_path):
    pytest.importorskip("matplotlib")
    assert starts.plot(tmp_path / "plot.png", theme).stat().st_size > 10_000


def test_no_image_of_the_typefaces_occurs_twice(tmp_path, capsys):
    faces.main(str(tmp_path / "faces.npz"))
    with np.load(tmp_path / "faces.npz") as file:
        images, labels = file["images"], file["labels"]
    assert np.bincount(labels).tolist() == [len(images) // 10] * 10 and len(images) > 2500
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert images.any(axis=(1, 2)).all() and f"{len(images)} images" in capsys.readouterr().out
