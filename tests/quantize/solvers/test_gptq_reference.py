"""Our GPTQ against AutoGPTQ 0.7.1's own ``GPTQ.fasterquant`` and ``QuantLinear.pack``, on the same layers and inputs.

Where ours differs on purpose, the settings below put both on common ground:

- Scales are rounded to float16 before rounding weights, so that the solver's error is the artifact's: here float32.
- Zero points are at least 1, which the GPTQ v1 format needs: here 0 is allowed.
- Scales are searched for with the Hessian's diagonal as weight: here min-max, as AutoGPTQ does.
- AutoGPTQ takes a group's range from weights that lack the updates of the current lazy block (``W``, not ``W1``), so every
  group after the first of a block has a stale scale; ours are current. With ``blocksize=group_size`` nothing is stale.
- With ``static_groups`` and ``actorder`` together its returned ``g_idx`` is permuted twice; ours is compared with what its
  codes were really made with.

Two more things would make equal methods differ. A symmetric min-max grid puts every group's most negative weight exactly
half way between two codes, and the last bit of the arithmetic decides: here both scales are a thousandth wider. And rounding
turns float32 noise into different codes, each of which changes the rest of its row: both run in float64 (AutoGPTQ's own code,
with ``Tensor.float`` made ``Tensor.double``), which leaves no excuse. One test runs both in float32, as users do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibration.sources import load_text
from calibration.windows import pack_windows
from quantize.blocks import DecoderWalk, linear_layers
from quantize.checkpoint import open_checkpoint
from quantize.demo_model import demo_model
from quantize.forwards import run_block
from quantize.grids import SUPPORTED_BITS, Grid
from quantize.solvers import LayerProblem, SolverOptions
from quantize.solvers.gptq import solve

pytestmark = pytest.mark.reference
DAMP = 0.01
REAL = ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
WIDER = 1 + 2**-10
AutoGPTQ = Callable[[str, str], Any]
Layer = tuple[Tensor, list[Tensor]]  # weight [out, in], inputs [tokens, in] in batches


@dataclass(frozen=True)
class WiderGrid(Grid):
    """No weight lies half way between two codes just because it is the group's extreme."""

    def params_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = super().params_from_range(low, high)
        return scale * WIDER, zero


@pytest.fixture(scope="module", autouse=True)
def _layers_in_float32(request: pytest.FixtureRequest) -> None:
    """Make the cached layers before any test changes the default type."""
    random_layer()
    if any(item.get_closest_marker("slow") for item in request.session.items):
        real_layers()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both implementations in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theirs(auto_gptq: AutoGPTQ, layer: Layer, grid: Grid, desc_act: bool, static_groups: bool) -> tuple[Tensor, Tensor]:
    """Dequantized weight and Hessian of AutoGPTQ's run."""
    weight, batches = layer
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    quantizer = auto_gptq("quantization", "quantizer").Quantizer
    find_params = quantizer.find_params

    def find_wider(self: Any, values: Tensor, weight: bool = False) -> None:
        find_params(self, values, weight)
        self.scale = self.scale * WIDER

    solver = auto_gptq("quantization", "gptq").GPTQ(module)
    solver.quantizer.configure(grid.bits, perchannel=True, sym=grid.symmetric, mse=False)
    for batch in batches:
        solver.add_batch(batch[None], None)
    hessian = solver.H.clone()
    blocksize = 128 if grid.group_size == -1 or static_groups else grid.group_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "find_params", find_wider)
        solver.fasterquant(blocksize, DAMP, grid.group_size, desc_act, static_groups)
    return module.weight.data, hessian


