"""Round-to-nearest and the pass-through: what they do, and what they do without."""

from __future__ import annotations

import pytest
import torch

from quantize.grids import SUPPORTED_BITS, Grid
from quantize.solvers import SOLVERS, LayerProblem, SolverOptions


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_weight_goes_to_its_nearest_grid_value(bits: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits, 16, symmetric=False)
    (found,) = SOLVERS["rtn"].solve(LayerProblem(["layer"], [weight], grid, None, SolverOptions()))
    codes = torch.arange(2**bits).view(-1, 1, 1)
    scales, zeros = (part.float().repeat_interleave(16, 1) for part in (found.scales, found.zeros))
    distances = (((codes - zeros) * scales) - weight).abs()
    chosen = distances.gather(0, found.codes.long()[None])[0]
    assert torch.allclose(chosen, distances.amin(0), rtol=1e-4, atol=1e-7)


def test_layers_are_quantized_one_by_one_without_data() -> None:
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (8, 24)]
    options = SolverOptions(desc_act=True, search_steps=2)
    solver = SOLVERS["rtn"]
    assert solver.quantizes and not solver.needs_calibration
    together = solver.solve(LayerProblem(["a", "b"], weights, Grid(4, 32), torch.rand(64, 64), options))
    for weight, found in zip(weights, together, strict=True):
        (alone,) = solver.solve(LayerProblem(["a"], [weight], Grid(4, 32), None, options))
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.scales, alone.scales)
        # No activation order without activations.
        assert found.g_idx.tolist() == [0] * 32 + [1] * 32


def test_eight_bits_are_nearly_lossless() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    (found,) = SOLVERS["rtn"].solve(LayerProblem(["layer"], [weight], Grid(8, 32), None, SolverOptions()))
    assert float((found.dequantize() - weight).norm() / weight.norm()) < 0.01


def test_pass_through_solves_nothing() -> None:
    solver = SOLVERS["none"]
    assert not solver.quantizes and not solver.needs_calibration
    with pytest.raises(ValueError, match="quantizes nothing, but was given a"):
        solver.solve(LayerProblem(["a"], [torch.zeros(8, 8)], Grid(4), None, SolverOptions()))
