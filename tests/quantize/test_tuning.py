"""Tuning a block: the output error falls, codes stay, and what comes back is what will be stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantize.blocks import DecoderWalk, linear_layers, linear_shape, set_linear_weight
from quantize.checkpoint import open_checkpoint
from quantize.forwards import run_block
from quantize.grids import Grid, QuantizedTensor, quantize_nearest
from quantize.tuning import tune_block

TOKENS = 24
WINDOWS = 10


def chosen(batches: list[Tensor]) -> Callable[[list[int]], Tensor]:
    """Hidden states in batches, to be asked for by numbers of windows."""
    return torch.cat(batches).__getitem__


class Bench:
    """A tiny Llama's second block, its inputs in three batches (the last one smaller), and its layers rounded."""

    def __init__(self, path: Path) -> None:
        self.walk = DecoderWalk(open_checkpoint(str(path)), torch.device("cpu"), torch.float32)
        ids = torch.randint(3, 300, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
        self.inputs = [self.walk.block_inputs(part) for part in torch.split(ids, 4)]
        self.arguments = self.walk.block_arguments(TOKENS)[1]
        self.prefix = f"{self.walk.path}.1."

    def quantized(self, block: nn.Module) -> tuple[dict[str, QuantizedTensor], list[Tensor]]:
        """The block's layers rounded (and put into it), and its outputs before that."""
        with torch.no_grad():
            targets = [run_block(block, hidden, self.arguments) for hidden in self.inputs]
        layers = {}
        for name, layer in linear_layers(block).items():
            layers[name] = quantize_nearest(self.walk.weight(self.prefix + name), Grid(3, 16))
            assert layers[name].codes.shape == linear_shape(layer)
            set_linear_weight(layer, layers[name].dequantize())
        return layers, targets

    def tune(
        self, epochs: int, seed: int = 0
    ) -> tuple[list[float], dict[str, QuantizedTensor], dict[str, QuantizedTensor], dict[str, Tensor]]:
        """Output errors before and after, layers before and after, and the other tensors."""
        with self.walk.loaded_block(1) as block:
            before, targets = self.quantized(block)
            errors = [self.error(block, targets)]
            dtypes = {name: self.walk.stored_dtype(self.prefix + name) for name, _ in block.named_parameters()}
            after, dense = tune_block(
                block, before, chosen(self.inputs), chosen(targets), WINDOWS, 4, self.arguments, epochs, seed, dtypes
            )
            for name, tensor in after.items():
                set_linear_weight(linear_layers(block)[name], tensor.dequantize())
            for name, changed in dense.items():
                assert torch.equal(block.get_parameter(name).detach(), changed.float()), name
            assert not any(parameter.requires_grad for parameter in block.parameters())
            errors.append(self.error(block, targets))
        return errors, before, after, dense

    @torch.no_grad()
    def error(self, block: nn.Module, targets: list[Tensor]) -> float:
        outputs = [run_block(block, hidden, self.arguments) for hidden in self.inputs]
        return float(torch.stack([(left - right).square().mean() for left, right in zip(outputs, targets, strict=True)]).mean())


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Bench:
    return Bench(tiny_llama)


def test_the_blocks_output_error_falls_with_the_epochs(bench: Bench) -> None:
    (start, few), (_, many) = bench.tune(2)[0], bench.tune(20)[0]
    assert many < few < start
    assert many < 0.95 * start


def test_codes_and_zero_points_stay_and_scales_are_storable(bench: Bench) -> None:
    _, before, after, dense = bench.tune(3)
    assert before.keys() == after.keys()
    for name in before:
        for part in ("codes", "zeros", "g_idx"):
            assert torch.equal(getattr(before[name], part), getattr(after[name], part)), (name, part)
        assert after[name].scales.dtype == torch.float16
        assert bool((after[name].scales > 0).all())
        assert not torch.equal(before[name].scales, after[name].scales), name
    # The tiny Llama is FP16 and has no biases: what is left are its two norms.
    assert sorted(dense) == ["input_layernorm.weight", "post_attention_layernorm.weight"]
    assert all(tensor.dtype == torch.float16 for tensor in dense.values())


def test_the_seed_decides(bench: Bench) -> None:
    first, again, other = bench.tune(2, seed=1), bench.tune(2, seed=1), bench.tune(2, seed=2)
    name = "mlp.down_proj"
    assert torch.equal(first[2][name].scales, again[2][name].scales)
    assert not torch.equal(first[2][name].scales, other[2][name].scales)


def test_an_unquantized_block_has_nothing_to_gain(bench: Bench) -> None:
    with bench.walk.loaded_block(1) as block:
        with torch.no_grad():
            targets = [run_block(block, hidden, bench.arguments) for hidden in bench.inputs]
        dtypes = dict.fromkeys((name for name, _ in block.named_parameters()), torch.float32)
        norms = {name: value.detach().clone() for name, value in block.named_parameters() if value.dim() == 1}
        layers, dense = tune_block(block, {}, chosen(bench.inputs), chosen(targets), WINDOWS, 4, bench.arguments, 3, 0, dtypes)
    assert layers == {}
    for name, value in norms.items():
        assert torch.equal(dense[name], value), name


def test_divergence_is_told(bench: Bench) -> None:
    with bench.walk.loaded_block(1) as block:
        layers, targets = bench.quantized(block)
        dtypes = dict.fromkeys((name for name, _ in block.named_parameters()), torch.float32)
        with pytest.raises(ValueError, match=r"tuning diverged \(loss nan\); use solver\.tune_epochs=0"):
            tune_block(
                block,
                layers,
                chosen(bench.inputs),
                lambda windows: chosen(targets)(windows) * float("nan"),
                WINDOWS,
                4,
                bench.arguments,
                1,
                0,
                dtypes,
            )
