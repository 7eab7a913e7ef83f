"""SmoothQuant: the search takes what lowers the error of quantized outputs, and never raises it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.activations import quantize_inputs, token_steps
from quantize.grids import Grid, quantize_nearest
from quantize.smoothing import _ExpectedError, _importance, smoothing_scales
from quantize.solvers.base import SolverOptions

GRID = Grid(8, -1, True, 0)
DYNAMIC = SolverOptions(input_activations="dynamic", smoothquant=True)


def outlier_inputs(factor: float, rows: int = 64, columns: int = 48, seed: int = 0) -> Tensor:
    """Inputs with two channels ``factor`` times larger than the rest."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[:, (3, 17)] *= factor
    return values


def weights(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 48, generator=generator), torch.randn(8, 48, generator=generator)]


def error(inputs: Tensor, layers: list[Tensor], scales: Tensor) -> float:
    """Weighted squared error of the outputs when inputs and weights are rounded to 8 bits."""
    weight = torch.cat(layers)
    scaled, outputs = inputs / scales, inputs @ weight.t()
    rounded = quantize_inputs(scaled, token_steps(scaled)) @ quantize_nearest(weight * scales, GRID).dequantize().t()
    return float(((rounded - outputs).square().sum(1) * _importance(outputs)).sum())


def test_outlier_channels_are_made_small() -> None:
    inputs = outlier_inputs(100.0)
    scales, alpha = smoothing_scales(weights(), GRID, inputs.abs().amax(0), inputs, DYNAMIC, lambda wanted: wanted)
    assert alpha is not None and alpha >= 0.3
    assert float(scales[3]) > 5 * float(scales.median())
    assert error(inputs, weights(), scales) < 0.2 * error(inputs, weights(), torch.ones(48))


@settings(max_examples=25)
@given(st.floats(0.1, 1000), st.integers(0, 1000), st.sampled_from(["none", "dynamic", "static"]))
def test_the_search_never_raises_the_error(factor: float, seed: int, activations: str) -> None:
    inputs = outlier_inputs(factor, seed=seed)
    options = SolverOptions(input_activations=activations, smoothquant=True)
    scales, alpha = smoothing_scales(weights(), GRID, inputs.abs().amax(0), inputs, options, lambda wanted: wanted)
    assert bool((scales > 0).all())
    if activations == "dynamic":
        assert error(inputs, weights(), scales) <= error(inputs, weights(), torch.ones(48)) * (1 + 1e-5)
    if alpha is None:
        assert torch.equal(scales, torch.ones(48))


def test_a_given_alpha_is_equation_4() -> None:
    inputs, layers = outlier_inputs(10.0), weights()
    options = SolverOptions(input_activations="dynamic", smoothquant=True, smoothquant_alpha=0.7)
    scales, alpha = smoothing_scales(layers, GRID, inputs.abs().amax(0), inputs, options, lambda wanted: wanted)
    expected = inputs.abs().amax(0) ** 0.7 / torch.cat(layers).abs().amax(0) ** 0.3
    assert alpha == 0.7
    assert torch.allclose(scales / scales[0], expected / expected[0], rtol=1e-4)
    assert float(scales.max() * scales.min()) == pytest.approx(1.0, rel=1e-4)


def test_candidates_that_do_not_fit_are_left_out() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise ValueError("too large")

    inputs = outlier_inputs(100.0)
    scales, alpha = smoothing_scales(weights(), GRID, inputs.abs().amax(0), inputs, DYNAMIC, refuse)
    assert alpha is None and torch.equal(scales, torch.ones(48))


def test_channels_that_are_always_zero_do_no_harm() -> None:
    inputs = outlier_inputs(100.0)
    inputs[:, 5] = 0
    scales, _ = smoothing_scales(weights(), GRID, inputs.abs().amax(0), inputs, DYNAMIC, lambda wanted: wanted)
    assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all())


def gradual_inputs(rows: int = 256) -> Tensor:
    """Inputs whose channels differ in ways that no power of their maxima describes: size, tails, and how weights read them."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(rows, 48, generator=generator)
    values[:, :16] *= values[:, :16].abs()  # heavier tails: a larger maximum for the same energy
    return values * torch.logspace(-1, 1, 48)[torch.randperm(48, generator=generator)]


def test_descent_finds_what_no_exponent_does() -> None:
    inputs, layers = gradual_inputs(), weights()
    maxima = inputs.abs().amax(0)
    layers[0][:, 10:20] *= 10
    exponents = []
    for step in range(11):
        options = SolverOptions(input_activations="dynamic", smoothquant=True, smoothquant_alpha=step / 10)
        exponents.append(error(inputs, layers, smoothing_scales(layers, GRID, maxima, inputs, options, lambda s: s)[0]))
    scales, _ = smoothing_scales(layers, GRID, maxima, inputs, DYNAMIC, lambda wanted: wanted)
    assert error(inputs, layers, scales) < 0.9 * min(exponents)


@pytest.mark.parametrize("grid", [GRID, Grid(8, 16, False, 0)])
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_the_closed_form_is_the_error_that_rounding_makes(activations: str, grid: Grid) -> None:
    inputs, layers = torch.randn(512, 48, generator=torch.Generator().manual_seed(0)), weights()
    weight, scales = torch.cat(layers), torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.5
    scaled, maxima = inputs / scales, inputs.abs().amax(0)
    if activations == "dynamic":
        scaled = quantize_inputs(scaled, token_steps(scaled))
    elif activations == "static":
        scaled = quantize_inputs(scaled, token_steps((maxima / scales)[None]))
    rounded = scaled @ quantize_nearest(weight * scales, grid).dequantize().t()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2))
    found = ((rounded - inputs @ weight.t()).square().sum(1) * importance).sum()
    expected = _ExpectedError(weight, grid, maxima, inputs, importance, activations)(scales)
    assert float(expected) == pytest.approx(float(found), rel=0.05)


def test_one_enormous_token_does_not_take_the_scales_for_itself() -> None:
    inputs, layers = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), weights()
    inputs[0, 7] = 3000
    scales, _ = smoothing_scales(layers, GRID, inputs.abs().amax(0), inputs, DYNAMIC, lambda wanted: wanted)
    usual = inputs[1:]
    assert error(usual, layers, scales) < 1.5 * error(usual, layers, torch.ones(48))


def test_scales_that_have_to_be_equal_are() -> None:
    inputs, layers = gradual_inputs(), weights()

    def shared(wanted: Tensor) -> Tensor:
        return wanted.view(2, 24).mean(0).repeat(2)

    scales, alpha = smoothing_scales(layers, GRID, inputs.abs().amax(0), inputs, DYNAMIC, shared)
    assert alpha is not None and torch.equal(scales[:24], scales[24:])
    assert error(inputs, layers, scales) < error(inputs, layers, torch.ones(48))
