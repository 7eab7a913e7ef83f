"""Attention kernels against each other, what they move against the formulas, and 8-bit keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import attention_report
from inference.attention import attend, causal_mask
from inference.attention_naive import NaiveAttention, naive_elements
from inference.attention_tiled import TiledAttention, tiled_elements
from inference.engine import Engine
from inference.kv_cache import KVCache
from inference.kv_int8 import Int8KVCache, hadamard, quantize_heads
from inference.load import load
from quantize.errors import InputError

TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]


@given(
    st.integers(1, 20),
    st.integers(0, 20),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 999),
)
@settings(max_examples=100)
def test_all_kernels_give_the_same(
    tokens: int, earlier: int, heads: tuple[int, int], query_tile: int, key_tile: int, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = 3 * torch.randn(tokens, heads[0], 8, generator=generator)
    keys, values = torch.randn(2, heads[1], tokens + earlier, 8, generator=generator)
    mask = None
    if masked:  # any mask in which each query sees its own key at least
        mask = causal_mask(tokens, tokens + earlier) & (torch.rand(tokens, tokens + earlier, generator=generator) < 0.5)
        mask[torch.arange(tokens), torch.arange(tokens) + earlier] = True
    wanted = NaiveAttention()(queries, keys, values, mask)
    torch.testing.assert_close(TiledAttention(query_tile, key_tile)(queries, keys, values, mask), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(queries, keys, values, mask), wanted, atol=1e-5, rtol=1e-5)


def test_tiles_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="tiles of 0 and 64 rows hold nothing"):
        TiledAttention(0)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 20))
@settings(max_examples=30)
def test_what_is_moved_is_the_formula(tokens: int, heads: int, tile: int) -> None:
    queries, keys = torch.zeros(tokens, heads, 8), torch.zeros(heads, tokens, 8)
    naive, tiled = NaiveAttention(), TiledAttention(tile, 7)
    for kernel, elements in ((naive, naive_elements(tokens, 8, heads)), (tiled, tiled_elements(tokens, 8, heads, tile))):
        kernel(queries, keys, keys)
        assert kernel.traffic.read + kernel.traffic.written == elements
    assert naive.traffic.largest == heads * tokens**2


def test_memory_of_tiles_grows_with_length_and_of_scores_with_its_square(tmp_path: Path) -> None:
    short, long = (attention_report.measure(length, 2, 8, 32) for length in (128, 512))
    assert long.naive_bytes / short.naive_bytes > 12
    assert long.tiled_bytes / short.tiled_bytes < 6
    assert long.naive_bytes > 2 * 2 * 512 * 512 * 4
    assert long.tiled_bytes < long.naive_bytes / 10
    for row in (short, long):
        assert (row.naive_moved, row.tiled_moved) == (row.naive_formula, row.tiled_formula)
    assert attention_report.main(["--lengths", "16", "32", "--plot", str(tmp_path / "memory.png")]) == 0
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert attention_report.main(["--tile", "0"]) == 2


@pytest.mark.parametrize("kernel", [NaiveAttention(), TiledAttention(5, 3)])
def test_an_engine_runs_on_every_kernel(tiny_llama: Path, kernel: NaiveAttention | TiledAttention) -> None:
    model = load(tiny_llama)
    plain, other = Engine(model, 32), Engine(model, 32, attention=kernel)
    torch.testing.assert_close(other.prefill(TOKENS, 7), plain.prefill(TOKENS), atol=1e-5, rtol=0)
    torch.testing.assert_close(other.decode(3), plain.decode(3), atol=1e-5, rtol=0)


@given(st.integers(1, 4), st.integers(1, 70), st.integers(-20, 20), st.integers(0, 999))
def test_codes_and_scales_give_heads_back(rows: int, head_dim: int, magnitude: int, seed: int) -> None:
    x = torch.randn(rows, head_dim, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (magnitude / 2)
    x[0] = 0
    codes, scales = quantize_heads(x)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    back = codes.float() * scales.float()[:, None]
    # Half a step, and what float16 rounds off the scale where it cuts the largest value: 127 times half its last place.
    step = scales.float()[:, None]
    assert bool(((back - x).abs() <= 0.5 * step + 127 * torch.maximum(step * 2**-11, torch.tensor(2.0**-25))).all())


@given(st.integers(1, 130), st.integers(0, 999))
def test_spreading_keeps_products_and_shrinks_the_largest_channel(head_dim: int, seed: int) -> None:
    matrix = hadamard(head_dim)
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, head_dim, generator=generator)
    reach = float(query.norm() * key.norm())
    torch.testing.assert_close((query @ matrix) @ (key @ matrix), query @ key, atol=1e-5 * reach, rtol=0)
    block = 1 << ((head_dim & -head_dim).bit_length() - 1)
    alone = torch.zeros(head_dim)
    alone[seed % head_dim] = 100.0
    assert float((alone @ matrix).abs().max()) == pytest.approx(100 / block**0.5)


def test_an_int8_cache_is_half_a_float16_one_and_close(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    exact, rounded = Engine(model, 64), Engine(model, 64, cache_dtype=torch.int8)
    assert isinstance(rounded.cache, Int8KVCache)
    half = KVCache(model.config, 64, torch.float16)
    head_dim = model.config.head_dim
    assert rounded.cache.nbytes() == half.nbytes() * (head_dim + 2) // (2 * head_dim)
    wanted, found = exact.prefill(TOKENS), rounded.prefill(TOKENS)
    spread = float(wanted.std())
    assert 0 < float((found - wanted).abs().max()) < 0.05 * spread
    # Chunks and single tokens read the same codes.
    torch.testing.assert_close(rounded.prefill(TOKENS, 5), found, atol=1e-4, rtol=0)
    assert float((rounded.decode(3) - exact.decode(3)).abs().max()) < 0.05 * spread
    with pytest.raises(InputError, match=r"13 \+ 60 tokens do not fit into max_tokens=64"):
        rounded.cache.context([60])


def test_slots_of_an_int8_cache_are_apart(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    cache = Int8KVCache(model.config, 32, slots=3)
    alone = Engine(model, 32, cache_dtype=torch.int8)
    with torch.inference_mode():
        both = model.forward(torch.tensor([*TOKENS[:5], *TOKENS[5:]]), cache.context([5, 7], [2, 0]), torch.tensor([4, 11]))
        torch.testing.assert_close(both[0], alone.prefill(TOKENS[:5]), atol=1e-4, rtol=0)
        torch.testing.assert_close(both[1], alone.prefill(TOKENS[5:]), atol=1e-4, rtol=0)
        cache.truncate(3, 0)
        found = model.forward(torch.tensor([9]), cache.context([1], [0]))[0]
    torch.testing.assert_close(found, alone.prefill([*TOKENS[5:8], 9]), atol=1e-4, rtol=0)
