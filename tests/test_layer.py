"""One pair against the paper's equation in float64: values, gradients, dtypes, and what the forward computes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slora_diffusers.core.batch import samples_of
from slora_diffusers.core.calls import CallState
from slora_diffusers.core.layer import SerialLoraPair
from slora_diffusers.core.pair import new_matrices
from slora_diffusers.errors import AdapterStateError
from tests.ops import count_casts, count_ops

D = 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair_with(ranks=(4,), weights=None, scaling=1.5, dropout=0.0, trainable=True, dtype=torch.float32):
    """A pair with adapters a0, a1, ... of the given ranks, random A and B, active with `weights`."""
    pair = SerialLoraPair(D, CallState())
    for i, r in enumerate(ranks):
        A, B = torch.randn(r, D) / D**0.5, torch.randn(D, r) / r**0.5
        pair.add(f"a{i}", A.to(dtype), B.to(dtype), scaling, dropout, trainable)
    pair.activate(weights if weights is not None else {f"a{i}": 1.0 for i in range(len(ranks))})
    return pair


def equation(pair, x, weights=None, scale=1.0):
    """x~ = x + scale sum_i w_i s_i B_i A_i x, in float64, one column vector at a time in the paper's own order."""
    y = x.double().clone()
    for name, w in (weights if weights is not None else pair.weights).items():
        A, B = (matrix.detach().double() for matrix in pair.matrices(name))
        y += scale * w * pair.scaling[name] * torch.einsum("dr,rk,...k->...d", B, A, x.double())
    return y


