"""LLM.int8(): 8-bit matrix products in which a few columns stay in 16 bits (Dettmers et al. 2022, arXiv:2208.07339, section 3).

A linear layer's weight has one scale for each output row, its input one for each token ("vector-wise quantization", section
3.1). The 8-bit product is exact in int32, and one outer product of the scales turns it back (eq. 7)::

    X W^T  ~  c_x (x) c_w  *  (X_i8 W_i8^T)

From 6.7B parameters on, some feature dimensions of the hidden states are many times larger than the others and would leave
the rest of their token only a few codes. They are taken out (section 3.2, eq. 8): every column in ``O = {columns with an entry
of at least threshold}`` is multiplied in floating point, the others in 8 bits::

    X W^T  ~  X[:, O] W[:, O]^T  +  c_x (x) c_w * (X_i8 W_i8^T over the columns outside O)

This is the arithmetic of bitsandbytes' ``Linear8bitLt``, in plain tensor code. Its details:

* *Weights of outlier columns.* The paper keeps them in 16 bits. A saved 8-bit model has no 16-bit weights any more, so
  bitsandbytes multiplies outlier columns with the decoded int8 weights, and so does this file: what remains in floating point
  is the input, which is where the outliers are.
* *The scale of a token.* The 8-bit product of eq. 8 runs over the columns outside ``O``, so these alone would have to decide a
  token's scale. The code published with the paper, bitsandbytes, takes the scale from all entries *below the threshold*, those
  in outlier columns included, and zeroes these columns' codes afterwards: a scale that can be larger than necessary, never too
  small. ``scales_over`` chooses: ``entries`` (the default) is bitsandbytes', ``columns`` the equation's, which is more exact.
* *Which tokens make a column an outlier.* All those multiplied in one call, in the paper and in bitsandbytes (CPU and CUDA
  alike): the result for one token can depend on the tokens beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.int8_product import int8_matmul as integer_product
from quantize.errors import InputError

SCALES_OVER = ("entries", "columns")
# An int32 sum of products of two int8 numbers cannot overflow below this many columns: 2**31 / (127 * 128).
MAX_IN_FEATURES = 2**31 // (127 * 128)
_EXACT_COLUMNS = 1024  # 1024 * 127 * 128 < 2**24: whole numbers that float32 holds exactly


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8, one scale a row (arXiv:2208.07339, section 2.1, per row): ``values ~ codes * scales[:, None]``.

    Args:
        values: floating ``[rows, columns]``, finite.

    Returns:
        ``codes`` int8 ``[rows, columns]`` in -127..127, and ``scales`` float32 ``[rows]``, each a row's largest magnitude
        divided by 127. A row of zeros has scale 0 and codes 0. Each entry is off by at most half its row's scale.

    Raises:
        InputError: NaN, infinity, or not a matrix.
    """
    _check_matrix("values", values)
    wide = values.float()
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    ratio = (127 / largest)[:, None]
    # The reciprocal of zero or of a subnormal maximum is infinite; the quotient is not.
    quotient = wide / largest.masked_fill(largest == 0, 1)[:, None] * 127
    return torch.round(torch.where(torch.isfinite(ratio), wide * ratio, quotient)).to(torch.int8), largest / 127


def outlier_columns(inputs: Tensor, threshold: float) -> Tensor:
    """The set ``O`` of section 3.2: bool ``[in_features]``, True where any entry of the column is at least ``threshold``.

    Args:
        inputs: floating ``[tokens, in_features]``.
        threshold: the paper's alpha, which it sets to 6.0; 0 finds no outliers (plain vector-wise quantization).
    """
    if threshold == 0:
        return torch.zeros(inputs.shape[1], dtype=torch.bool, device=inputs.device)
    return (inputs.abs() >= threshold).any(0)


