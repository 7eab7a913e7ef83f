"""Bits chosen layer by layer: what a choice costs, the budget, the run that does it, and the artifact that comes of it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exports import compressed_tensors, gptq
from quantize.allocation import choose
from quantize.blocks import DecoderWalk
from quantize.checkpoint import open_checkpoint
from quantize.choices import candidate_grids, overrides_for, pattern
from quantize.config import OverrideConfig, SolverConfig, VariantConfig, VariantSolverConfig
from quantize.errors import InputError
from quantize.files import files_below, sha256_file
from quantize.grids import Grid, quantize_nearest
from quantize.knapsack import Option
from quantize.sensitivity import fisher_information, output_errors, predicted_divergence
from quantize.statistics import Statistics
from quantize.swapping import Swap, SwapBench

Cli = Callable[..., tuple[int, str, str]]
RECIPE = """
# @package _global_
solver: {budget_bits: 5.5}
variants:
  mixed: {}
  measured:
    solver: {name: rtn, sensitivity: measured, symmetric: true, skip: [k_proj], overrides: [{match: o_proj, bits: 8}]}
    container: compressed-tensors
"""
SETTINGS = (
    "calibration.num_samples=4",
    "calibration.seq_len=32",
    "solver.group_size=32",
    "solver.sensitivity_windows=2",
    "quality=fast",
)
ARTIFACTS = "stages=[load,calibrate,allocate,quantize,export]"


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: Callable[..., Path]) -> Path:
    """A run of the recipe, without evaluation. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("allocate")
    return run_recipe(folder, RECIPE, f"model.path={tiny_llama}", *SETTINGS, ARTIFACTS)


def allocation(run: Path, name: str) -> dict[str, Any]:
    """What a run chose for a variant."""
    found: dict[str, Any] = json.loads((run / "allocation" / f"{name}.json").read_text())
    return found


