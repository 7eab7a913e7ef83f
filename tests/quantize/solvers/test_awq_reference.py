"""Our AWQ against AutoAWQ 0.2.9's own code: searches for scales and clipping, and packing, on the same layers and inputs.

Where ours differs on purpose, the settings below put both on common ground: scales are rounded to float16 before weights are
(here float32), alpha is refined around the best of AutoAWQ's grid and leaving the inputs alone is tried too (here
``refinements=0``), and clipping searches more ranges (here AutoAWQ's ten). AutoAWQ runs every candidate through the module
whose output counts; ours has the quadratic form for single layers and candidates side by side for attention and MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibration.sources import load_text
from calibration.windows import pack_windows
from exports.awq import pack, unpack
from quantize.blocks import DecoderWalk, linear_layers
from quantize.checkpoint import open_checkpoint
from quantize.demo_model import demo_model
from quantize.forwards import run_block
from quantize.grids import Grid, QuantizedTensor, group_index, grouped, quantize_nearest
from quantize.owners import find_owners
from quantize.solvers.awq import (
    candidate_scales,
    hessian_blocks,
    layer_loss,
    module_loss,
    relative_magnitudes,
    search_scales,
)
from quantize.statistics import Statistics

pytestmark = pytest.mark.reference
AutoAWQ = Callable[[str], Any]
GRID = Grid(4, 64, symmetric=False, zero_min=0, scale_dtype=torch.float32)
BLOCKS = (0, 3, 7, 12, 19, 25, 29)
GROUPS = (
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
)


def quantizer(auto_awq: AutoAWQ, group_size: int = 64) -> Any:
    """AutoAWQ's quantizer without a model, with its defaults."""
    kind = auto_awq("awq.quantize.quantizer").AwqQuantizer
    made = object.__new__(kind)
    made.group_size, made.w_bit, made.zero_point, made.duo_scaling = group_size, 4, True, True
    made.n_parallel_calib_samples, made.max_chunk_memory = None, 1024**3
    return made


@pytest.fixture(autouse=True)
def _cpu_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAWQ relies on ``Tensor.cpu`` making a copy of weights that it goes on to change, which it does not on a CPU."""
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)


def weights_of(layers: list[nn.Module]) -> list[Tensor]:
    return [layer.get_parameter("weight").detach().float().clone() for layer in layers]


@pytest.mark.parametrize("seed", range(10))
def test_the_same_scales_on_random_layers(auto_awq: AutoAWQ, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, 128, 128, generator=generator) * torch.rand(128, generator=generator).mul(6).exp()
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data = torch.randn(64, 128, generator=generator) * 0.05
    weights, statistics = weights_of([layer]), Statistics(means=True)
    statistics.add(inputs)
    theirs = quantizer(auto_awq)._search_best_scale(nn.Sequential(layer), layer, [layer], inputs)[2]
    loss = layer_loss(weights, [GRID], statistics.hessian())
    magnitudes = relative_magnitudes(weights, [GRID])
    scales, _, coarse = search_scales(statistics.means(), magnitudes, loss, refinements=0)
    torch.testing.assert_close(scales, theirs, rtol=1e-4, atol=1e-6)
    assert search_scales(statistics.means(), magnitudes, loss)[2] <= coarse


def check_block(auto_awq: AutoAWQ, index: int) -> list[bool]:
    """Whether each search of a block of SmolLM2 ends with AutoAWQ's alpha; asserts that refining never raises the loss."""
    walk, hidden, arguments = real_inputs()[index]
    same = []
    with walk.loaded_block(index) as block:
        layers, inputs = linear_layers(block), {}
        handles = [
            layers[group[0]].register_forward_pre_hook(lambda _, args, name=group[0]: inputs.update({name: args[0].detach()}))
            for group in GROUPS
        ]
        run_block(block, hidden, arguments)
        for handle in handles:
            handle.remove()
        owners = find_owners(block, GROUPS, hidden[:1], arguments)
        for group in GROUPS:
            own, seen, owner = [layers[name] for name in group], inputs[group[0]], owners.get(group[0])
            weights, grids, statistics = weights_of(own), [GRID] * len(group), Statistics(means=True)
            statistics.add(seen)
            loss = layer_loss(weights, grids, statistics.hessian())
            module, kwargs = None, {}
            if owner is not None:
                windows = list(torch.split(seen, 1))
                loss = module_loss(weights, grids, functools.partial(owner.error, windows))
                module, kwargs = owner.module, {key: value for key, value in owner.kwargs.items() if key in PASSED}
            magnitudes = relative_magnitudes(weights, grids)
            scales, alpha, coarse = search_scales(statistics.means(), magnitudes, loss, refinements=0)
            assert search_scales(statistics.means(), magnitudes, loss)[2] <= coarse * (1 + 1e-6)
            theirs = quantizer(auto_awq)._search_best_scale(block, own[0], own, seen, module, dict(kwargs))[2]
            candidates = candidate_scales(statistics.means(), magnitudes, [step / 20 for step in range(20)])
            chosen = int((candidates - theirs).abs().amax(1).argmin())
            torch.testing.assert_close(candidates[chosen], theirs, rtol=1e-3, atol=1e-5)
            same.append(alpha == chosen / 20)
            assert alpha is not None and bool((scales > 0).all())
    return same


