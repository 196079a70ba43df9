"""The gradient start: the leading directions of the gradient, against that gradient in full."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import slora_diffusers as sl
from slora_diffusers.core.pair import ROW_NORM, gradient_start, new_matrices, orthonormal
from tests.adapters import output_of
from tests.gradients import (
    DIT,
    SD3,
    adapted,
    backward_of,
    best,
    caught,
    equal,
    full_gradients,
    rows_of,
    same_span,
    starts_of,
)
from tests.test_quantized import int8_torchao
from tests.tiny.vision import VISION


@pytest.mark.parametrize("tiny", [DIT, SD3], ids=["DiT", "SD3"])
@pytest.mark.parametrize("passes", [1, 2, 3, 6])
def test_a_spans_the_leading_right_singular_vectors_of_the_gradient(tiny, passes):
    model = adapted(tiny)
    backward = backward_of(model, tiny)
    usual, gradients = rows_of(model), full_gradients(model, backward)
    report = sl.initialize_serial_lora(model, backward, passes=passes)
    share = {1: 0.4, 2: 0.85, 3: 0.93, 6: 0.99}[passes]
    for key, A in rows_of(model).items():
        if key in report.unchanged:
            assert key not in gradients or not gradients[key].any()
            continue
        assert_close(A @ A.mT, ROW_NORM**2 * torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
        G = gradients[key]
        assert caught(A, G) >= share * best(G, 4) and caught(A, G) >= caught(usual[key], G)
        energy = (A / ROW_NORM @ G.mT).norm().item()
        assert report.energies[key] <= energy * 1.001 and (passes == 1 or report.energies[key] >= 0.7 * energy)


def test_the_first_row_is_the_direction_in_which_the_loss_falls_most():
    """To first order: moving B along -G a for a unit row a changes the loss by -|G a|^2 and no other row by more."""
    model = adapted(rank=1)
    backward = backward_of(model)
    gradients = full_gradients(model, backward)
    sl.initialize_serial_lora(model, backward, passes=30)
    for key, A in rows_of(model).items():
        leading = torch.linalg.svd(gradients[key]).Vh[0]
        assert abs((A[0] / ROW_NORM) @ leading) > 0.9999


def test_mixed_precision_finds_the_same_directions_to_its_precision():
    exact, mixed = adapted(rank=1), adapted(rank=1)

    def backward():
        with torch.autocast("cpu", torch.bfloat16):
            backward_of(mixed)()

    theirs, ours = starts_of(exact, passes=8), starts_of(mixed, backward, passes=8)
    same_span(ours, theirs, 0.05)


def test_a_half_precision_base_keeps_its_weights_and_its_adapter_stays_fp32():
    model = DIT.build().to(torch.bfloat16)
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=4))
    base = {n: p.clone() for n, p in model.named_parameters() if "serial_lora" not in n}
    arguments = {k: v.bfloat16() if v.is_floating_point() else v for k, v in DIT.arguments().items()}
    sl.initialize_serial_lora(model, lambda: model(**arguments).sample.float().square().sum().backward())
    assert equal({n: p for n, p in model.named_parameters() if "serial_lora" not in n}, base)
    assert {A.dtype for A in sl.serial_lora_parameters(model)} == {torch.float32}
    for A in rows_of(model).values():
        assert_close(A @ A.mT, ROW_NORM**2 * torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_quantized_base_is_not_touched():
    model = int8_torchao(SD3.build())
    sl.add_serial_lora(model, sl.SerialLoraConfig(rank=4))
    before = output_of(model, SD3)
    plain = adapted(SD3)
    gradients = full_gradients(plain, backward_of(plain, SD3))
    report = sl.initialize_serial_lora(model, backward_of(model, SD3))
    assert output_of(model, SD3).equal(before)
    for key in report.energies:
        assert caught(rows_of(model)[key], gradients[key]) >= 0.8 * best(gradients[key], 4)


def test_batches_add_up_in_any_order_and_the_size_of_the_loss_does_not_matter():
    model = adapted()
    backward = backward_of(model, batches=3)
    expected = starts_of(model, backward)

    def in_another_order():
        for seed in (2, 0, 1):
            output = other(**DIT.arguments(seed)).sample.flatten()
            target = torch.randn(len(output), generator=torch.Generator().manual_seed(seed))
            (1e-3 * (output - target).square().sum()).backward()

    other = adapted()
    same_span(starts_of(other, in_another_order), expected)


@pytest.mark.parametrize("config", [{"alpha": 16}, {"rslora": True, "alpha": 3}, {"alpha": -2}])
def test_the_scale_does_not_move_the_directions(config):
    same_span(starts_of(adapted(**config)), starts_of(adapted()))


def test_optional_pairs_and_unequal_ranks_start_each_at_its_place():
    tiny = VISION["Dinov2Model"]
    inputs = ("hidden_states", "attention_output", "feed_forward")
    model = adapted(tiny, inputs=inputs, rank_pattern={r".*attention_output": 2})
    gradients = full_gradients(model, backward_of(model, tiny))
    report = sl.initialize_serial_lora(model, backward_of(model, tiny))
    assert {key.rpartition(".")[2] for key in report.energies} == set(inputs)
    for key, A in rows_of(model).items():
        rank = 2 if key.endswith("attention_output") else 4
        assert len(A) == rank and caught(A, gradients[key]) >= 0.8 * best(gradients[key], rank)


def test_pairs_that_no_gradient_reaches_keep_their_start_and_are_named(caplog):
    model = adapted()
    before = rows_of(model)
    blocks = model.transformer_blocks

    def backward():  # the output of the first block alone
        kept = []
        handle = blocks[0].register_forward_hook(lambda module, args, output: kept.append(output))
        model(**DIT.arguments())
        handle.remove()
        kept[0].square().sum().backward()

    with caplog.at_level(logging.WARNING, "diffusers.slora_diffusers"):
        report = sl.initialize_serial_lora(model, backward)
    after = rows_of(model)
    assert report.unchanged == [key for key in before if not key.startswith("transformer_blocks.0.")]
    assert report.unchanged and all(equal(after[key], before[key]) for key in report.unchanged)
    assert all(not equal(after[key], before[key]) for key in report.energies)
    assert report.unchanged[0] in caplog.text and report.unchanged[0] in str(report)


def test_training_from_it_goes_downhill_faster_than_from_the_usual_start():
    """Twenty steps of plain gradient descent on B, the same rate: the start that catches the gradient leads."""
    losses = {}
    for start in ("kaiming", "gradient"):
        model = adapted(seed=3)
        if start == "gradient":
            sl.initialize_serial_lora(model, backward_of(model))
        optimizer = torch.optim.SGD(sl.serial_lora_parameters(model), lr=1e-5)
        for _ in range(20):
            backward_of(model)()
            optimizer.step()
            optimizer.zero_grad()
        output = [model(**DIT.arguments(seed)).sample.flatten() for seed in range(2)]
        targets = [torch.randn(len(o), generator=torch.Generator().manual_seed(s)) for s, o in enumerate(output)]
        losses[start] = sum((o - t).square().sum().item() for o, t in zip(output, targets, strict=True))
    assert losses["gradient"] < losses["kaiming"]


def test_a_new_head_of_zeros_must_be_trained_a_little_first():
    tiny = VISION["Dinov2Model"]
    backbone = tiny.build()
    model = sl.SerialLoraForImageClassification.from_backbone(backbone, 3, sl.SerialLoraConfig(rank=4))
    pixels, labels = tiny.arguments()["pixel_values"], torch.tensor([0, 1])

    def backward():
        model(pixels, labels=labels).loss.backward()

    with pytest.raises(sl.SerialLoraError, match="new head of zeros"):
        sl.initialize_serial_lora(model, backward)
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    report = sl.initialize_serial_lora(model, backward)
    assert report.energies and all(p.grad is None for p in model.parameters())


# The maths.


def test_orthonormal_rows_span_the_rows_given_and_zeros_fill_up():
    M = torch.randn(3, 7)
    Q = orthonormal(M)
    assert_close(Q @ Q.mT, torch.eye(3, dtype=torch.float64))
    assert_close(M.double() @ Q.mT @ Q, M.double())
    tall = orthonormal(torch.randn(5, 2))
    assert_close(tall @ tall.mT, torch.diag(torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64)))


@pytest.mark.parametrize(("rank", "d", "known"), [(4, 9, 4), (4, 9, 2), (1, 9, 1), (6, 4, 4), (6, 4, 1), (9, 9, 3)])
def test_the_start_keeps_what_the_gradient_tells_and_fills_up_with_the_usual_one(rank, d, known):
    Z = torch.randn(rank, known) @ torch.randn(known, d)
    A = torch.randn(rank, d)
    start = gradient_start(Z, A)
    leading = torch.linalg.svd(Z.double()).Vh[: min(known, rank)]
    assert start.shape == (rank, d)
    top = start[: min(rank, d)] / ROW_NORM
    assert_close(top @ top.mT, torch.eye(len(top), dtype=torch.float64))
    assert_close(
        (leading @ top[: len(leading)].mT).abs(), torch.eye(len(leading), dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert_close(start[d:], A[d:].double())


def test_rows_have_the_norm_of_kaimings():
    A, _ = new_matrices(64, 4096, "kaiming", "cpu")
    assert A.norm(dim=1).mean().item() == pytest.approx(ROW_NORM, rel=0.01)