@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 7, D), (2, 3, 5, D)])
@pytest.mark.parametrize(
    "weights", [{"a0": 1.0}, {"a0": -0.7}, {"a0": 0.5, "a1": -2.0}, {"a0": 0.3, "a1": 0.7, "a2": 1.1}]
)
def test_the_forward_is_the_equation(shape, weights):
    pair, x = pair_with((4, 2, 3), weights), torch.randn(shape)
    with torch.no_grad():
        got = pair(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert torch.allclose(got.double(), equation(pair, x), atol=1e-5)


def test_the_forward_reads_tensors_that_are_not_contiguous():
    pair, x = pair_with(), torch.randn(5, 2, D).transpose(0, 1)
    assert torch.allclose(pair(x).double(), equation(pair, x), atol=1e-5)
    chunk = torch.randn(2, 5, 2 * D).chunk(2, dim=-1)[1]
    assert torch.allclose(pair(chunk).double(), equation(pair, chunk), atol=1e-5)


def test_the_forward_does_not_write_into_its_input():
    pair, x = pair_with(), torch.randn(2, 7, D)
    before = x.clone()
    pair(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untrained_pair_gives_its_input_to_the_bit(dtype, init):
    pair = SerialLoraPair(D, CallState())
    A, B = new_matrices(4, D, init, "cpu")
    assert A.shape == (4, D) and B.shape == (D, 4) and A.any() and not B.any()
    pair.add("a", A, B, 1.0, 0.0, trainable=True)
    pair.activate({"a": 1.0})
    x = torch.randn(2, 7, D).to(dtype)
    assert torch.equal(pair(x), x)


def test_the_initial_A_has_the_documented_spread():
    kaiming, _ = new_matrices(64, 400, "kaiming", "cpu")
    assert kaiming.abs().max() <= 400**-0.5  # uniform with a = sqrt(5): bound 1 / sqrt(d)
    assert kaiming.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.02)
    gaussian, _ = new_matrices(64, 400, "gaussian", "cpu")
    assert gaussian.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_new_matrices_are_fp32_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {matrix.dtype for matrix in new_matrices(2, D, "kaiming", "cpu")} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("weights", [{}, {"a0": 0.0}])
def test_a_pair_without_effect_passes_its_input_through(weights):
    pair, x = pair_with((4,), weights), torch.randn(2, D)
    assert pair(x) is x


def test_a_call_scale_multiplies_and_zero_is_the_base():
    pair, x = pair_with((4, 2), {"a0": 1.0, "a1": -0.5}), torch.randn(2, 7, D)
    for scale in (0.25, -0.5):
        with pair.call.changed(scale=scale):
            assert torch.allclose(pair(x).double(), equation(pair, x, scale=scale), atol=1e-5)
    with pair.call.changed(scale=0.0):
        assert pair(x) is x


def test_the_order_of_activation_does_not_change_a_bit():
    x, one = torch.randn(2, 7, D), pair_with((4, 2, 3))
    other = copy.deepcopy(one)
    one.activate({"a0": 0.3, "a1": 0.7, "a2": 1.1})
    other.activate({"a2": 1.1, "a0": 0.3, "a1": 0.7})
    assert torch.equal(one(x), other(x))


def test_gradients_are_those_of_the_equation():
    pair, x = pair_with((4, 2), {"a0": 1.0, "a1": -0.5}), torch.randn(3, 5, D, requires_grad=True)
    g = torch.randn(3, 5, D)
    pair(x).backward(g)
    x64, g64 = x.detach().double().requires_grad_(), g.double()
    reference = {n: [m.detach().double().requires_grad_() for m in pair.matrices(n)] for n in pair.weights}
    y = x64 + sum(w * 1.5 * x64 @ reference[n][0].T @ reference[n][1].T for n, w in pair.weights.items())
    y.backward(g64)
    assert torch.allclose(x.grad.double(), x64.grad, atol=1e-5)
    for name, matrices in reference.items():
        for got, wanted in zip(pair.matrices(name), matrices, strict=True):
            assert torch.allclose(got.grad.double(), wanted.grad, atol=1e-4)


def test_dropout_acts_on_the_low_rank_branch_only_and_only_in_training():
    pair, x = pair_with((4,), dropout=0.5), torch.randn(2, 7, D)
    wanted = equation(pair, x)
    pair.eval()
    assert torch.allclose(pair(x).double(), wanted, atol=1e-5)
    pair.train()
    torch.manual_seed(3)
    got = pair(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    A, B = pair.matrices("a0")
    assert torch.allclose(got, x + 1.5 * dropped @ A.T @ B.T, atol=1e-5)
    mean = torch.stack([pair(x) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean.double(), wanted, atol=0.35)
    assert not torch.allclose(mean.double(), x.double(), atol=0.35)


@pytest.mark.parametrize("ranks", [(4,), (4, 2)])
def test_fused_weight_and_lora_are_the_equation_for_every_weight(ranks):
    pair, W, x = pair_with(ranks), torch.randn(10, D), torch.randn(7, D)
    gains = {f"a{i}": 1.5 * w for i, w in enumerate((1.0, -0.5)[: len(ranks)])}
    weights = {name: gain / 1.5 for name, gain in gains.items()}
    wanted = equation(pair, x, weights) @ W.double().T
    assert torch.allclose(x.double() @ pair.fused_weight(W, gains).double().T, wanted, atol=1e-4)
    A, B = pair.as_lora(W, gains)
    assert A.shape == (sum(ranks), D) and B.shape == (10, sum(ranks))
    assert torch.allclose(x.double() @ (W.double() + B.double() @ A.double()).T, wanted, atol=1e-4)
    exact = pair.fused_weight(W.double(), gains)
    assert exact.dtype == torch.float64
    assert torch.allclose(x.double() @ exact.T, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_is_fused_in_fp32_and_rounded_once(dtype):
    pair, W = pair_with(), torch.randn(10, D).to(dtype)
    A, B = (matrix.double() for matrix in pair.matrices("a0"))
    exact = W.double() + 1.5 * W.double() @ B @ A
    assert pair.fused_weight(W, {"a0": 1.5}).dtype == dtype
    assert torch.equal(pair.fused_weight(W, {"a0": 1.5}), exact.float().to(dtype))


@pytest.mark.parametrize("shape", [(7, D), (2, 7, D)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_forward_is_two_matrix_products_of_which_one_adds(count, shape):
    pair, x = pair_with((4,) * count, trainable=False), torch.randn(shape)
    with torch.no_grad():
        pair(x)  # several adapters are stacked once
        assert count_ops(lambda: pair(x)) == {"mm": 1, "addmm": 1}


def test_training_computes_no_more():
    pair, x = pair_with(), torch.randn(2, 7, D)
    assert count_ops(lambda: pair(x)) == {"mm": 1, "addmm": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
def test_inference_in_low_precision_casts_once(count, dtype):
    pair, x = pair_with((4,) * count, trainable=False), torch.randn(2, 7, D).to(dtype)
    assert count_casts(lambda: pair(x)) == 2  # A and B
    assert count_casts(lambda: [pair(x) for _ in range(10)]) == 0
    assert torch.allclose(pair(x).double(), equation(pair, x), atol=0.1)
    assert {p.dtype for p in pair.parameters()} == {torch.float32}


def test_inference_under_autocast_casts_once():
    pair, x = pair_with(trainable=False), torch.randn(2, 7, D).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        count_casts(lambda: pair(x))
        assert count_casts(lambda: [pair(x) for _ in range(10)]) == 0


CHANGES = {
    "add_": lambda pair, new: [p.add_(n) for p, n in zip(pair.parameters(), new, strict=True)],
    "data": lambda pair, new: [setattr(p, "data", n) for p, n in zip(pair.parameters(), new, strict=True)],
    "load_state_dict": lambda pair, new: pair.load_state_dict(dict(zip(pair.state_dict(), new, strict=True))),
    "to": lambda pair, new: [pair.to(torch.float64), pair.to(torch.float32)],
    # As diffusers' EMAModel writes while an adapter trains, behind autograd's back.
    "data.copy_": lambda pair, new: [p.data.copy_(n) for p, n in zip(pair.parameters(), new, strict=True)],
}


@pytest.mark.parametrize("ranks", [(4,), (4, 2)])
@pytest.mark.parametrize(
    ("change", "trainable"),
    [
        (change, trainable)
        for change in CHANGES
        for trainable in (True, False)
        if (change, trainable) != ("data.copy_", False)
    ],
)
def test_a_changed_parameter_is_seen_by_the_next_call(ranks, change, trainable):
    pair, x = pair_with(ranks, trainable=trainable), torch.randn(7, D).bfloat16()
    with torch.no_grad():
        pair(x)
        CHANGES[change](pair, [torch.randn_like(p) / 3 for p in pair.parameters()])
        got, wanted = pair(x).double(), equation(pair, x)
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_gradients_flow_through_a_frozen_adapter_that_inference_mode_used_before():
    pair, x = pair_with((4,), trainable=False), torch.randn(7, D).bfloat16()
    with torch.inference_mode():
        pair(x)
    x.requires_grad_(True)
    pair(x).float().sum().backward()
    A, B = (matrix.double() for matrix in pair.matrices("a0"))
    wanted = torch.ones(7, D).double() @ (torch.eye(D).double() + 1.5 * B @ A)
    assert (x.grad.double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_parameters_and_gradients_stay_fp32_in_training(base, autocast):
    pair, x = pair_with((4,)), torch.randn(2, 7, D).to(base)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = pair(x)
    assert y.dtype == (autocast or base)
    y.float().square().sum().backward()
    for matrix in pair.matrices("a0"):
        assert matrix.dtype == torch.float32 and matrix.grad.dtype == torch.float32
        assert matrix.grad.isfinite().all() and matrix.grad.any()
    assert torch.allclose(y.double(), equation(pair, x), atol=0.15)


def test_removing_and_copying_an_adapter_leaves_the_others():
    pair, x = pair_with((4, 2)), torch.randn(7, D)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(pair)))
    assert torch.equal(twin(x), pair(x))
    pair.remove("a1")
    assert set(pair.state_dict()) == {"lora_A_a0", "lora_B_a0"}
    assert torch.allclose(pair(x).double(), equation(pair, x, {"a0": 1.0}), atol=1e-5)
    pair.remove("a0")
    assert pair(x) is x and not list(pair.parameters())
    assert torch.allclose(twin(x).double(), equation(twin, x), atol=1e-5)


def test_a_pair_follows_its_module_in_train_eval_and_dtype():
    holder = nn.ModuleDict({"pair": pair_with()})
    holder.eval().half()
    assert not holder["pair"].training
    assert {p.dtype for p in holder.parameters()} == {torch.float16}


def test_reserved_room_keeps_shapes_and_gives_the_equation():
    pair, x = pair_with((4, 2), {}, trainable=False), torch.randn(7, D)
    pair.reserve(8, 4, torch.zeros(()))
    assert pair.reserved is not None
    shapes = [tuple(m.shape) for m in pair.reserved.buffers()]
    assert shapes == [(8, D), (D, 8), (4, 8), (1, 2)]
    for weights in ({}, {"a0": 1.0}, {"a0": 0.5, "a1": -1.0}, {"a1": 2.0}):
        pair.activate(weights)
        for got in (pair(x), pair.reserved(x, len(x))):
            assert torch.allclose(got.double(), equation(pair, x, weights), atol=1e-5)
        assert [tuple(m.shape) for m in pair.reserved.buffers()] == shapes


def test_each_sample_of_a_batch_goes_through_its_own_adapter():
    pair, x = pair_with((4, 2), {"a0": 0.5}), torch.randn(3, 7, D)
    with torch.no_grad(), pair.call.changed(samples=samples_of(["a1", None, "a0"]), stacks={}):
        got = pair(x)
    assert torch.allclose(got[0].double(), equation(pair, x[0], {"a1": 1.0}), atol=1e-5)
    assert torch.equal(got[1], x[1])
    assert torch.allclose(got[2].double(), equation(pair, x[2], {"a0": 0.5}), atol=1e-5)


def test_a_batch_that_no_list_of_names_fits_is_refused():
    pair = pair_with((4,))
    with (
        pytest.raises(AdapterStateError, match="2 adapter names"),
        pair.call.changed(samples=samples_of(["a0", None]), stacks={}),
    ):
        pair(torch.randn(3, 7, D))