PASSED = ("position_embeddings", "attention_mask", "position_ids")  # what AutoAWQ hands to an attention module


@functools.cache
def real_inputs() -> dict[int, tuple[DecoderWalk, Tensor, Any]]:
    """Hidden states of built-in text that enter some of SmolLM2's blocks, float32, and the blocks' other arguments."""
    walk = DecoderWalk(open_checkpoint(str(demo_model())), torch.device("cpu"), torch.float32)
    windows = pack_windows(walk.checkpoint.tokenizer(), load_text("builtin", "train"), num_samples=4, seq_len=256, seed=0)
    arguments, hidden, found = walk.block_arguments(256), walk.block_inputs(windows), {}
    for index in range(max(BLOCKS) + 1):
        if index in BLOCKS:
            found[index] = (walk, hidden, arguments[index])
        with walk.loaded_block(index) as block, torch.no_grad():
            hidden = run_block(block, hidden, arguments[index])
    return found


@pytest.mark.slow
@torch.no_grad()
def test_the_same_alpha_on_real_layers(auto_awq: AutoAWQ) -> None:
    same = [equal for index in BLOCKS for equal in check_block(auto_awq, index)]
    assert sum(same) >= 0.95 * len(same), f"{sum(same)} of {len(same)} searches end with AutoAWQ's alpha"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("index", [0, 12])
def test_the_same_clipping_on_real_layers(auto_awq: AutoAWQ, index: int) -> None:
    walk, hidden, arguments = real_inputs()[index]
    with walk.loaded_block(index) as block:
        layer, seen = linear_layers(block)["mlp.up_proj"], []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)[:512]))
        run_block(block, hidden, arguments)
        handle.remove()
        weight = weights_of([layer])[0]
        theirs = quantizer(auto_awq)._compute_best_clip(layer.weight.data, seen[0])
    statistics = Statistics()
    statistics.add(seen[0])
    groups, blocks = grouped(weight, GRID).transpose(0, 1), hessian_blocks(statistics.hessian(), GRID)
    reach, errors = groups.abs().amax(-1), []
    for step in range(10):
        limit = (reach * (1 - step / 20))[..., None]
        clipped = torch.minimum(torch.maximum(groups, -limit), limit)
        scale, zero = GRID.find_params(clipped)
        error = GRID.round_trip(clipped, scale[..., None], zero[..., None]) - groups
        errors.append((torch.bmm(error, blocks) * error).sum(-1))
    chosen = torch.stack(errors).argmin(0)
    expected = torch.round((1 - theirs[..., 0].t() / reach) * 20)
    assert float((chosen == expected).float().mean()) >= 0.99


def random_tensor(group_size: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(group_size)
    grid = Grid(4, group_size, symmetric=False, zero_min=0)
    groups = grid.num_groups(256)
    return QuantizedTensor(
        codes=torch.randint(0, 16, (64, 256), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(64, groups, generator=generator) * 0.1 + 0.01).half(),
        zeros=torch.randint(0, 16, (64, groups), generator=generator, dtype=torch.uint8),
        g_idx=group_index(256, group_size),
        grid=grid,
    )


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
class TestPackingBothWays:
    def test_it_packs_what_we_pack(self, auto_awq: AutoAWQ, group_size: int) -> None:
        tensor = random_tensor(group_size)
        linear = nn.Linear(256, 64, bias=False)
        linear.weight.data = tensor.dequantize()
        size = tensor.grid.columns_per_group(256)
        zeros, scales = tensor.zeros.t().float().contiguous(), tensor.scales.t().float().contiguous()
        layer = auto_awq("awq.modules.linear.gemm").WQLinear_GEMM
        theirs, ours = layer.from_linear(linear, 4, size, False, scales, zeros), pack(tensor)
        for name in ("qweight", "qzeros", "scales"):
            assert torch.equal(ours[name], getattr(theirs, name)), name
        assert torch.equal(unpack(theirs.state_dict(), tensor.grid).codes, tensor.codes)

    def test_it_reads_what_we_pack(self, auto_awq: AutoAWQ, group_size: int) -> None:
        tensor = random_tensor(group_size)
        stored, size = pack(tensor), tensor.grid.columns_per_group(256)
        unpacking = auto_awq("awq.utils.packing_utils").dequantize_gemm
        theirs = unpacking(stored["qweight"], stored["qzeros"], stored["scales"].float(), 4, size)
        assert torch.equal(theirs.t(), tensor.dequantize())


def test_rounding_is_the_same(auto_awq: AutoAWQ) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    theirs, _, zeros = quantizer(auto_awq).pseudo_quantize_tensor(weight)
    ours = quantize_nearest(weight, GRID)
    torch.testing.assert_close(ours.dequantize(), theirs)
    assert torch.equal(ours.zeros.float(), zeros)
