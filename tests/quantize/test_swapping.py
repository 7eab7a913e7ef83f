"""Layers swapped into the unquantized model: divergences that are right, and nothing left behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantize.blocks import DecoderWalk
from quantize.checkpoint import open_checkpoint
from quantize.grids import Grid, quantize_nearest
from quantize.swapping import Swap, SwapBench, kl_divergence

BITS = Grid(3, 32)


@pytest.fixture(scope="module")
def walk(tiny_llama: Path) -> DecoderWalk:
    """The tiny Llama in float32."""
    return DecoderWalk(open_checkpoint(str(tiny_llama)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Three windows of random tokens."""
    return torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bench(walk: DecoderWalk, windows: Tensor) -> SwapBench:
    """The model run once."""
    return SwapBench(walk, windows)


def rounded(walk: DecoderWalk, name: str) -> Swap:
    """A layer rounded to 3 bits."""
    return Swap(quantize_nearest(walk.weight(name), BITS).dequantize())


def by_transformers(path: Path, windows: Tensor, trial: dict[str, Swap]) -> float:
    """The mean divergence as a plain forward of the whole model gives it, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        before = torch.log_softmax(model(windows).logits.double(), -1)
        for name, swap in trial.items():
            model.get_submodule(name).weight.copy_(swap.weight)
        after = torch.log_softmax(model(windows).logits.double(), -1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.3.mlp.down_proj"],
        ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj"],
    ],
)
def test_divergence_is_that_of_the_whole_model(
    tiny_llama: Path, walk: DecoderWalk, windows: Tensor, bench: SwapBench, names: list[str]
) -> None:
    trial = {name: rounded(walk, name) for name in names}
    found = bench.divergences({"them": trial})["them"]
    assert found == pytest.approx(by_transformers(tiny_llama, windows, trial), rel=1e-3)


def test_trials_do_not_touch_each_other(walk: DecoderWalk, bench: SwapBench) -> None:
    trials = {name: {name: rounded(walk, name)} for index in (0, 2) for name in walk.layer_names(index)}
    together = bench.divergences(trials)
    assert all(value > 0 for value in together.values())
    last = list(trials)[-1]
    assert bench.divergences({last: trials[last]})[last] == pytest.approx(together[last], rel=1e-6)
    original = {"model.layers.0.mlp.up_proj": Swap(walk.weight("model.layers.0.mlp.up_proj"))}
    assert bench.divergences({"same": original})["same"] == 0


def test_inputs_can_be_changed_too(walk: DecoderWalk, bench: SwapBench) -> None:
    name = "model.layers.2.mlp.down_proj"
    halved = {"halved": {name: Swap(2 * walk.weight(name), lambda inputs: inputs / 2)}}
    assert bench.divergences(halved)["halved"] == pytest.approx(0, abs=1e-10)
    assert bench.output_errors(2, halved["halved"])[name].noise == pytest.approx(0, abs=1e-6)


def test_output_errors_are_those_of_the_layer_alone(walk: DecoderWalk, bench: SwapBench) -> None:
    name = "model.layers.1.mlp.gate_proj"
    errors = bench.output_errors(1, {name: Swap(1.1 * walk.weight(name))})[name]
    assert math.sqrt(errors.noise / errors.signal) == pytest.approx(0.1, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-4, 1e-2, 1.0, 50.0]))
def test_divergence_from_its_definition(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = 5 * torch.randn(4, 60, generator=generator)
    two = one + scale * torch.randn(4, 60, generator=generator)
    exact = torch.log_softmax(one.double(), -1), torch.log_softmax(two.double(), -1)
    wanted = (exact[0].exp() * (exact[0] - exact[1])).sum(-1)
    found = kl_divergence(exact[0], exact[1])
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-13)
    assert bool((kl_divergence(exact[0].float(), exact[1].float()) >= 0).all())
