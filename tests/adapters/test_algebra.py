"""The qkv algebra: several updates as one, and back."""

import pytest
import torch

from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.adapters.algebra import split_factors, stack_factors


def test_round_trip_with_every_kind_of_part():
    shared = torch.randn(2, 6)
    parts = [
        LoRAFactors(shared, torch.randn(4, 2), 1.0),
        LoRAFactors(torch.randn(3, 6), torch.randn(4, 3), -2.0),
        None,
        LoRAFactors(shared, torch.randn(4, 2), 1.0),
    ]
    whole, columns = stack_factors(parts)
    assert columns == [(0, 2), (2, 5), None, (0, 2)]
    assert whole.lora_A.shape == (5, 6)
    expected = [torch.zeros(4, 6) if p is None else p.scaling * p.lora_B @ p.lora_A for p in parts]
    torch.testing.assert_close(whole.scaling * whole.lora_B @ whole.lora_A, torch.cat(expected))
    again = split_factors(whole, 4, columns)
    assert again[2] is None
    assert [p and p.r for p in again] == [2, 3, None, 2]
    for part, other in zip(expected, split_factors(whole, 4), strict=True):
        torch.testing.assert_close(part, other.scaling * other.lora_B @ other.lora_A)


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match=r"of a layer of 3 parts must have rows divisible by 3, got \[16, 5\]"):
        split_factors(LoRAFactors(torch.ones(5, 6), torch.ones(16, 5), 1.0), 3)


def test_parts_of_different_sizes():
    parts = [LoRAFactors(torch.ones(2, 6), torch.ones(rows, 2), 1.0) for rows in (4, 5)]
    with pytest.raises(ValueError, match=r"must all be \[4, 6\], got \[5, 6\]"):
        stack_factors(parts)
