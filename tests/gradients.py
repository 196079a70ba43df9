"""What the tests of the gradient start share: the gradient in full, and everything of a model that must stay."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

import slora_diffusers as sl
from slora_diffusers.core.pair import ROW_NORM
from slora_diffusers.core.state import pairs_of, registry_of
from tests.tiny.models import TINY, flat_tensors

DIT, SD3 = TINY["DiTTransformer2DModel"], TINY["SD3Transformer2DModel"]


def adapted(tiny=DIT, seed=0, name="default", **config):
    model = tiny.build()
    torch.manual_seed(seed)
    sl.add_serial_lora(model, sl.SerialLoraConfig(**{"rank": 4, **config}), name)
    return model


def backward_of(model, tiny=DIT, batches=2, call=None):
    """Accumulates the gradients of a loss with a target for each batch."""

    def backward():
        for seed in range(batches):
            output = torch.cat([t.flatten() for t in flat_tensors((call or model)(**tiny.arguments(seed)))])
            target = torch.randn(len(output), generator=torch.Generator().manual_seed(seed))
            (output.float() - target).square().sum().backward()

    return backward


def full_gradients(model, backward):
    """{pair: G = sum over tokens of the gradient of what the pair gives, times what it reads}, (d, d) in fp64."""
    found = {}

    def watch(key, pair):
        def hook(module, args, output):
            x = args[0].detach().double().flatten(0, -2)
            y = output if output.requires_grad else output.requires_grad_()
            assert y is not args[0]

            def add(gradient):
                found[key] = found.get(key, 0) + gradient.double().flatten(0, -2).mT @ x

            y.register_hook(add)

        return pair.register_forward_hook(hook)

    handles = [watch(key, pair) for key, pair in pairs_of(model).items()]
    backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def rows_of(model, name="default"):
    return {key: pair.matrices(name)[0].detach().double() for key, pair in pairs_of(model).items()}


def caught(A, G):
    """Share of the norm of G that lies in the span of A's rows."""
    Q = torch.linalg.qr(A.double().mT).Q
    return ((G @ Q).norm() / G.norm()).item()


def best(G, rank):
    S = torch.linalg.svdvals(G)
    return (S[:rank].norm() / S.norm()).item()


class Around(nn.Module):
    """Parts around a model that a pass in training mode would move: dropout and running statistics."""

    adapted_part = "transformer"

    def __init__(self, model, width=4):
        super().__init__()
        self.transformer, self.drop, self.norm = model, nn.Dropout(0.5), nn.BatchNorm2d(width)

    def forward(self, hidden_states, **more):
        return self.transformer(self.drop(self.norm(hidden_states)), **more)


def in_training(**config):
    """A model in training mode, one block of it in eval mode, with gradients from before; a base weight trains."""
    outer = Around(adapted(**config)).train()
    outer.transformer.transformer_blocks[0].eval()
    next(outer.transformer.parameters()).requires_grad_(True)
    for number, parameter in enumerate(p for p in outer.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    return outer


def state_of(model):
    """Everything that must be as before: values, gradients (the very tensors), what trains, modes, generators."""
    named = dict(model.named_parameters())
    return {
        "values": {n: t.detach().clone() for n, t in (*named.items(), *model.named_buffers())},
        "gradients": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in named.items()},
        "trains": {n: p.requires_grad for n, p in named.items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "draws": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
        "configs": dict(registry_of(model).configs),
    }


def equal(one, other):
    if isinstance(one, torch.Tensor | np.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def starts_of(model, backward=None, **more):
    sl.initialize_serial_lora(model, backward or backward_of(model), **more)
    return rows_of(model)


def same_span(ours, theirs, tolerance=1e-4):
    """Whether the starts span the same spaces."""
    assert ours.keys() == theirs.keys()
    for key, A in ours.items():
        overlap = torch.linalg.svdvals(A @ theirs[key].mT) / ROW_NORM**2
        assert overlap.min() > 1 - tolerance, (key, overlap)