def by_grid(layers: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bits and group size of each layer."""
    return {name: (layer["bits"], layer["group_size"]) for name, layer in layers.items()}


@pytest.mark.parametrize(("name", "read"), [("mixed", gptq.read), ("measured", compressed_tensors.read)])
def test_artifacts_have_the_grids_that_were_chosen(finished: Path, name: str, read: Callable[..., Any]) -> None:
    chosen = allocation(finished, name)
    stored, _ = read(finished / "variants" / name)
    assert by_grid(chosen["layers"]) == {layer: (t.grid.bits, t.grid.group_size) for layer, t in stored.items()}
    assert chosen["bytes"] == sum(tensor.nbytes() for tensor in stored.values()) <= chosen["budget_bytes"]
    weights = sum(tensor.codes.numel() for tensor in stored.values())
    assert chosen["bits"] == pytest.approx(8 * chosen["bytes"] / weights) and 4.5 < chosen["bits"] <= 5.5
    assert len(set(by_grid(chosen["layers"]).values())) > 1
    nominal = sum(tensor.codes.numel() * tensor.grid.bits for tensor in stored.values()) / weights
    manifest = json.loads((finished / "variants" / name / "manifest.json").read_text())
    assert manifest["bits"] == pytest.approx(nominal, abs=0.01)


def test_what_the_recipe_says_of_a_layer_stands(finished: Path) -> None:
    layers = allocation(finished, "measured")["layers"]
    assert not any("k_proj" in name for name in layers)
    pinned = {name: layer for name, layer in layers.items() if "o_proj" in name}
    assert pinned and all(layer["bits"] == 8 and len(layer["choices"]) == 1 for layer in pinned.values())


def test_the_line_and_the_points_beside_it(finished: Path) -> None:
    found = allocation(finished, "mixed")
    assert found["exact"]
    line = found["line"]
    assert all(one[0] < two[0] and one[1] > two[1] for one, two in itertools.pairwise(line))
    assert [point["bits"] for point in found["uniform"]] == [3, 4, 8]
    for point in found["uniform"]:
        smaller = [cost for size, cost in line if size <= point["bytes"]]
        assert min(smaller) <= point["divergence"] * (1 + 1e-9)
    total = math.fsum(_taken(layer)["divergence"] for layer in found["layers"].values())
    assert found["divergence"] == pytest.approx(total)
    assert (finished / "allocation" / "mixed.png").read_bytes().startswith(b"\x89PNG")


def _taken(layer: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = next(
        choice for choice in layer["choices"] if (choice["bits"], choice["group_size"]) == (layer["bits"], layer["group_size"])
    )
    return chosen


def test_more_bits_cost_less_divergence(finished: Path) -> None:
    for name in ("mixed", "measured"):
        for layer in allocation(finished, name)["layers"].values():
            costs = [choice["divergence"] for choice in layer["choices"]]
            assert costs == sorted(costs, reverse=True) and costs[-1] > 0
            assert [choice["bytes"] for choice in layer["choices"]] == sorted(choice["bytes"] for choice in layer["choices"])


def test_a_finished_run_does_nothing_and_another_budget_looks_at_no_layer_again(
    finished: Path, tiny_llama: Path, tmp_path: Path, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = {str(file): sha256_file(file) for file in files_below(tmp_path / "run" / "work" / "allocate")}
    arguments = [f"model.path={tiny_llama}", *SETTINGS, ARTIFACTS]
    run_recipe(tmp_path, RECIPE, *arguments)
    assert "nothing to do" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.allocate.GroupSolver", None)
        patch.setattr("quantize.allocate.SwapBench", None)
        run = run_recipe(tmp_path, RECIPE, *arguments, "solver.budget_bits=4.3", "stages=[load,calibrate,allocate]")
    assert before == {str(file): sha256_file(file) for file in files_below(run / "work" / "allocate")}
    for name in ("mixed", "measured"):
        less, more = allocation(run, name), allocation(finished, name)
        assert less["bits"] <= 4.3 < more["bits"] and less["divergence"] > more["divergence"]


def test_a_killed_allocation_goes_on_where_it_was(
    finished: Path, tiny_llama: Path, tmp_path: Path, run_recipe: Callable[..., Path]
) -> None:
    from quantize.allocate import _Sensitivities

    original, seen = _Sensitivities._block, []

    def dies(self: Any, index: int, states: Any) -> Any:
        seen.append(index)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return original(self, index, states)

    arguments = [f"model.path={tiny_llama}", *SETTINGS, "stages=[load,calibrate,allocate]", "~variants.measured"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Sensitivities, "_block", dies)
        run_recipe(tmp_path, RECIPE, *arguments, code=130)
        run = run_recipe(tmp_path, RECIPE, *arguments)
    assert seen == [0, 1, 2, 2, 3]
    assert allocation(run, "mixed") == allocation(finished, "mixed")


def test_quantizing_without_the_allocation_says_what_is_missing(
    tiny_llama: Path, tmp_path: Path, run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(tmp_path, RECIPE, f"model.path={tiny_llama}", *SETTINGS, "stages=[load,calibrate,quantize]", code=2)
    assert "add allocate to stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["solver.budget_bits=2"], ["budget_bits=2", "bit_choices"]),
        (["solver.budget_bits=4", "solver.budget_bytes=9"], ["two budgets", "null"]),
        (["solver.budget_bytes=0"], ["budget_bytes=0"]),
        (["solver.budget_bits=4", "solver.bit_choices=[]"], ["bit_choices=[]", "[3, 4, 8]"]),
        (["solver.budget_bits=4", "solver.bit_choices=[five]"], ["'five'", "{bits: 4, group_size: 64}"]),
        (["solver.budget_bits=4", "solver.bit_choices=[5]"], ["bits=5", "2, 3, 4, 8"]),
        (["solver.budget_bits=4", "solver.bit_choices=[{bits: 4, group: 3}]"], ["group", "group_size"]),
        (["solver.budget_bits=4", "solver.sensitivity=guessed"], ["sensitivity=guessed", "estimated, measured"]),
        (["solver.budget_bits=4", "solver.sensitivity_windows=0"], ["sensitivity_windows=0"]),
        (["solver.budget_bits=4", "solver.lm_head=true"], ["lm_head=true", "false"]),
        (["solver=awq", "container=awq", "solver.budget_bits=4"], ["container=awq", "gptq or compressed-tensors"]),
        (["container=gguf", "grid=q4_0", "solver.budget_bits=4"], ["container=gguf", "gptq or compressed-tensors"]),
        (["container=compressed-tensors", "solver.budget_bits=4"], ["compressed-tensors", "symmetric=true"]),
        (["container=compressed-tensors", "solver.symmetric=true", "solver.budget_bits=4"], ["consecutive columns"]),
    ],
)
def test_impossible_budgets_are_refused_before_anything_runs(
    cli: Cli, overrides: list[str], words: list[str], tmp_path: Path
) -> None:
    code, _, err = cli("recipe=gptq", *overrides, f"output_dir={tmp_path / 'run'}")
    assert code == 2 and all(word in err for word in words), err


# What a choice costs.


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> SwapBench:
    """The tiny Llama on some random windows."""
    walk = DecoderWalk(open_checkpoint(str(tiny_llama)), torch.device("cpu"), torch.float32)
    return SwapBench(walk, torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(3)))


def test_output_errors_are_mean_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, change = torch.randn(50, 8, generator=generator), torch.randn(5, 8, generator=generator)
    statistics = Statistics()
    statistics.add(inputs)
    wanted = (inputs @ change.t()).square().mean(0)
    assert torch.allclose(output_errors(change, statistics.hessian()), wanted, rtol=1e-4)


def test_the_fisher_information_predicts_what_noise_on_an_output_does(bench: SwapBench) -> None:
    fisher = fisher_information(bench, seed=0)
    assert set(fisher) == {name for index in range(bench.walk.count) for name in bench.walk.layer_names(index)}
    generator = torch.Generator().manual_seed(1)
    tokens = bench.states[0][..., 0].numel()

    def noisy(inputs: torch.Tensor) -> torch.Tensor:
        return inputs + 0.02 * inputs.std() * torch.randn(inputs.shape, generator=generator)

    for name in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.o_proj", "model.layers.3.mlp.up_proj"):
        weight = bench.walk.weight(name)
        errors = bench.output_errors(bench.block_of(name), {name: Swap(weight, noisy)})[name]
        # The noise is about the same in all outputs.
        each = torch.full((len(weight),), errors.noise / tokens / len(weight))
        measured = bench.divergences({"": {name: Swap(weight, noisy)}})[""]
        assert 0.4 < measured / predicted_divergence(fisher[name], each) < 2.5


def test_estimates_order_layers_as_measurements_do(finished: Path, bench: SwapBench) -> None:
    walk, fisher = bench.walk, fisher_information(bench, seed=0)
    predicted, measured = [], []
    for index in range(walk.count):
        for name in walk.layer_names(index):
            weight = walk.weight(name)
            rounded = quantize_nearest(weight, Grid(3, 32)).dequantize()
            noise = bench.output_errors(index, {name: Swap(rounded)})[name].noise / bench.states[0][..., 0].numel()
            predicted.append(predicted_divergence(fisher[name].mean()[None], torch.tensor([noise])))
            measured.append(bench.divergences({"": {name: Swap(rounded)}})[""])
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (predicted, measured)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.6


# The choice itself.


def variant(**solver: Any) -> VariantConfig:
    """A variant of plain values."""
    plain = vars(SolverConfig())
    return VariantConfig(solver=VariantSolverConfig(**{**plain, "bit_choices": [3, 4, 8], **solver}), container="gptq")


GRIDS = [Grid(3, 64), Grid(4, 64), Grid(8, 64)]
OPTIONS = [Option(30, 4.0), Option(40, 1.0), Option(80, 0.1)]


def test_a_layer_that_matters_gets_the_bits() -> None:
    layers = {"a.q": OPTIONS, "a.k": [Option(option.size, 10 * option.cost) for option in OPTIONS]}
    found = choose(variant(budget_bytes=115), dict.fromkeys(layers, GRIDS), layers, dict.fromkeys(layers, 80))
    assert by_grid(found["layers"]) == {"a.q": (3, 64), "a.k": (8, 64)}
    overrides = [OverrideConfig(**override) for override in found["overrides"]]
    assert [(o.bits, bool(re.search(o.match, "a.q")), bool(re.search(o.match, "a.k"))) for o in overrides] == [
        (3, True, False),
        (8, False, True),
    ]


def test_a_budget_that_nothing_meets_names_one_that_works() -> None:
    with pytest.raises(InputError, match=r"budget_bits=2.0 .*budget_bits=3 \(solver.budget_bytes=30\)"):
        choose(variant(budget_bits=2.0), {"a": GRIDS}, {"a": OPTIONS}, {"a": 80})
    assert choose(variant(budget_bits=3.0), {"a": GRIDS}, {"a": OPTIONS}, {"a": 80})["layers"]["a"]["bits"] == 3


def test_candidates_and_overrides() -> None:
    solver = SolverConfig(bit_choices=[4, {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": -1}, 4])
    grids = candidate_grids(solver)
    assert [(grid.bits, grid.group_size) for grid in grids] == [(4, 64), (4, 32), (8, -1)]
    assert overrides_for(solver, {"a.b": grids[0]}) == []
    assert overrides_for(solver, {"a.b": grids[1], "c": grids[1]}) == [OverrideConfig(pattern(["a.b", "c"]), 4, 32)]
    assert (
        re.search(pattern(["a.b"]), "a.b")
        and not re.search(pattern(["a.b"]), "axb")
        and not re.search(pattern(["a.b"]), "xa.b")
    )


def test_block_files_hold_the_figures(finished: Path) -> None:
    names = sorted(file.name for file in (finished / "work" / "allocate" / "mixed").iterdir())
    assert names == [*(f"block-{index:05d}.safetensors" for index in range(4)), "fisher.safetensors", "key", "seconds"]
    with safe_open(finished / "work" / "allocate" / "mixed" / "block-00002.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.2.mlp.up_proj.divergence").shape == (3,)
