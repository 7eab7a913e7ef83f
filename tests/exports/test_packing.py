"""Bit packing: the same words as a bit stream written out by hand, and back again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exports.packing import pack_rows, unpack_rows, values_per_period
from quantize.grids import SUPPORTED_BITS


@st.composite
def bits_and_codes(draw: st.DrawFn, widths: tuple[int, ...] = SUPPORTED_BITS) -> tuple[int, Tensor]:
    bits = draw(st.sampled_from(widths))
    rows = values_per_period(bits) * draw(st.integers(1, 3))
    columns = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return bits, torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.uint8)


def stream_words(column: list[int], bits: int) -> list[int]:
    """One column as one big integer, value ``i`` at bit ``i * bits``, cut into signed 32-bit words."""
    stream = sum(value << (i * bits) for i, value in enumerate(column))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(len(column) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(bits_and_codes())
def test_unpacking_undoes_packing(case: tuple[int, Tensor]) -> None:
    bits, codes = case
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(codes) * bits // 32, codes.shape[1])
    unpacked = unpack_rows(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@given(bits_and_codes())
def test_words_are_a_little_endian_bit_stream(case: tuple[int, Tensor]) -> None:
    bits, codes = case
    packed = pack_rows(codes, bits)
    for column in range(codes.shape[1]):
        assert packed[:, column].tolist() == stream_words(codes[:, column].tolist(), bits)


@given(st.sampled_from(SUPPORTED_BITS), st.data())
def test_every_word_can_be_unpacked_and_packed_again(bits: int, data: st.DataObject) -> None:
    words = values_per_period(bits) * bits // 32
    values = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=words, max_size=words))
    packed = torch.tensor(values, dtype=torch.int32).view(-1, 1)
    assert torch.equal(pack_rows(unpack_rows(packed, bits), bits), packed)


@given(bits_and_codes((3,)))
def test_three_bits_straddle_words_as_in_autogptq(case: tuple[int, Tensor]) -> None:
    """Values 10 and 21 of each 32 lie in two words: 2 bits and 1, then 1 bit and 2."""
    _, codes = case
    packed = pack_rows(codes, 3).long() & 0xFFFFFFFF
    for block in range(len(codes) // 32):
        first, second, third = packed[3 * block : 3 * block + 3]
        ten, twenty_one = codes[32 * block + 10].long(), codes[32 * block + 21].long()
        assert torch.equal(first >> 30, ten & 3)
        assert torch.equal(second & 1, ten >> 2)
        assert torch.equal(second >> 31, twenty_one & 1)
        assert torch.equal(third & 3, twenty_one >> 1)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
        (4, [15] * 8, [-1]),
        (4, [8, 0, 0, 0, 0, 0, 0, 8], [-(2**31) + 8]),
        (8, [0x12, 0x34, 0x56, 0x78, 0, 0, 0, 255], [0x78563412, -(2**24)]),
        (2, [0, 1, 2, 3] * 4, [-0x1B1B1B1C]),
        (3, [7] * 32, [-1, -1, -1]),
        # Eight codes are 0o76543210 = 0xFAC688, four times over.
        (3, [0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688 - 2**32, 0xC688FAC6 - 2**32, 0xFAC688FA - 2**32]),
    ],
)
def test_known_words(bits: int, codes: list[int], words: list[int]) -> None:
    assert stream_words(codes, bits) == words
    assert pack_rows(torch.tensor(codes, dtype=torch.uint8).view(-1, 1), bits).flatten().tolist() == words


@pytest.mark.parametrize(("bits", "period"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_rows_must_fill_whole_words(bits: int, period: int) -> None:
    assert values_per_period(bits) == period
    for rows in (1, period - 1, period + 1):
        message = f"{rows} rows of {bits}-bit codes do not fill whole 32-bit words; need a multiple of {period}"
        with pytest.raises(ValueError, match=message):
            pack_rows(torch.zeros(rows, 2, dtype=torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_codes_of_any_integer_type_pack_alike(dtype: torch.dtype) -> None:
    codes = torch.arange(64).view(32, 2) % 8
    assert torch.equal(pack_rows(codes.to(dtype), 3), pack_rows(codes, 3))
