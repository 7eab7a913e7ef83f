"""GPTQ packing against AutoGPTQ 0.7.1's own ``QuantLinear``, both ways, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exports.gptq import pack, unpack
from quantize.grids import SUPPORTED_BITS, Grid, QuantizedTensor, group_index

pytestmark = pytest.mark.reference
ROWS, COLUMNS = 64, 256
AutoGPTQ = Callable[[str, str], Any]


def random_tensor(bits: int, group_size: int, symmetric: bool, shuffled: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    grid = Grid(bits, group_size, symmetric)
    groups = grid.num_groups(COLUMNS)
    zeros = torch.randint(1, grid.maxq + 1, (ROWS, groups), generator=generator, dtype=torch.uint8)
    g_idx = group_index(COLUMNS, group_size)
    return QuantizedTensor(
        codes=torch.randint(0, grid.maxq + 1, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(ROWS, groups, generator=generator) * 0.1 + 0.01).half(),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        g_idx=g_idx[torch.randperm(COLUMNS, generator=generator)] if shuffled else g_idx,
        grid=grid,
    )


def their_layer(auto_gptq: AutoGPTQ, grid: Grid, dtype: torch.dtype) -> Any:
    layer = auto_gptq("nn_modules.qlinear", "qlinear_cuda").QuantLinear
    return layer(grid.bits, grid.group_size, COLUMNS, ROWS, bias=False, weight_dtype=dtype)


def their_packed_layer(auto_gptq: AutoGPTQ, tensor: QuantizedTensor) -> Any:
    """AutoGPTQ's layer after its own ``pack`` of the tensor's values."""
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = tensor.dequantize()
    layer = their_layer(auto_gptq, tensor.grid, torch.float32)
    layer.pack(linear, tensor.scales.float(), tensor.zeros.float(), tensor.g_idx)
    return layer


def their_weight(layer: Any) -> Tensor:
    """The dequantized weight, float32 ``[out, in]``: what the layer's own forward makes of the unit vectors."""
    layer.scales = layer.scales.float()
    weight: Tensor = layer(torch.eye(COLUMNS)).t()
    return weight


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
class TestBothWays:
    def test_it_packs_what_we_pack(
        self, auto_gptq: AutoGPTQ, bits: int, group_size: int, symmetric: bool, shuffled: bool
    ) -> None:
        tensor = random_tensor(bits, group_size, symmetric, shuffled)
        theirs = their_packed_layer(auto_gptq, tensor)
        ours = pack(tensor)
        for name in ("qweight", "qzeros", "g_idx"):
            assert torch.equal(ours[name], getattr(theirs, name)), name
        assert torch.equal(ours["scales"].float(), theirs.scales)

    def test_we_unpack_what_it_packs(
        self, auto_gptq: AutoGPTQ, bits: int, group_size: int, symmetric: bool, shuffled: bool
    ) -> None:
        tensor = random_tensor(bits, group_size, symmetric, shuffled)
        theirs = their_packed_layer(auto_gptq, tensor)
        found = unpack(theirs.state_dict(), tensor.grid)
        assert torch.equal(found.codes, tensor.codes)
        assert torch.equal(found.zeros, tensor.zeros)
        assert torch.equal(found.dequantize(), their_weight(theirs))

    def test_it_unpacks_what_we_pack(
        self, auto_gptq: AutoGPTQ, bits: int, group_size: int, symmetric: bool, shuffled: bool
    ) -> None:
        tensor = random_tensor(bits, group_size, symmetric, shuffled)
        theirs = their_layer(auto_gptq, tensor.grid, torch.float16)
        theirs.load_state_dict(pack(tensor))
        found = their_weight(theirs)
        assert torch.equal(found, tensor.dequantize())
