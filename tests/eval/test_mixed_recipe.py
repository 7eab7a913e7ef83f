"""``recipe=mixed`` from checkpoint to report, its artifacts loaded by the programs they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.consumers.transformers_model import load
from quantize.errors import InputError

RECIPE = (Path(__file__).resolve().parents[2] / "recipes" / "recipe" / "mixed.yaml").read_text()
SETTINGS = ("solver.budget_bits=5.5", "solver.sensitivity_windows=2")
# The other container that takes several grids.
PACKED = "  packed: {solver: {desc_act: false, symmetric: true, sensitivity: measured}, container: compressed-tensors}\n"


def check(run: Path, name: str, consumer: str) -> None:
    """A variant with several grids that its consumer reads as it was meant."""
    report = {variant["name"]: variant for variant in json.loads((run / "report.json").read_text())["variants"]}
    assert consumer in report[name]["consumer"]
    allocation = json.loads((run / "allocation" / f"{name}.json").read_text())
    assert len({layer["bits"] for layer in allocation["layers"].values()}) > 1
    assert report[name]["ppl_ratio"] == pytest.approx(1, abs=0.1)
    assert 3 < report[name]["bits"] < 5.5
    measured = json.loads((run / "variants" / name / "evaluation.json").read_text())["divergence"]["kld_mean"]
    # Layers read on another grid than their own give more than ten times this.
    assert measured < 0.01


def test_the_recipe_loads_in_its_consumer(run_recipe: Callable[..., Path], small_run: list[str], tmp_path: Path) -> None:
    check(run_recipe(tmp_path, RECIPE, *small_run, *SETTINGS), "mixed", "gptqmodel")


@pytest.mark.slow
def test_compressed_tensors_load_in_theirs(run_recipe: Callable[..., Path], small_run: list[str], tmp_path: Path) -> None:
    run = run_recipe(tmp_path, RECIPE + PACKED, *small_run, *SETTINGS, "~variants.mixed")
    check(run, "packed", "compressed-tensors")


def test_what_transformers_would_misread_is_refused(make_int8: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    artifact = make_int8(tiny_llama, tmp_path / "artifact", "none")
    config = json.loads((artifact / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = json.loads(json.dumps(groups["group_0"]))
    groups["group_1"]["weights"] |= {"num_bits": 4, "symmetric": False}
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="several grids with zero points"):
        load(artifact, "cpu")