def check(
    auto_gptq: AutoGPTQ, layer: Layer, grid: Grid, desc_act: bool, static_groups: bool, loss_tolerance: float = 1e-4
) -> None:
    weight = layer[0]
    expected, hessian = theirs(auto_gptq, layer, grid, desc_act, static_groups)
    options = SolverOptions(desc_act=desc_act, static_groups=static_groups, damp_percent=DAMP, search_steps=0)
    (found,) = solve(LayerProblem(["layer"], [weight], grid, hessian, options))
    # Their codes, read off their values with our scales: if the scales differ, so will these.
    scales, zeros = (part.to(weight.dtype)[:, found.g_idx.long()] for part in (found.scales, found.zeros))
    codes = torch.round(expected / scales + zeros)
    same = float((codes == found.codes).double().mean())
    ours = (found.codes - zeros) * scales
    assert same >= 0.999, f"{same:.5f} of the codes agree"
    assert layer_loss(weight, ours, hessian) == pytest.approx(layer_loss(weight, expected, hessian), rel=loss_tolerance)


def layer_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    difference = (weight - quantized).double()
    return float(torch.einsum("ij,jk,ik->", difference, hessian.double(), difference))


def cases(group_sizes: tuple[int, ...]) -> Iterator[Any]:
    for bits in SUPPORTED_BITS:
        for group_size in group_sizes:
            for symmetric in (True, False):
                for desc_act in (True, False):
                    # AutoGPTQ's static groups divide by the group size: -1 is not for them.
                    for static_groups in (False,) if group_size == -1 else (True, False):
                        name = f"{bits}bit-g{group_size}-{'sym' if symmetric else 'asym'}"
                        name += "-desc" * desc_act + "-static" * static_groups
                        yield pytest.param((bits, group_size, symmetric), desc_act, static_groups, id=name)


@functools.cache
def random_layer() -> Layer:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 256, generator=generator)
    inputs = torch.randn(2048, 64, generator=generator) @ mixing + torch.randn(2048, 256, generator=generator)
    inputs *= torch.rand(256, generator=generator) * 3 + 0.1
    return torch.randn(96, 256, generator=generator) * 0.05, list(torch.split(inputs, 512))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("numbers", "desc_act", "static_groups"), cases((-1, 32, 64, 128)))
def test_random_layer(auto_gptq: AutoGPTQ, numbers: tuple[int, int, bool], desc_act: bool, static_groups: bool) -> None:
    weight, inputs = random_layer()
    grid = WiderGrid(*numbers, zero_min=0, scale_dtype=torch.float64)
    check(auto_gptq, (weight.double(), [batch.double() for batch in inputs]), grid, desc_act, static_groups)


@functools.cache
def real_layers() -> dict[str, Layer]:
    """Float32 layers of SmolLM2's block 12 with the inputs they get on the built-in text."""
    walk = DecoderWalk(open_checkpoint(str(demo_model())), torch.device("cpu"), torch.float32)
    part = load_text("builtin", "train")
    windows = pack_windows(walk.checkpoint.tokenizer(), part, num_samples=8, seq_len=512, seed=0)
    arguments = walk.block_arguments(512)
    hidden, inputs = walk.block_inputs(windows), {}
    for index in range(13):
        with walk.loaded_block(index) as block:
            layers = linear_layers(block)
            if index == 12:
                for name in REAL:
                    layers[name].register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
            hidden = run_block(block, hidden, arguments[index])
    return {name: (walk.weight(f"{walk.path}.12.{name}"), list(torch.split(inputs[name].flatten(0, 1), 512))) for name in REAL}


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("numbers", "desc_act", "static_groups"), cases((-1, 32, 64)))
def test_real_layer(
    auto_gptq: AutoGPTQ, name: str, numbers: tuple[int, int, bool], desc_act: bool, static_groups: bool
) -> None:
    weight, inputs = real_layers()[name]
    grid = WiderGrid(*numbers, zero_min=0, scale_dtype=torch.float64)
    check(auto_gptq, (weight.double(), [batch.double() for batch in inputs]), grid, desc_act, static_groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("symmetric", [True, False])
def test_real_layer_in_float32(auto_gptq: AutoGPTQ, name: str, symmetric: bool) -> None:
    grid = WiderGrid(4, 64, symmetric, zero_min=0, scale_dtype=torch.float32)
    check(auto_gptq, real_layers()[name], grid, desc_act=True, static_groups=False, loss_tolerance=1e-3)
