"""GGUF's grids: what they find is what the file can store, and no worse than llama.cpp's own choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exports.gguf import common_step, pack_layer
from exports.gguf_types import dequantize, quantize
from quantize.errors import InputError
from quantize.gguf_grids import KINDS, gguf_grid, shared_step
from quantize.grids import QuantizedTensor, group_index

COLUMNS = 512
kinds = st.sampled_from(KINDS)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(3, COLUMNS, generator=generator) * 10 ** draw(st.floats(-3, 1))
    values += values.std() * draw(st.floats(-3, 3))
    if draw(st.booleans()):
        values[0, draw(st.integers(0, COLUMNS - 1))] *= 20
    if draw(st.booleans()):
        values[1] = 0
    return values


def nearest(values: Tensor, kind: str, search_steps: int = 0) -> QuantizedTensor:
    grid = gguf_grid(kind)
    groups = group_index(COLUMNS, grid.group_size)
    found = grid.find_params(values.view(len(values), -1, grid.group_size), None, search_steps, 0.6)
    scales, zeros = grid.settle(*found)
    codes = grid.encode(values, scales[:, groups.long()], zeros[:, groups.long()]).to(torch.uint8)
    return QuantizedTensor(codes, scales.to(grid.scale_dtype), zeros, groups, grid)


@given(weights(), kinds, st.sampled_from([0, 8]))
def test_the_file_holds_what_the_grid_says(values: Tensor, kind: str, search_steps: int) -> None:
    tensor = nearest(values, kind, search_steps)
    stored = torch.from_numpy(dequantize(pack_layer(tensor, kind), kind))
    expected = tensor.dequantize()
    largest = expected.view(len(values), -1, tensor.grid.group_size).abs().amax(-1).repeat_interleave(tensor.grid.group_size, 1)
    assert bool(((stored - expected).abs() <= 3e-6 * largest + 1e-9).all())


@given(weights(), st.sampled_from([kind for kind in KINDS if "K" not in kind]))
def test_what_is_stored_in_fp16_is_settled_once(values: Tensor, kind: str) -> None:
    tensor = nearest(values, kind)
    scales, zeros = tensor.grid.settle(tensor.scales.float(), tensor.zeros)
    assert torch.equal(scales, tensor.scales.float())
    assert torch.allclose(zeros, tensor.zeros, rtol=1e-5, atol=1e-6)


@given(weights(), st.sampled_from([kind for kind in KINDS if "K" in kind]))
def test_a_super_blocks_scales_are_nearest_multiples_of_its_step(values: Tensor, kind: str) -> None:
    grid = gguf_grid(kind)
    wanted, zeros = grid.find_params(values.view(len(values), -1, grid.group_size))
    levels, together = (127, 16) if kind == "Q6_K" else (63, 8)
    step = shared_step(wanted, levels, together)
    settled, _ = grid.settle(wanted, zeros)
    codes = settled / step
    assert torch.allclose(codes, codes.round(), rtol=1e-6) and bool((codes.abs() >= 1).all() and (codes.abs() <= levels).all())
    inside = (wanted / step).abs() <= levels
    assert bool(((settled - wanted).abs() <= step * (0.5 + 1e-4) + (wanted.abs() < step) * step)[inside].all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_is_no_worse_than_llama_cpps_choice(kind: str) -> None:
    values = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.04
    ours = (nearest(values, kind, 40).dequantize() - values).square().sum()
    theirs = (torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind)) - values).square().sum()
    assert float(ours) < float(theirs)


def test_q4_0_keeps_llama_cpps_sign() -> None:
    values = torch.tensor([[0.9, -0.3] * 16 + [-0.9, 0.3] * 16])
    grid = gguf_grid("Q4_0")
    scales, zeros = grid.find_params(values.view(1, 2, 32))
    assert scales[0, 0] < 0 < scales[0, 1] and bool((zeros == 8).all())
    assert bool((grid.encode(values.view(1, 2, 32), scales[..., None], zeros[..., None])[0, :, 0] == 0).all())


@given(st.integers(0, 2**32), st.sampled_from([(8, 63), (16, 127)]))
def test_the_common_step_is_found_again(seed: int, shape: tuple[int, int]) -> None:
    together, limit = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, limit + 1, (5, 3 * together), generator=generator).float()
    steps = (10 ** (torch.rand(5, 3, generator=generator) * 6 - 5)).half().float().repeat_interleave(together, 1)
    found = common_step((codes * steps).numpy(), together, limit)
    wide = torch.from_numpy(found).float().repeat_interleave(together, 1)
    again = torch.round(codes * steps / wide.clamp(min=1e-12))
    assert bool((again <= limit).all()) and torch.allclose(again * wide, codes * steps, rtol=1e-6)


def test_scales_without_a_common_step_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiples"):
        common_step((torch.rand(1, 8) + 0.5).double().numpy(), 8, 63)


def test_bad_kinds_and_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="Q4_0"):
        gguf_grid("IQ2_XXS")
    with pytest.raises(InputError, match=r"in_features=576 of layer is no multiple of 256"):
        gguf_grid("Q4_K").check_divides("layer", 576)
