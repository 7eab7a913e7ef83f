"""Per-layer diagnosis of artifacts in every kind of container, made from a tiny model by the pipeline itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.layer_report import grids, kind_and_block, render_heat_map, render_markdown
from eval.layers import Diagnosis, diagnose, layers_to_keep, main
from eval.stored_model import bits_of, kind_of, open_model
from eval.unfolding import agree
from quantize.errors import InputError
from quantize.swapping import Swap

RECIPE = """
# @package _global_
variants:
  int4: {solver: {name: rtn}}
  packed: {solver: {name: rtn, symmetric: true, overrides: [{match: down_proj, bits: 8}]}, container: compressed-tensors}
  inputs:
    solver: {name: rtn, bits: 8, group_size: -1, symmetric: true, input_activations: dynamic}
    container: compressed-tensors
  awq: {solver: {name: awq}, container: awq}
  q4_0: {solver: {name: rtn}, container: gguf, grid: q4_0}
"""
SETTINGS = (
    "calibration.num_samples=4",
    "calibration.seq_len=32",
    "solver.group_size=32",
    "quality=fast",
    "stages=[load,calibrate,quantize,export]",
)
PROTOCOL: dict[str, Any] = {"windows": 2, "seq_len": 32}
DAMAGED = "model.layers.2.mlp.gate_proj"


@pytest.fixture(scope="module")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: Callable[..., Path]) -> Path:
    """The folder of the recipe's artifacts. Read it only."""
    run = run_recipe(tmp_path_factory.mktemp("layers"), RECIPE, f"model.path={tiny_llama}", *SETTINGS)
    return run / "variants"


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Two windows of random tokens."""
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def diagnosis(artifact: Path, baseline: Path, windows: Tensor) -> Diagnosis:
    """An artifact beside its baseline."""
    return Diagnosis(open_model(str(artifact)), open_model(str(baseline)), windows, torch.device("cpu"))


@pytest.mark.parametrize("variant", ["int4", "packed"])
def test_all_layers_swapped_are_the_artifact(artifacts: Path, tiny_llama: Path, windows: Tensor, variant: str) -> None:
    found = diagnosis(artifacts / variant, tiny_llama, windows)
    names = [name for index in range(found.base.count) for name in found.base.layer_names(index)]
    everything = {name: Swap(found.stored.weight(name)) for name in names}
    assert found.whole() == pytest.approx(found.bench.divergences({"all": everything})["all"], rel=1e-4)


def test_an_artifact_against_itself_has_no_layers(artifacts: Path) -> None:
    result = diagnose(str(artifacts / "int4"), str(artifacts / "int4"), **PROTOCOL)
    assert result["layers"] == [] and result["kl"] == {"sum": 0.0, "whole": 0.0, "interaction": 0.0}
    assert result["keep"]["layers"] == []
    assert render_heat_map(result).startswith(b"\x89PNG")


def test_a_damaged_layer_comes_first(artifacts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifacts / "int4", tmp_path / "damaged")
    stored = load_file(damaged / "model.safetensors")
    stored[f"{DAMAGED}.scales"] = stored[f"{DAMAGED}.scales"] * 1.1
    save_file(stored, damaged / "model.safetensors", metadata={"format": "pt"})
    before = diagnose(str(artifacts / "int4"), str(tiny_llama), **PROTOCOL)
    after = diagnose(str(damaged), str(tiny_llama), **PROTOCOL)
    kinds = {layer["name"]: layer for layer in before["layers"]}
    again = {layer["name"]: layer for layer in after["layers"]}
    assert {name for name in kinds if kinds[name]["kl"] != again[name]["kl"]} == {DAMAGED}
    assert again[DAMAGED]["weight_error"] > 0.1 > kinds[DAMAGED]["weight_error"] - 0.05
    ratios = {name: again[name]["output_error"] / kinds[name]["output_error"] for name in kinds}
    assert max(ratios, key=lambda name: ratios[name]) == DAMAGED


def test_a_layer_whose_scales_are_off_is_named_first(artifacts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifacts / "inputs", tmp_path / "damaged")
    stored = load_file(damaged / "model.safetensors")
    stored[f"{DAMAGED}.weight_scale"] = stored[f"{DAMAGED}.weight_scale"] * 1.1
    save_file(stored, damaged / "model.safetensors", metadata={"format": "pt"})
    result = diagnose(str(damaged), str(tiny_llama), **PROTOCOL)
    assert max(result["layers"], key=lambda layer: layer["kl"])["name"] == DAMAGED
    assert render_markdown(result).splitlines()[6].startswith(f"| {DAMAGED} | int8 row |")


def test_figures_agree_with_each_other(artifacts: Path, tiny_llama: Path) -> None:
    result = diagnose(str(artifacts / "packed"), str(tiny_llama), **PROTOCOL)
    layers, kl = result["layers"], result["kl"]
    assert len(layers) == 4 * 7 and result["protocol"]["tokens"] == 64
    assert math.fsum(layer["share"] for layer in layers) == pytest.approx(1)
    assert kl["whole"] == pytest.approx(kl["sum"] + kl["interaction"])
    for layer in layers:
        assert layer["snr_db"] == pytest.approx(-20 * math.log10(layer["output_error"]))
        assert (layer["stored"], layer["bits"]) == (("int8 g32", 8) if "down_proj" in layer["name"] else ("int4 g32", 4))
    by_bits = {bits: [layer["snr_db"] for layer in layers if layer["bits"] == bits] for bits in (4, 8)}
    assert min(by_bits[8]) > max(by_bits[4])
    keep = result["keep"]["layers"]
    assert keep and not any("down_proj" in name for name in keep)


def test_rounded_inputs_count(artifacts: Path, tiny_llama: Path, windows: Tensor) -> None:
    found = diagnosis(artifacts / "inputs", tiny_llama, windows)
    (layer,) = [layer for layer in found.block(1) if layer.name.endswith("down_proj")]
    weight = found.stored.weight(layer.name)
    alone = found.bench.output_errors(1, {layer.name: Swap(weight)})[layer.name]
    assert layer.output_error is not None and layer.output_error > 1.05 * math.sqrt(alone.noise / alone.signal)


def test_folded_scales_are_taken_back(artifacts: Path, tiny_llama: Path, windows: Tensor) -> None:
    found = diagnosis(artifacts / "awq", tiny_llama, windows)
    scaled = {name for name in found.base.layer_names(1) if _as_stored(found, name) > 0.2}
    layers = found.block(1)
    assert scaled, "the artifact has no scales to take back"
    assert all(layer.weight_error < 0.2 for layer in layers)
    everything = {}
    for index in range(found.base.count):
        everything.update(found.swaps(index))
    assert found.bench.divergences({"all": everything})["all"] == pytest.approx(found.whole(), rel=0.1)


def _as_stored(found: Diagnosis, name: str) -> float:
    original = found.base.weight(name)
    return float((found.stored.weight(name) - original).norm() / original.norm())


def test_gguf_layers_and_embedding(artifacts: Path, tiny_llama: Path) -> None:
    result = diagnose(str(artifacts / "q4_0"), str(tiny_llama), **PROTOCOL)
    names = [layer["name"] for layer in result["layers"]]
    assert names[-2:] == ["model.embed_tokens", "lm_head"] and len(names) == 4 * 7 + 2
    assert {layer["stored"] for layer in result["layers"][:-2]} == {"Q4_0"}
    assert result["layers"][-2]["output_error"] is None and result["layers"][-2]["kl"] > 0
    assert abs(result["kl"]["interaction"]) < 0.5 * result["kl"]["sum"]


def test_what_layers_are_stored_as(artifacts: Path, tiny_llama: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    stored = {variant: open_model(str(artifacts / variant)) for variant in ("int4", "packed", "inputs", "q4_0")}
    kinds = {variant: (kind_of(model, name), bits_of(model, name)) for variant, model in stored.items()}
    assert kinds == {"int4": ("int4 g32", 4), "packed": ("int8 g32", 8), "inputs": ("int8 row", 8), "q4_0": ("Q4_0", 4)}
    assert (kind_of(open_model(str(tiny_llama)), name), bits_of(open_model(str(tiny_llama)), name)) == ("float16", None)


def test_command_line(artifacts: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"layers.{kind}" for kind in ("json", "markdown", "png")}
    arguments = [str(artifacts / "int4"), "--baseline", str(tiny_llama), "--windows", "1", "--seq-len", "16", "--top", "3"]
    assert main([*arguments, *(part for kind, file in files.items() for part in (f"--{kind}", str(file)))]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("keep in 8 bits: model.layers.") and "MB more)" in printed[-1]
    assert any("3 of 28 layers" in line for line in printed)
    result = json.loads(files["json"].read_text())
    assert result["schema"] == 1 and len(result["layers"]) == 28
    assert files["png"].read_bytes() == render_heat_map(result)
    assert files["markdown"].read_text() == render_markdown(result)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--windows", "0"], ["--windows=0", "--windows=4"]),
        (["--seq-len", "4096"], ["--seq-len=4096", "2048"]),
        (["--windows", "100000"], ["--windows="]),
        (["--top", "-1"], ["--top=-1"]),
        (["--text", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_bad_input(
    artifacts: Path, tiny_llama: Path, arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artifacts / "int4"), "--baseline", str(tiny_llama), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected)


def test_another_model_is_refused(artifacts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match="num_hidden_layers=4"):
        diagnose(str(artifacts / "int4"), str(other), **PROTOCOL)


def layer(name: str, kl: float, bits: int | None = 4, weights: int = 1000) -> dict[str, Any]:
    """A layer as :func:`eval.layers.diagnose` gives it."""
    return {"name": name, "kl": kl, "bits": bits, "weights": weights, "output_error": 0.1, "share": kl, "snr_db": 20.0}


def test_layers_to_keep_carry_half_of_the_sum_for_the_least_bytes() -> None:
    layers = [layer("a", 0.3, weights=10_000), layer("b", 0.25), layer("c", 0.35, bits=8), layer("d", 0.1), layer("e", 0.0)]
    keep = layers_to_keep(layers)
    assert keep["layers"] == ["b", "d"]
    assert keep["share"] == pytest.approx(0.35) and keep["extra_bytes"] == 2 * 1000 * 4 // 8
    assert layers_to_keep([layer("a", 0.0)])["layers"] == []


def test_experts_share_a_column_of_the_heat_map() -> None:
    names = ["model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.7.up_proj", "lm_head"]
    assert [kind_and_block(name) for name in names] == [("mlp.experts.*.up_proj", 1)] * 2 + [None]
    kinds, share, snr = grids([layer(name, 0.25) for name in names])
    assert kinds == ["mlp.experts.*.up_proj"] and share.shape == (2, 1)
    assert share[1, 0] == 0.5 and snr[1, 0] == 20 and math.isnan(share[0, 0])


def test_scales_are_only_those_that_rows_and_columns_agree_on() -> None:
    scales = torch.linspace(-1, 1, 32)
    noise = 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert agree(scales, scales + noise)
    assert not agree(scales, -scales) and not agree(scales, noise) and not agree(torch.full((32,), 0.1), torch.full((32,), 0.1))
