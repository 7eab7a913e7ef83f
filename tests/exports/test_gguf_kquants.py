"""The k-quants' search: byte for byte ggml's, block by block, and better than taking the extremes."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.llamacpp_tools import find_library
from exports.gguf_layout import TYPES, Bytes, Floats
from exports.gguf_types import SLICE, dequantize, pack, quantize, unpack

K_QUANTS = ["Q4_K", "Q5_K", "Q6_K"]
LIBRARY = find_library("ggml-base")


@st.composite
def wild_weights(draw: st.DrawFn) -> Floats:
    """float32 ``[n, 256]`` of any size from denormal to large, groups of different sizes, ties, constants, zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((draw(st.integers(1, 8)), 256))
    values = values * 2.0 ** draw(st.integers(-150, 12))
    spread = draw(st.sampled_from((0, 0, 2, 8, 30)))
    values *= np.repeat(2.0 ** -rng.integers(0, spread + 1, (len(values), 16)), 16, axis=1)
    values += draw(st.sampled_from((0.0, 0.0, 1.0, -1.0))) * 2.0 ** draw(st.integers(-30, 8))
    if draw(st.booleans()):
        values = np.round(values * 4) / 4
    values = values.astype(draw(st.sampled_from((np.float16, np.float32))))
    chosen = rng.random(values.shape) < draw(st.sampled_from((0, 0.01, 0.7, 1)))
    values[chosen] = draw(st.sampled_from((0.0, -0.0, 0.5, -0.125)))
    return np.ascontiguousarray(values, np.float32)


def by_ggml(values: Floats, name: str) -> Bytes:
    """``ggml_quantize_chunk`` of libggml-base, without an importance matrix."""
    library = ctypes.CDLL(str(LIBRARY))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, columns = values.shape
    out = np.zeros((rows, TYPES[name].row_bytes(columns)), np.uint8)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, out))
    numbers = (ctypes.c_int64(number) for number in (0, rows, columns))
    assert library.ggml_quantize_chunk(TYPES[name].ggml_type, *pointers, *numbers, None) == out.nbytes
    return out


@pytest.mark.slow
@pytest.mark.skipif(LIBRARY is None, reason="libggml-base is not there: run `make llamacpp`")
@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if not kind.dense])
@settings(max_examples=2000)
@given(values=wild_weights())
def test_bytes_are_those_of_ggml(name: str, values: Floats) -> None:
    assert np.array_equal(quantize(values, name), by_ggml(values, name))


@pytest.mark.parametrize("name", K_QUANTS)
@given(values=wild_weights())
def test_blocks_do_not_know_of_each_other(name: str, values: Floats) -> None:
    """Sums over many blocks at once must not depend on how many there are."""
    single = np.concatenate([quantize(row[None], name) for row in values])
    assert np.array_equal(quantize(values, name), single)


@pytest.mark.parametrize("name", K_QUANTS)
def test_slices_do_not_show(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((SLICE // 256 + 3, 256)).astype(np.float32)
    assert np.array_equal(quantize(values.reshape(1, -1), name).reshape(len(values), -1)[-5:], quantize(values[-5:], name))


def from_extremes(values: Floats, name: str) -> Bytes:
    """Every group's scale from its least and greatest weight, no search; a super scale for each block."""
    kind = TYPES[name]
    groups = values.reshape(len(values), -1, kind.group_size)
    low, high = np.minimum(groups.min(axis=2), 0), groups.max(axis=2)
    if kind.supers == 2:
        scales, minima = (high - low) / (2**kind.bits - 1), -low
        supers = np.stack([scales.max(axis=1), minima.max(axis=1)], axis=1).astype(np.float32) / 63
        top = 63
    else:
        scales, minima = np.abs(groups).max(axis=2) / 31, np.zeros_like(low)
        supers, top = scales.max(axis=1)[:, None] / 127, 127
    halves = supers.astype(np.float16)[:, None, :]
    wide = halves.astype(np.float32)
    scales = np.clip(np.rint(scales / wide[..., 0]), 0, top) * wide[..., 0]
    minima = np.clip(np.rint(minima / wide[..., 1]), 0, top) * wide[..., 1] if kind.supers == 2 else scales * 32
    codes = np.rint((groups + minima[..., None]) / np.where(scales == 0, 1, scales)[..., None])
    codes = np.clip(codes, 0, 2**kind.bits - 1).reshape(values.shape).astype(np.uint8)
    return pack(codes, scales, -minima, halves, name)


@pytest.mark.parametrize("name", K_QUANTS)
def test_the_search_is_worth_its_while(name: str) -> None:
    """On normal weights the squared error is less than that of scales from the extremes, by a third for 4 bits."""
    values = (np.random.default_rng(1).standard_normal((64, 256)) * 0.05).astype(np.float32)
    searched, plain = (np.square(dequantize(made(values, name), name) - values).sum() for made in (quantize, from_extremes))
    assert searched < plain * {"Q4_K": 0.97, "Q5_K": 0.99, "Q6_K": 0.99}[name]


@pytest.mark.parametrize("name", K_QUANTS)
def test_groups_whose_scale_vanishes_keep_the_codes_of_the_search(name: str) -> None:
    """As in ggml: such codes do not matter, but files are compared by their bytes."""
    values = np.random.default_rng(2).standard_normal((1, 256)).astype(np.float32)
    values[0, 64:] *= 1e-6
    parts = unpack(quantize(values, name), name)
    vanished = parts.scales[0] == 0
    assert vanished.sum() >= 6
    groups = parts.codes.reshape(-1, TYPES[name].group_size)[vanished]
    assert (np.ptp(groups, axis=1) > 2 ** (TYPES[name].bits - 1)).all()


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.75, -0.75])
def test_constant_blocks(name: str, value: float) -> None:
    values = np.full((1, 256), value, np.float32)
    found = dequantize(quantize(values, name), name)
    assert np.abs(found - values).max() <= abs(value) * 2.0**-8
