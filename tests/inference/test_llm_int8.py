"""LLM.int8() in plain tensor code: its bounds, what it refuses, and that it computes what bitsandbytes computes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inference import llm_int8
from inference.llm_int8 import SCALES_OVER, int8_matmul, llm_int8_linear, outlier_columns, quantize_rows
from quantize.errors import InputError

MAX_DIFFERENCE = 1e-2  # from bitsandbytes, relative, Frobenius norm

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 40)


def random_matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_outliers(inputs: Tensor, columns: list[int], size: float = 30.0) -> Tensor:
    """The same inputs with every other token's entry in ``columns`` made ``size`` times larger, and at least ``size``."""
    changed = inputs.clone()
    part = changed[::2, columns]
    changed[::2, columns] = part * size + part.sign() * size
    return changed


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@given(sizes, sizes, seeds, st.floats(-30, 30), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_an_entry_is_off_by_at_most_half_a_step(rows: int, columns: int, seed: int, power: float, dtype: torch.dtype) -> None:
    values = random_matrix(rows, columns, seed) * (2.0**power if dtype != torch.float16 else 2.0 ** (power / 4))
    values = values.to(dtype)
    codes, scales = quantize_rows(values)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert int(codes.abs().max()) <= 127
    error = (codes.double() * scales.double()[:, None] - values.double()).abs()
    assert bool((error <= 0.5001 * scales.double()[:, None]).all())


@given(sizes, sizes, seeds)
def test_the_largest_entry_of_a_row_has_the_largest_code(rows: int, columns: int, seed: int) -> None:
    values = random_matrix(rows, columns, seed)
    codes, _ = quantize_rows(values)
    assert codes.abs().amax(1).tolist() == [127] * rows


@pytest.mark.parametrize("constant", [1.0, -3.5, 6e-8, 65504.0, 1e-38, 3e38, 1e-44])
def test_a_constant_row_keeps_its_value(constant: float) -> None:
    values = torch.full((2, 5), constant)
    codes, scales = quantize_rows(values)
    assert codes.tolist() == [[127 if constant > 0 else -127] * 5] * 2
    torch.testing.assert_close(scales * 127, values[:, 0].abs(), rtol=1e-6, atol=1e-43)


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_rows(torch.zeros(3, 4))
    assert not codes.any() and not scales.any()
    assert not llm_int8_linear(torch.zeros(3, 4), torch.ones(2, 4, dtype=torch.int8), torch.ones(2)).any()


@given(sizes, sizes, seeds, st.integers(-8, 8))
def test_a_power_of_two_scales_through(rows: int, columns: int, seed: int, power: int) -> None:
    values = random_matrix(rows, columns, seed)
    codes, scales = quantize_rows(values)
    codes_scaled, scales_scaled = quantize_rows(values * 2.0**power)
    assert torch.equal(codes, codes_scaled)
    assert torch.equal(scales * 2.0**power, scales_scaled)


@given(sizes, st.integers(1, 3000), sizes, seeds)
def test_the_integer_product_is_exact(rows: int, columns: int, out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    right = torch.randint(-128, 128, (out, columns), generator=generator).to(torch.int8)
    expected = left.long() @ right.long().t()
    assert torch.equal(int8_matmul(left, right).long(), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_int8, "_int_mm_takes", lambda *_: False)
        assert torch.equal(int8_matmul(left, right).long(), expected)


@pytest.mark.parametrize("integer_product", [True, False])
def test_the_largest_products_do_not_overflow(monkeypatch: pytest.MonkeyPatch, integer_product: bool) -> None:
    monkeypatch.setattr(llm_int8, "_int_mm_takes", lambda *_: integer_product)
    columns = llm_int8.MAX_IN_FEATURES
    low, high = (torch.full((1, columns), code, dtype=torch.int8) for code in (-128, 127))
    assert int(int8_matmul(low, high)) == -128 * 127 * columns
    with pytest.raises(InputError, match=f"in_features={columns + 1} would overflow"):
        int8_matmul(torch.zeros(1, columns + 1, dtype=torch.int8), torch.zeros(1, columns + 1, dtype=torch.int8))


def test_an_outlier_is_an_entry_at_the_threshold_or_beyond() -> None:
    inputs = torch.tensor([[0.0, 6.0, -5.9, 1.0], [0.0, 0.0, 0.0, -7.0]])
    assert outlier_columns(inputs, 6.0).tolist() == [False, True, False, True]
    assert not outlier_columns(inputs, 0).any()


@pytest.mark.parametrize("scales_over", SCALES_OVER)
def test_outlier_columns_are_multiplied_without_coding_the_input(scales_over: str) -> None:
    """Nothing but outliers: the result is the product with the decoded weights."""
    inputs = random_matrix(5, 8, 0).sign() * 7.123
    codes, scales = quantize_rows(random_matrix(6, 8, 1))
    found = llm_int8_linear(inputs, codes, scales, scales_over=scales_over)
    torch.testing.assert_close(found, inputs @ (codes.float() * scales[:, None]).t())


@given(st.integers(2, 30), st.integers(8, 64), st.integers(1, 30), seeds, st.sampled_from(SCALES_OVER))
def test_the_error_is_that_of_coding_the_inputs(tokens: int, columns: int, out: int, seed: int, scales_over: str) -> None:
    """Against the decoded weights: each product is off by at most half the token's step times the weights' magnitudes."""
    inputs = with_outliers(random_matrix(tokens, columns, seed), [1, 5]).half().float()
    codes, scales = quantize_rows(random_matrix(out, columns, seed + 1))
    weight = codes.double() * scales.double()[:, None]
    found = llm_int8_linear(inputs, codes, scales, scales_over=scales_over)
    outliers = outlier_columns(inputs, 6.0)
    covered = inputs.masked_fill(outliers if scales_over == "columns" else inputs.abs() >= 6.0, 0)
    steps = covered.abs().amax(1).double() / 127
    bound = 0.5001 * steps[:, None] * weight[:, ~outliers].abs().sum(1) + 1e-4
    assert bool(((found.double() - inputs.double() @ weight.t()).abs() <= bound).all())


def test_taking_outliers_out_is_what_makes_it_exact() -> None:
    weight = random_matrix(64, 256, 0)
    inputs = with_outliers(random_matrix(32, 256, 1), [3, 77])
    codes, scales = quantize_rows(weight)
    exact = inputs @ (codes.float() * scales[:, None]).t()
    with_threshold, without = (relative(llm_int8_linear(inputs, codes, scales, t), exact) for t in (6.0, 0.0))
    assert without > 10 * with_threshold


def test_scales_over_columns_are_never_larger() -> None:
    """A near-outlier in an outlier column costs its token's other entries precision only if scales cover entries."""
    inputs = random_matrix(32, 256, 2)
    inputs[:, 9] = 5.99
    inputs[0, 9] = 6.5
    codes, scales = quantize_rows(random_matrix(64, 256, 3))
    exact = inputs @ (codes.float() * scales[:, None]).t()
    entries, columns = (relative(llm_int8_linear(inputs, codes, scales, 6.0, None, over), exact) for over in SCALES_OVER)
    assert columns < 0.75 * entries


def test_leading_dimensions_type_and_bias() -> None:
    codes, scales = quantize_rows(random_matrix(6, 16, 0))
    inputs, bias = random_matrix(10, 16, 1, torch.float16), random_matrix(1, 6, 2)[0]
    flat = llm_int8_linear(inputs, codes, scales, bias=bias)
    assert flat.dtype == torch.float16
    assert torch.equal(llm_int8_linear(inputs.view(2, 5, 16), codes, scales, bias=bias), flat.view(2, 5, 6))
    plain = llm_int8_linear(inputs.float(), codes, scales)
    torch.testing.assert_close(flat.float(), plain + bias, rtol=2e-3, atol=2e-3)
    assert llm_int8_linear(inputs[:0], codes, scales).shape == (0, 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = torch.ones(2, 4)
    values[1, 2] = bad
    with pytest.raises(InputError, match="values holds NaN or infinity"):
        quantize_rows(values)
    with pytest.raises(InputError, match="inputs holds NaN or infinity"):
        llm_int8_linear(values, torch.ones(2, 4, dtype=torch.int8), torch.ones(2))


def test_a_finite_input_beyond_float16_is_an_outlier_and_without_outliers_refused() -> None:
    inputs = torch.ones(2, 4)
    inputs[0, 1] = 1e6
    codes, scales = torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    assert llm_int8_linear(inputs, codes, scales).tolist() == [[1e6 + 3] * 3, [4.0] * 3]
    with pytest.raises(InputError, match="NaN or infinity"):
        llm_int8_linear(inputs, codes, scales, threshold=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": -1.0}, r"threshold=-1.0 is not in \[0, inf\); use 6.0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"scales_over": "rows"}, "scales_over=rows is unknown; use one of entries, columns"),
        ({"codes": torch.ones(2, 4)}, r"codes are torch.float32 \[2, 4\]"),
        ({"codes": torch.ones(2, 5, dtype=torch.int8)}, r"use int8 \[out_features, 4\]"),
        ({"scales": torch.ones(3)}, "one for each of the 2 rows"),
        ({"inputs": torch.ones(2, 4, dtype=torch.int64)}, "inputs is torch.int64"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "inputs": torch.ones(3, 4),
        "codes": torch.ones(2, 4, dtype=torch.int8),
        "scales": torch.ones(2),
    }
    with pytest.raises(InputError, match=words):
        llm_int8_linear(**(good | arguments))


MakeLayer = Callable[[Tensor, float, Tensor | None], Any]


@pytest.fixture(scope="module")
def make_layer() -> MakeLayer:
    """``make_layer(weight, threshold, bias)``: bitsandbytes' own ``Linear8bitLt``, quantized on this machine."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    def make(weight: Tensor, threshold: float, bias: Tensor | None = None) -> Any:
        rows, columns = weight.shape
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias is not None, has_fp16_weights=False, threshold=threshold)
        layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        return layer.eval().requires_grad_(False)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_bitsandbytes_computes_the_same(make_layer: MakeLayer, dtype: torch.dtype, threshold: float, tokens: int) -> None:
    weight, bias = random_matrix(96, 160, 0, torch.float16), random_matrix(1, 96, 1)[0].to(dtype)
    inputs = with_outliers(random_matrix(tokens, 160, 2), [0, 31, 159]).to(dtype)
    layer = make_layer(weight, threshold, bias)
    codes, scales = quantize_rows(weight)
    assert torch.equal(codes, layer.weight.data)
    torch.testing.assert_close(scales * 127, layer.weight.SCB)
    expected = layer(inputs)
    found = llm_int8_linear(inputs, codes, scales, threshold, bias)
    # Single precision agrees to five digits; the rest is the rounding of 16-bit results.
    limit = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: MAX_DIFFERENCE}[dtype]
    assert relative(found, expected) <= limit


def test_bitsandbytes_takes_scales_over_entries(make_layer: MakeLayer) -> None:
    """The difference between the equation and the program is there, and is the one described."""
    weight, inputs = random_matrix(64, 256, 3, torch.float16), random_matrix(32, 256, 2)
    inputs[:, 9] = 5.9
    inputs[0, 9] = 6.5
    codes, scales = quantize_rows(weight)
    expected = make_layer(weight, 6.0, None)(inputs)
    entries, columns = (relative(llm_int8_linear(inputs, codes, scales, 6.0, None, over), expected) for over in SCALES_OVER)
    assert entries <= 1e-4
    assert columns > 1e-3


@pytest.mark.slow
def test_bitsandbytes_computes_the_same_on_the_demo_model(make_layer: MakeLayer) -> None:
    """Every linear layer of six blocks, on the inputs it really gets."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from calibration.sources import load_text
    from quantize.demo_model import demo_model

    path: Path = demo_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    text = load_text("builtin", "heldout").text
    ids = AutoTokenizer.from_pretrained(path)(text[:20000], return_tensors="pt").input_ids[:, :512]
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".layers.{index}." in name for index in (0, 1, 10, 20, 28, 29))
    }
    inputs: dict[str, Tensor] = {}
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0][0].clone()))
    model(ids, use_cache=False)
    differences, with_outlier = {}, 0
    errors: dict[str, list[float]] = {over: [] for over in SCALES_OVER}
    for name, module in layers.items():
        weight: Tensor = module.weight
        codes, scales = quantize_rows(weight.half())
        layer = make_layer(weight, 6.0, None)
        assert torch.equal(codes, layer.weight.data)
        with_outlier += bool(outlier_columns(inputs[name].half(), 6.0).any())
        differences[name] = relative(llm_int8_linear(inputs[name], codes, scales), layer(inputs[name]))
        for over, found in errors.items():
            exact = inputs[name] @ weight.t()
            found.append(relative(llm_int8_linear(inputs[name], codes, scales, scales_over=over), exact))
    worst = max(differences, key=lambda name: differences[name])
    print({f"error with scales over {over}": f"{sum(found) / len(found):.4f}" for over, found in errors.items()})
    print(f"{len(layers)} layers, {with_outlier} with outliers; largest difference {differences[worst]:.2e} ({worst})")
    assert len(layers) == 42 and with_outlier >= 10
    assert differences[worst] <= MAX_DIFFERENCE
    assert sum(errors["columns"]) < sum(errors["entries"])
