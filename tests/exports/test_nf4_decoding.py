"""Decoding NF4 without bitsandbytes: its bounds on whatever bitsandbytes has coded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exports.bitsandbytes import decode_nf4


def nf4_parts(weight: Tensor, double: bool) -> dict[str, Tensor]:
    """What bitsandbytes stores of a weight, by name."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    return {"weight": packed, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}


@given(st.integers(1, 40), st.integers(1, 80), st.integers(0, 2**31), st.booleans())
def test_any_shape_decodes_to_within_half_a_step(rows: int, columns: int, seed: int, double: bool) -> None:
    """Odd sizes, and blocks that run over the ends of rows: NF4's widest gap is 0.304 of the block's largest magnitude."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    decoded = decode_nf4(nf4_parts(weight, double))
    assert decoded.shape == weight.shape
    padded = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = padded.abs().amax(1, keepdim=True).expand(-1, 64).flatten()[: weight.numel()].view_as(weight)
    # Double quantization moves a block's largest magnitude by a few hundredths of the largest deviation from the mean.
    slack = 0.05 * float(largest.max() - largest.min()) + 1e-6 if double else 0.0
    assert bool(((decoded - weight).abs() <= 0.1521 * largest + slack).all())


@given(st.integers(0, 2**31), st.integers(-8, 8))
def test_nf4_scales_with_its_weights(seed: int, power: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    first, second = (decode_nf4(nf4_parts(w, False)) for w in (weight, weight * 2.0**power))
    assert torch.equal(first * 2.0**power, second)


@pytest.mark.parametrize("constant", [0.0, 1.5, -0.25])
def test_nf4_keeps_a_constant_block(constant: float) -> None:
    weight = torch.full((2, 64), constant)
    torch.testing.assert_close(decode_nf4(nf4_parts(weight, False)), weight)
