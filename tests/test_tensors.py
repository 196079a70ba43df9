"""A checksum is of the content alone: equal wherever it lies, another one for every bit."""

from __future__ import annotations

import pytest
import torch

from slora_diffusers.core.tensors import checksum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@pytest.mark.parametrize("width", [1, 3, 5, 6, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_is_equal_for_equal_content_wherever_it_lies_and_differs_by_a_bit(dtype, width):
    W = torch.randn(7, width).to(dtype)
    room = torch.zeros(3 + W.numel(), dtype=torch.float64).to(dtype)
    room.view(torch.uint8)[3 * W.element_size() :].copy_(W.reshape(-1).view(torch.uint8))
    assert checksum(room[3:].view(7, width)) == checksum(W)  # not aligned to its words
    assert checksum(W.t().contiguous().t()) == checksum(W)
    for row in range(7):
        other = W.clone()
        other.view(torch.uint8)[row, -1] ^= 1
        assert checksum(other) != checksum(W)
    assert checksum(W[:0]) == (0, 0)  # the part of a shard that has none
    assert checksum(W.roll(1, dims=0)) != checksum(W)
    for one in (W[0, 0], W[0], W.view(7, 1, width)):  # modules saved whole have such
        other = one.clone()
        other.view(-1).view(torch.uint8)[-1] ^= 1
        assert checksum(one) == checksum(one.clone()) != checksum(other)
