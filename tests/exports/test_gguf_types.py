"""GGUF tensor types: bytes as ggml makes them, values as it reads them, and blocks taken apart and put together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exports.gguf_layout import TYPES, Bytes, Floats
from exports.gguf_types import Blocks, dequantize, pack, quantize, unpack

ROOT = Path(__file__).parents[2]
GOLDEN = np.load(ROOT / "tests" / "golden" / "gguf_blocks.npz")
CODED = [name for name, kind in TYPES.items() if not kind.dense]
LEGACY = [name for name in CODED if TYPES[name].block_size == 32]
K_QUANTS = [name for name in CODED if TYPES[name].block_size == 256]


def in_gguf_py(name: str) -> Any:
    return gguf.GGMLQuantizationType[name]


@st.composite
def weights(draw: st.DrawFn) -> Floats:
    """float32 ``[rows, 256 or 512]``: noise of some size and distribution, with some values set to awkward ones."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((draw(st.integers(1, 3)), draw(st.sampled_from((256, 512)))))
    values = values ** draw(st.sampled_from((1, 3))) * 2.0 ** draw(st.integers(-20, 6)) + draw(st.sampled_from((0, 0, 1, -1)))
    if draw(st.booleans()):
        values = values.astype(np.float16)
    chosen = rng.random(values.shape) < draw(st.sampled_from((0, 0.01, 0.5, 1)))
    values[chosen] = draw(st.sampled_from((0.0, -0.0, 0.25, -3.0, 2.0**-24, 40.0)))
    return np.ascontiguousarray(values, np.float32)


@st.composite
def blocks(draw: st.DrawFn, name: str) -> Bytes:
    """Any bytes whose float16 numbers are finite: uint8 ``[rows, row_bytes]``."""
    kind = TYPES[name]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = rng.integers(0, 256, (draw(st.integers(1, 3)), 2, kind.type_size), np.uint8)
    halves = slice(208, 210) if name == "Q6_K" else slice(0, 2 * kind.supers)
    scales = (rng.standard_normal((len(data), 2, kind.supers)) * 2.0 ** draw(st.integers(-24, 12))).astype(np.float16)
    data[:, :, halves] = scales.view(np.uint8)
    return data.reshape(len(data), -1)


def bits(values: Floats) -> npt.NDArray[np.uint32]:
    return values.view(np.uint32)


@pytest.mark.parametrize("name", TYPES)
def test_adversarial_blocks_are_those_of_ggml(name: str) -> None:
    values = GOLDEN["values"][GOLDEN["fits"]] if name == "F16" else GOLDEN["values"]
    fits: npt.NDArray[np.bool_] = np.ones(len(values), bool)
    if name not in ("F32", "BF16", "F16"):
        fits = finite_scales(GOLDEN[name], name)
    assert fits.sum() >= 90
    assert np.array_equal(quantize(values[fits], name), GOLDEN[name][fits])
    for row in values[~fits]:
        with pytest.raises(ValueError, match="float16"):
            quantize(row[None], name)


def finite_scales(data: Bytes, name: str) -> npt.NDArray[np.bool_]:
    """Of each row, whether ggml stored finite scales: llama-quantize refuses to write others, and so does ``quantize``."""
    blocks_of = data.reshape(len(data), -1, TYPES[name].type_size)
    halves = slice(208, 210) if name == "Q6_K" else slice(0, 2 * TYPES[name].supers)
    stored = np.ascontiguousarray(blocks_of[:, :, halves]).view(np.float16)
    return np.asarray(np.isfinite(stored).all(axis=(1, 2)))


@pytest.mark.parametrize("name", [*LEGACY, "BF16"])
@given(values=weights())
def test_rounding_is_that_of_gguf_py(name: str, values: Floats) -> None:
    values = values + np.float32(0)  # gguf-py gives a block of -0 another sign of scale than ggml does
    assert np.array_equal(quantize(values, name), gguf.quantize(values, in_gguf_py(name)))


@pytest.mark.parametrize("name", CODED)
@given(data=st.data())
def test_values_are_those_of_gguf_py(name: str, data: st.DataObject) -> None:
    stored = data.draw(blocks(name))
    assert np.array_equal(bits(dequantize(stored, name)), bits(gguf.dequantize(stored, in_gguf_py(name))))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@given(values=weights())
def test_dense_types_keep_numbers_they_can_hold(name: str, values: Floats) -> None:
    held = dequantize(quantize(values, name), name)
    assert np.array_equal(held, gguf.dequantize(quantize(values, name), in_gguf_py(name)))
    assert np.array_equal(quantize(held, name), quantize(values, name))


@pytest.mark.parametrize("name", CODED)
@given(data=st.data())
def test_blocks_taken_apart_can_be_put_together(name: str, data: st.DataObject) -> None:
    stored = data.draw(blocks(name))
    assert np.array_equal(repack(unpack(stored, name), name), stored)


def repack(parts: Blocks, name: str) -> Bytes:
    return pack(parts.codes, parts.scales, parts.minima, parts.supers, name, parts.factors)


