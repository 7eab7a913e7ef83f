"""Every kind of linear layer against its formula written out in integers and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference.int8_product import DirectProduct, SplitProduct, int8_matmul, int8_matmul_padded, int8_product
from inference.linear import (
    DenseLinear,
    HalfStoredLinear,
    Int8Linear,
    Int8WeightOnlyLinear,
    PackedLinear,
    SideBySide,
    digits,
    half_stored_fits,
    packed_fits,
    quantize_rows,
)
from quantize.errors import InputError


@st.composite
def problems(draw: st.DrawFn, groups: bool = True) -> dict[str, Any]:
    """Sizes, seeds and magnitudes of one layer and its input."""
    group_count = draw(st.sampled_from([1, 1, 2, 3])) if groups else 1
    columns = group_count * draw(st.integers(1, 40))
    rows, tokens = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = 10.0 ** draw(st.integers(-6, 4))
    x = torch.randn(tokens, columns, generator=generator) * magnitude
    if draw(st.booleans()):
        x[draw(st.integers(0, tokens - 1))] = 0
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, group_count, generator=generator) * 0.1 + 1e-4
    bias = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    return {"x": x, "codes": codes, "scales": scales, "bias": bias}


def expected(codes_x: Tensor, scale_x: Tensor, problem: dict[str, Any]) -> Tensor:
    """``sum over groups of scale * (int64 product) * scale_x + bias``, float64."""
    codes, scales = problem["codes"].long(), problem["scales"].double()
    grouped = codes.view(len(codes), scales.shape[1], -1)
    products = torch.einsum("tgc,rgc->trg", codes_x.long().view(len(codes_x), scales.shape[1], -1), grouped)
    out: Tensor = (products.double() * scales).sum(-1) * scale_x.double()
    return out if problem["bias"] is None else out + problem["bias"].double()


def close(found: Tensor, wanted: Tensor, problem: dict[str, Any], relative: float = 3e-6) -> bool:
    """Whether the difference is rounding: relative to the largest sum of magnitudes, which cancellation cannot shrink."""
    weight = problem["codes"].double().abs() * problem["scales"].double().repeat_interleave(
        problem["codes"].shape[1] // problem["scales"].shape[1], 1
    )
    reach = problem["x"].double().abs() @ weight.t() + (0 if problem["bias"] is None else problem["bias"].double().abs())
    return bool(((found.double() - wanted).abs() <= relative * reach + 1e-30).all())


@given(problems())
def test_dynamic_int8_equals_the_integer_formula(problem: dict[str, Any]) -> None:
    codes, scale = quantize_rows(problem["x"])
    layer = Int8Linear(problem["codes"], problem["scales"], problem["bias"])
    assert close(layer(problem["x"]), expected(codes, scale, problem), {**problem, "x": codes * scale})


@given(problems(), st.floats(1e-3, 10))
def test_static_int8_equals_the_integer_formula(problem: dict[str, Any], input_scale: float) -> None:
    scale = torch.tensor([input_scale])
    codes = (problem["x"] / scale).round().clamp(-128, 127)
    layer = Int8Linear(problem["codes"], problem["scales"], problem["bias"], scale)
    # Clipped inputs make sums of other sizes than the inputs themselves: bound by what the codes stand for.
    bound = {**problem, "x": codes * scale}
    assert close(layer(problem["x"]), expected(codes, scale, problem), bound)


@given(problems())
def test_weight_only_int8_equals_the_dequantized_product(problem: dict[str, Any]) -> None:
    codes, scales = problem["codes"], problem["scales"]
    weight = codes.double() * scales.double().repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    wanted = problem["x"].double() @ weight.t() + (0 if problem["bias"] is None else problem["bias"].double())
    found = Int8WeightOnlyLinear(codes, scales, problem["bias"])(problem["x"])
    assert close(found, wanted, problem, 1e-5)


@given(problems())
def test_bfloat16_int8_layers_stay_within_bfloat16(problem: dict[str, Any]) -> None:
    narrow = {**problem, "x": problem["x"].bfloat16(), "bias": None}
    codes, scale = quantize_rows(narrow["x"])
    dynamic = Int8Linear(problem["codes"], problem["scales"])(narrow["x"])
    assert dynamic.dtype == torch.bfloat16
    # Rounded inputs may be larger than the inputs: bound by what the codes stand for.
    assert close(dynamic, expected(codes, scale, narrow), {**narrow, "x": codes * scale}, 2**-8)
    scales = problem["scales"].double().repeat_interleave(problem["codes"].shape[1] // problem["scales"].shape[1], 1)
    wanted = narrow["x"].double() @ (problem["codes"].double() * scales).t()
    weight_only = Int8WeightOnlyLinear(problem["codes"], problem["scales"])(narrow["x"])
    assert weight_only.dtype == torch.bfloat16
    assert close(weight_only, wanted, narrow, 2**-6)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 64, 64), (1, 960, 576), (5, 192, 1536), (19, 64, 128)])
def test_the_bfloat16_weight_only_kernel_stays_within_bfloat16(tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, 1, generator=generator) * 0.1 + 1e-4
    wanted = x.double() @ (codes.double() * scales.double()).t()
    problem = {"x": x, "codes": codes, "scales": scales, "bias": None}
    assert close(Int8WeightOnlyLinear(codes, scales)(x), wanted, problem, 2**-7)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 2000), st.integers(0, 1000), st.booleans())
def test_int8_products_are_exact(rows: int, outputs: int, columns: int, seed: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    span = (-128, 128)
    x = torch.randint(*span, (rows, columns), generator=generator, dtype=torch.int8)
    codes = torch.randint(*span, (outputs, columns), generator=generator, dtype=torch.int8)
    if extreme:  # what would saturate 16-bit sums of two byte products
        x, codes = torch.where(x < 0, -128, 127).to(torch.int8), torch.where(codes < 0, -128, 127).to(torch.int8)
    wanted = x.long() @ codes.long().t()
    assert torch.equal(DirectProduct(codes)(x).long(), wanted)
    if "fbgemm" in torch.backends.quantized.supported_engines and int(wanted.abs().max()) < 2**24:
        assert torch.equal(SplitProduct(codes)(x).long(), wanted)


@given(problems(groups=False))
def test_digits_are_the_inputs_to_24_bits(problem: dict[str, Any]) -> None:
    x = problem["x"]
    parts, scale = digits(x)
    whole = (parts.double() * torch.tensor([65536.0, 256.0, 1.0], dtype=torch.float64).view(3, 1, 1)).sum(0) * scale.double()
    largest = x.double().abs().amax(-1, keepdim=True)
    assert parts.dtype == torch.int8
    assert bool(((whole - x.double()).abs() <= 2**-23 * largest).all())


@given(problems(groups=False))
def test_rows_are_quantized_as_compressed_tensors_does(problem: dict[str, Any]) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = problem["x"][problem["x"].any(-1)]
    codes, scale = quantize_rows(x)
    if not len(x):
        return
    arguments = QuantizationArgs(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
    batched = x[None]  # the package reads dimensions 0 and 1 as batch and token
    their_scale, zero = compute_dynamic_scales_and_zp(batched, arguments, torch.nn.Identity())
    assert torch.equal(their_scale[0], scale)
    assert torch.equal(quantize(batched, their_scale, zero, arguments, dtype=torch.int8)[0], codes)


def test_rows_of_zeros_have_codes_of_zero() -> None:
    codes, scale = quantize_rows(torch.zeros(2, 5))
    assert not codes.any()
    assert bool((scale > 0).all())


@given(st.integers(1, 40), st.integers(1, 600), st.integers(1, 40), st.sampled_from([-128, 127]), st.sampled_from([-128, 127]))
@settings(max_examples=50)
def test_the_product_is_exact_at_the_extremes(m: int, k: int, n: int, left: int, right: int) -> None:
    # Kernels that pair products in 16 bits would saturate here.
    x, w = torch.full((m, k), left, dtype=torch.int8), torch.full((n, k), right, dtype=torch.int8)
    assert torch.equal(int8_matmul(x, w), torch.full((m, n), left * right * k, dtype=torch.int32))


@given(problems(groups=False))
def test_padding_for_cuda_changes_nothing(problem: dict[str, Any]) -> None:
    codes, _ = quantize_rows(problem["x"])
    wanted = (codes.long() @ problem["codes"].long().t()).int()
    assert torch.equal(int8_matmul_padded(codes, problem["codes"]), wanted)


def test_a_device_without_an_integer_product_is_refused() -> None:
    meta = torch.zeros(2, 2, dtype=torch.int8, device="meta")
    with pytest.raises(InputError, match=r"device=meta .* use device=cpu"):
        int8_matmul(meta, meta)


@given(problems(groups=False), st.booleans())
def test_dense_layouts_give_the_same_numbers(problem: dict[str, Any], as_bfloat: bool) -> None:
    weight = (problem["codes"].float() * problem["scales"]).to(torch.bfloat16 if as_bfloat else torch.float16)
    bound = {**problem, "codes": weight.float(), "scales": torch.ones(1, 1)}
    wanted = problem["x"].double() @ weight.double().t() + (0 if problem["bias"] is None else problem["bias"].double())
    assert close(DenseLinear(weight.float(), problem["bias"])(problem["x"]), wanted, bound, 1e-5)
    assert packed_fits(weight, torch.float32)
    assert close(PackedLinear(weight, problem["bias"])(problem["x"]), wanted, bound, 1e-5)
    if half_stored_fits(weight, torch.float32):
        assert close(HalfStoredLinear(weight, problem["bias"])(problem["x"]), wanted, bound, 1e-5)


def test_16_bit_storage_is_used_only_where_it_is_exact() -> None:
    assert half_stored_fits(torch.randn(4, 4).half(), torch.float32)
    assert half_stored_fits(torch.tensor([[0.5, 1.25]]).bfloat16(), torch.float32)
    assert not half_stored_fits(torch.tensor([[1e-30, 1.0]]).bfloat16(), torch.float32)
    assert not half_stored_fits(torch.tensor([[0.1]]), torch.float32)
    assert not half_stored_fits(torch.randn(4, 4).half(), torch.bfloat16)


def test_a_wide_weight_is_widened_in_pieces() -> None:
    codes = torch.randint(-128, 128, (1000, 700), dtype=torch.int8)  # 700 000 weights, in chunks of 374 rows
    layer = Int8WeightOnlyLinear(codes, torch.full((1000, 1), 0.5))
    x = torch.eye(700)[:3]
    assert torch.equal(layer(x), codes[:, :3].t().float() * 0.5)


def test_bytes_are_those_held() -> None:
    codes, scales, weight = torch.zeros(6, 4, dtype=torch.int8), torch.ones(6, 1), torch.zeros(6, 4)
    kernel = int8_product(codes)
    assert DirectProduct(codes).nbytes() == 24
    assert Int8Linear(codes, scales).nbytes() == kernel.nbytes() + 24
    # A kernel with a layout of its own stands beside the codes that prefill widens.
    copied = 0 if isinstance(kernel, DirectProduct) else kernel.nbytes()
    assert Int8WeightOnlyLinear(codes, scales).nbytes() == 24 + 24 + copied
    assert Int8Linear(codes, scales, torch.zeros(6), torch.ones(1)).nbytes() == kernel.nbytes() + 24 + 24 + 4
    assert DenseLinear(weight).nbytes() == PackedLinear(weight).nbytes() == 96
    assert HalfStoredLinear(weight).nbytes() == 48
    both = SideBySide([DenseLinear(weight), Int8Linear(codes, scales)])
    assert both.nbytes() == 96 + kernel.nbytes() + 24
    assert both.out_features == 12
    assert both(torch.ones(2, 4)).shape == (2, 12)
