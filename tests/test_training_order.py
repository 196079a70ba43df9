"""Every image equally often per epoch, and with equal weight, whatever the shapes, the batch and the processes."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slora_diffusers.errors import SerialLoraError
from slora_diffusers.training.data.batches import Batches
from slora_diffusers.training.data.images import Item
from slora_diffusers.training.data.order import Rows, enlarged
from slora_diffusers.training.diffusion.objectives import prior_preservation

SHAPES = [(8, 8), (8, 16), (16, 8), (4, 32)]


def item(index, shape=(8, 8), **more):
    return Item(f"{index}.png", lambda: Image.new("RGB", shape[::-1]), shape, **more)


def fetch(item, shape, draw):
    return torch.zeros(3, *shape)


def epoch_of(batches_of_ranks, epoch):
    """Every batch of every process in one epoch."""
    count = batches_of_ranks[0].rows.per_epoch
    return [[batches[number] for batches in batches_of_ranks] for number in range(epoch * count, (epoch + 1) * count)]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40),
    batch=st.integers(1, 9),
    processes=st.integers(1, 5),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_an_epoch_gives_every_image_the_same_count_and_the_same_weight(shapes, batch, processes, seed, data):
    """The weight of an image is how much its loss adds to the mean over processes that the gradient is of."""
    repeats = data.draw(st.lists(st.integers(1, 3), min_size=len(shapes), max_size=len(shapes)))
    items = [item(i, shape, repeats=count) for i, (shape, count) in enumerate(zip(shapes, repeats, strict=True))]
    rows = Rows.of(items, SHAPES, batch * processes, seed)
    ranks = [Batches(items, rows, fetch, rank, processes) for rank in range(processes)]
    for epoch in (0, 3):
        counts, weights = Counter(), Counter()
        for row in epoch_of(ranks, epoch):
            assert len({part.shape for part in row}) == 1
            samples = []
            for part in row:
                assert 1 <= len(part.items) <= batch and len(part.items) == len(part.inputs) == len(part.weights)
                for one, sample, weight in zip(part.items, part.samples, part.weights.tolist(), strict=True):
                    counts[one.name] += weight > 0
                    weights[one.name] += weight / len(part.items) / processes
                    samples += [sample] if weight else []
            assert sorted(samples) == list(range(len(samples)))  # no two share their noise
        expected = {one.name: one.repeats for one in items}
        assert counts == expected
        longest = min(
            batch * processes, max(Counter(s for s, n in zip(shapes, repeats, strict=True) for _ in range(n)).values())
        )
        for name, count in expected.items():
            assert weights[name] == pytest.approx(count / longest, rel=1e-5)


def test_one_wide_picture_among_nineteen_squares_is_seen_as_often_as_each_of_them():
    items = [item(i) for i in range(19)] + [item("wide", (8, 16))]
    batches = Batches(items, Rows.of(items, SHAPES, 32, seed=0), fetch)
    seen = Counter(one.name for row in epoch_of([batches], 0) for part in row for one in part.items)
    assert set(seen.values()) == {1} and len(seen) == 20


@pytest.mark.parametrize(("batch", "processes"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_the_loss_of_a_short_row_does_not_depend_on_the_processes(batch, processes):
    """The mean over processes is each sample's share of the whole, with the class images' weighed beside it."""
    items = [item(i) for i in range(8)]
    prior = [item(f"class {i}") for i in range(5)]
    rows = Rows.of(items, SHAPES, batch * processes, seed=0)
    loss = {one.name: float(i + 1) for i, one in enumerate([*items, *prior])}
    for number in range(6):
        total = 0.0
        for rank in range(processes):
            part = Batches(items, rows, fetch, rank, processes, prior)[number]
            losses = torch.tensor([loss[one.name] for one in part.items])
            total += prior_preservation(losses * part.weights, part.prior, 0.5).item() / processes
        whole = Batches(items, rows, fetch, 0, 1, prior)[number]
        own, other = (
            sum(loss[o.name] for o, p in zip(whole.items, whole.prior, strict=True) if p == kind)
            for kind in (False, True)
        )
        assert total == pytest.approx((own + 0.5 * other) / 6)


def test_class_images_take_turns_whatever_rows_are_short_and_stay_with_their_concept():
    items = [item(i, SHAPES[i % 3], concept=i % 2) for i in range(11)] + [item("alone", concept=2)]
    prior = [item(f"class {i}", concept=i % 2) for i in range(7)]  # four of the first, three of the second, no third
    for processes in (1, 2):
        rows = Rows.of(items, SHAPES, 4, seed=0)
        ranks = [Batches(items, rows, fetch, rank, processes, prior) for rank in range(processes)]
        seen = Counter()
        for epoch in range(6):
            for part in (part for row in epoch_of(ranks, epoch) for part in row):
                kept = [(o, p) for o, p, w in zip(part.items, part.prior.tolist(), part.weights, strict=True) if w]
                own = Counter(o.concept for o, p in kept if not p)
                assert Counter(o.concept for o, p in kept if p) == Counter({c: n for c, n in own.items() if c < 2})
                seen.update(o.name for o, p in kept if p)
        for concept, count in ((0, 6), (1, 5)):  # images of the concept in an epoch
            of_it = [seen[one.name] for one in prior if one.concept == concept]
            assert sum(of_it) == 6 * count and max(of_it) - min(of_it) <= 1


def test_weights_of_images_multiply_their_loss():
    items = [item(0, weight=0.25), item(1, weight=2.0)]
    batch = Batches(items, Rows.of(items, SHAPES, 2, seed=0), fetch)[0]
    assert {one.name: weight for one, weight in zip(batch.items, batch.weights.tolist(), strict=True)} == {
        "0.png": 0.25, "1.png": 2.0,
    }  # fmt: skip


def test_an_image_that_has_gone_since_the_start_counts_for_nothing_and_is_named_once(caplog):
    def gone(item, shape, draw):
        if item.name == "1.png":
            raise SerialLoraError("there is no such file")
        return torch.ones(3, *shape)

    items = [item(i) for i in range(3)]
    batches = Batches(items, Rows.of(items, SHAPES, 3, seed=0), gone)
    for number in range(3):
        batch = batches[number]
        weights = {one.name: weight for one, weight in zip(batch.items, batch.weights.tolist(), strict=True)}
        assert weights == {"0.png": 1.0, "1.png": 0.0, "2.png": 1.0}
        assert batch.inputs.isfinite().all()
    assert caplog.text.count("1.png is left out from now on") == 1
    with pytest.raises(SerialLoraError, match="no such file"):
        Batches(items[1:2], Rows.of(items[1:2], SHAPES, 1, seed=0), gone)[0]


def test_the_start_says_what_shapes_do_to_batches_and_which_images_are_enlarged():
    rows = Rows.of([item(i) for i in range(19)] + [item("wide", (8, 16))], SHAPES, 32, seed=0)
    assert any("8 x 16: 1" in line and "8 x 8: 19" in line for line in rows.report())
    assert any("2 of the 2 batches" in line for line in rows.report())
    assert "10.0 of 32" in rows.waste()[0] and "--train_batch_size" in rows.waste()[0]
    even = Rows([(8, 8)] * 8, 4, seed=0)
    assert even.report() == even.waste() == []
    small = [item(0, (8, 8)), SimpleNamespace(name="tiny.png", size=(4, 8))]
    assert enlarged(small[:1], [(8, 8)]) == []
    (line,) = enlarged(small, [(8, 8), (8, 8)])
    assert "1 of 2 images" in line and "tiny.png 2.0 times" in line