@pytest.mark.parametrize("name", CODED)
@given(values=weights())
def test_scales_times_codes_plus_minima_are_the_values(name: str, values: Floats) -> None:
    stored = quantize(values, name)
    parts = unpack(stored, name)
    size = TYPES[name].group_size
    assert parts.codes.shape == values.shape
    assert parts.scales.shape == parts.minima.shape == (len(values), values.shape[1] // size)
    found = np.repeat(parts.scales, size, axis=1) * parts.codes + np.repeat(parts.minima, size, axis=1)
    assert np.array_equal(found, dequantize(stored, name))
    if parts.supers is None or np.all(parts.supers[..., 0] != 0):
        without = pack(parts.codes, parts.scales, parts.minima, parts.supers, name)
        again = unpack(without, name)
        assert np.array_equal(dequantize(without, name), dequantize(stored, name))
        assert np.array_equal(again.codes, parts.codes)


@pytest.mark.parametrize("name", CODED)
def test_files_of_llama_quantize_survive(name: str) -> None:
    """Golden blocks hold what ggml makes of awkward weights, factors of vanished supers among it."""
    stored = GOLDEN[name][finite_scales(GOLDEN[name], name)]
    parts = unpack(stored, name)
    assert np.array_equal(repack(parts, name), stored)
    if parts.factors is not None:
        assert parts.supers is not None
        assert ((parts.supers == 0).any(axis=1) & (parts.factors != 0).any(axis=1)).any(), "no vanished super is in the test"


@pytest.mark.parametrize("name", LEGACY)
@given(values=weights())
def test_no_weight_is_further_off_than_its_step(name: str, values: Floats) -> None:
    """Half a step for codes rounded to nearest; a whole one where the largest of the other sign has no code.

    The scale itself is off by half a unit in float16's last place, or by half its smallest number.
    """
    found = unpack(quantize(values, name), name)
    size, kind = TYPES[name].group_size, TYPES[name]
    step = np.abs(np.repeat(found.scales, size, axis=1))
    largest = np.abs(values).max(axis=1, keepdims=True) * 2.0**-10 + 2.0**-24 * 2**kind.bits
    limit = step * (0.5 if kind.supers == 2 or name == "Q8_0" else 1.0) + largest
    assert np.all(np.abs(dequantize(quantize(values, name), name) - values) <= limit)


def test_leading_dimensions_stay() -> None:
    values = np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
    assert quantize(values, "Q8_0").shape == (2, 3, 68)
    assert dequantize(quantize(values, "Q8_0"), "Q8_0").shape == values.shape


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(name: str, bad: float) -> None:
    values = np.ones((2, 256), np.float32)
    values[1, 77] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(values, name)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16"])
def test_scales_beyond_float16_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="65504"):
        quantize(np.linspace(-1e9, 1e9, 256, dtype=np.float32)[None], name)


def test_shapes_and_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="48 columns are no multiple of Q4_0's block of 32"):
        quantize(np.zeros((1, 48), np.float32), "Q4_0")
    with pytest.raises(ValueError, match="35 bytes are no multiple of Q8_0's block of 34"):
        dequantize(np.zeros((1, 35), np.uint8), "Q8_0")
    with pytest.raises(ValueError, match="'Q3_K' is no tensor type known here"):
        quantize(np.zeros((1, 256), np.float32), "Q3_K")
    with pytest.raises(ValueError, match="F16 stores weights themselves"):
        unpack(np.zeros((1, 64), np.uint8), "F16")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Q4_0", {"scales": 1.0001}, "as float16"),
        ("Q4_0", {"minima": 1.5}, "-8 times the scales"),
        ("Q8_0", {"scales": 1e6}, "as float16"),
        ("Q4_1", {"minima": 1.0001}, "as float16"),
        ("Q4_K", {"scales": 1.01}, "integers from 0 to 63 times supers"),
        ("Q4_K", {"minima": -1.0}, "integers from 0 to 63 times supers"),
        ("Q6_K", {"scales": 1.01}, "-32 times the scales"),
        ("Q6_K", {"scales": 1.01, "minima": 1.01}, "integers from -128 to 127 times supers"),
        ("Q5_K", {"supers": None}, "needs supers"),
        ("Q5_K", {"factors": 1}, "factors are not the scales"),
        ("Q4_0", {"codes": 16}, "code 16 does not fit in the 4 bits"),
        ("Q6_K", {"codes": 64}, "code 64 does not fit in the 6 bits"),
    ],
)
def test_what_cannot_be_stored_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    """``change`` multiplies scales or minima, takes supers away, moves factors, sets codes."""
    rng = np.random.default_rng(3)
    parts = unpack(quantize(rng.standard_normal((2, 256)).astype(np.float32), name), name)._asdict()
    for part, by in change.items():
        if part in ("scales", "minima"):
            parts[part] = parts[part] * np.float32(by)
        elif part == "supers":
            parts[part] = None
        elif part == "factors":
            parts[part] = parts[part] // 2
        else:
            parts[part] = np.full_like(parts[part], by)
    if "factors" not in change:
        parts["factors"] = None
    with pytest.raises(ValueError, match=message):
        repack(Blocks(**parts), name)


def test_shapes_of_scales_are_checked() -> None:
    parts = unpack(quantize(np.ones((2, 64), np.float32), "Q4_1"), "Q4_1")
    with pytest.raises(ValueError, match=r"needs scales \(2, 2\), not \(2, 1\)"):
        pack(parts.codes, parts.scales[:, :1], parts.minima, None, "Q4_1")


def test_torch_is_not_needed() -> None:
    """The command has to start faster than torch is imported."""
    code = "import sys, exports.gguf_quantize; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