def int8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of int8 matrices, exact.

    Args:
        left: int8 ``[tokens, in_features]``.
        right: int8 ``[out_features, in_features]``.

    Returns:
        int32 ``[tokens, out_features]``.

    Raises:
        InputError: more columns than an int32 sum can hold.
    """
    columns = left.shape[1]
    if columns > MAX_IN_FEATURES:
        raise InputError(f"in_features={columns} would overflow an int32 sum; LLM.int8() allows {MAX_IN_FEATURES} at most")
    if _int_mm_takes(left, right):
        return integer_product(left, right)
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for start in range(0, columns, _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        total += (left[:, part].float() @ right[:, part].float().t()).to(torch.int32)
    return total


def _int_mm_takes(left: Tensor, right: Tensor) -> bool:
    """Whether there is an integer product on this device, and something to multiply."""
    return bool(left.numel() and right.numel()) and left.device.type in ("cpu", "cuda")


def llm_int8_linear(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    threshold: float = 6.0,
    bias: Tensor | None = None,
    scales_over: str = "entries",
) -> Tensor:
    """A linear layer in LLM.int8(): ``inputs @ weight.T + bias`` with ``weight ~ codes * scales[:, None]`` (eq. 8).

    Args:
        inputs: float16, bfloat16 or float32 ``[..., in_features]``; all leading dimensions are tokens of one batch.
        codes: int8 ``[out_features, in_features]``, as :func:`quantize_rows` or a bitsandbytes artifact gives them.
        scales: float32 ``[out_features]``; a bitsandbytes artifact stores 127 times this (``SCB``).
        threshold: entries of at least this magnitude make their column an outlier; 0 for none.
        bias: floating ``[out_features]`` or None.
        scales_over: which entries a token's scale covers. ``entries``: all below the threshold, in whatever column
            (bitsandbytes). ``columns``: those outside outlier columns (the paper's eq. 8).

    Returns:
        ``[..., out_features]`` in the type of ``inputs``; scaled and summed in float32.

    Raises:
        InputError: NaN or infinity in ``inputs``, shapes that do not fit, or an impossible threshold.
    """
    _check_arguments(inputs, codes, scales, threshold, scales_over)
    tokens = inputs.reshape(-1, inputs.shape[-1])
    _check_matrix("inputs", tokens)
    # X_f16 in the paper: wider inputs are rounded to it before they are coded, and outliers found in what is left.
    half = tokens.to(torch.float16)
    outliers = outlier_columns(half, threshold)
    left_out = outliers if scales_over == "columns" else (half.abs() >= threshold) & outliers
    token_codes, token_scales = quantize_rows(half.masked_fill(left_out, 0))
    token_codes[:, outliers] = 0
    output = int8_matmul(token_codes, codes).float() * token_scales[:, None] * scales
    if bool(outliers.any()):
        output += tokens[:, outliers].float() @ (codes[:, outliers].float() * scales[:, None]).t()
    if bias is not None:
        output += bias.float()
    return output.to(inputs.dtype).reshape(*inputs.shape[:-1], len(codes))


def _check_matrix(name: str, values: Tensor) -> None:
    if values.dim() != 2 or not values.is_floating_point():
        raise InputError(f"{name} is {values.dtype} {list(values.shape)}; LLM.int8() codes a floating matrix [rows, columns]")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} holds NaN or infinity, for which int8 has no code; use finite numbers")


def _check_arguments(inputs: Tensor, codes: Tensor, scales: Tensor, threshold: float, scales_over: str) -> None:
    if scales_over not in SCALES_OVER:
        raise InputError(f"scales_over={scales_over} is unknown; use one of {', '.join(SCALES_OVER)}")
    if not 0 <= threshold < float("inf"):
        raise InputError(f"threshold={threshold} is not in [0, inf); use 6.0, or 0 for no outliers")
    if codes.dtype != torch.int8 or codes.dim() != 2 or inputs.shape[-1:] != codes.shape[1:]:
        raise InputError(
            f"codes are {codes.dtype} {list(codes.shape)} for inputs {list(inputs.shape)}; "
            f"use int8 [out_features, {inputs.shape[-1] if inputs.dim() else 'in_features'}]"
        )
    if scales.shape != codes.shape[:1]:
        raise InputError(f"scales are {list(scales.shape)}; use one for each of the {len(codes)} rows of codes")
