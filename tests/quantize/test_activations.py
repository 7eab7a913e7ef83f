"""Quantized inputs: bounds on the error, and what each observer clips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.activations import fixed_step, quantize_inputs, token_steps


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    """Tokens of any spread, some channels far larger than the rest."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(draw(st.integers(1, 6)), 32, generator=generator) * 10 ** draw(st.floats(-4, 4))
    values[:, :: draw(st.integers(1, 40))] *= draw(st.sampled_from([1.0, 100.0]))
    return values


@given(inputs())
def test_every_input_is_within_half_a_step(values: Tensor) -> None:
    steps = token_steps(values)
    assert steps.shape == (len(values), 1)
    error = (quantize_inputs(values, steps) - values).abs()
    # The largest value lies at 127.5 steps, between the last code and one that does not exist.
    assert bool((error <= 0.5 * steps * (1 + 1e-4)).all())


@given(inputs(), st.floats(1e-3, 1e3))
def test_scaling_the_inputs_scales_the_result(values: Tensor, factor: float) -> None:
    result = quantize_inputs(values * factor, token_steps(values * factor))
    expected = quantize_inputs(values, token_steps(values)) * factor
    # A value half way between two codes may go either way.
    step = token_steps(values) * factor
    assert bool(((result - expected).abs() <= 1.001 * step).all())
    assert ((result - expected).abs() > 1e-3 * step).float().mean() < 0.1


@given(inputs())
def test_quantized_inputs_are_fixed_points(values: Tensor) -> None:
    steps = token_steps(values)
    once = quantize_inputs(values, steps)
    assert torch.equal(quantize_inputs(once, steps), once)


def test_tokens_of_zeros_stay_zero() -> None:
    assert torch.equal(quantize_inputs(torch.zeros(2, 8), token_steps(torch.zeros(2, 8))), torch.zeros(2, 8))
    step = fixed_step(torch.zeros(8), torch.zeros(2, 8), "minmax")
    assert torch.equal(quantize_inputs(torch.zeros(2, 8), step), torch.zeros(2, 8))


@given(inputs())
def test_minmax_clips_nothing_and_mse_is_never_worse(values: Tensor) -> None:
    maxima = values.abs().amax(0)
    widest, best = (fixed_step(maxima, values, observer) for observer in ("minmax", "mse"))
    assert torch.allclose(widest * 127.5, maxima.max())
    error = {float(step): float((quantize_inputs(values, step) - values).square().sum()) for step in (widest, best)}
    assert float(best) <= float(widest) * (1 + 1e-6)
    assert error[float(best)] <= error[float(widest)] * (1 + 1e-5)


def test_percentile_ignores_the_outliers_it_is_told_to() -> None:
    values = torch.linspace(0, 1, 1000).view(10, 100)
    values[3, 7] = 1000
    maxima = values.abs().amax(0)
    assert float(fixed_step(maxima, values, "percentile", 99.0)) == pytest.approx(0.99 / 127.5, rel=0.01)
    assert float(fixed_step(maxima, values, "percentile", 100.0)) == pytest.approx(1000 / 127.5)
    assert float(fixed_step(maxima, values, "minmax")) == pytest.approx(1000 / 127.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        fixed_step(torch.tensor([1.0, bad]), torch.ones(2, 2), "minmax")


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(ValueError, match="observer entropy is unknown"):
        fixed_step(torch.ones(2), torch.ones(2, 2), "entropy")
