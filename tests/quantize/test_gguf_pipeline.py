"""GGUF from recipe to file: what a solver chose is what the file holds, and the rest is what llama.cpp would have written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exports.gguf_names import TensorMap
from exports.gguf_types import dequantize, quantize
from quantize.block_files import BlockFiles
from quantize.checkpoint import open_checkpoint
from quantize.files import read_json, sha256_file
from quantize.gguf_grids import gguf_grid
from quantize.gguf_reader import GgufReader

Cli = Callable[..., tuple[int, str, str]]
ARTIFACTS = "stages=[load,calibrate,quantize,export]"
MOST = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def gguf(small_run: list[str]) -> list[str]:
    """Overrides for one small run that ends with a GGUF file."""
    return ["recipe=gguf_q4_0", *small_run, ARTIFACTS]


def opened(run: Path) -> GgufReader:
    return GgufReader(run / "variants" / "q4_0" / "model.gguf")


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_m"])
def test_the_file_holds_the_solvers_numbers(gguf: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path, grid: str) -> None:
    code, _, err = cli(*gguf, f"grid={grid}", f"output_dir={tmp_path}")
    assert code == 0, err
    file, names = opened(tmp_path), TensorMap(read_json(tiny_llama / "config.json"))
    kinds = {info.kind for info in file.tensors.values()}
    assert file.fields["general.architecture"] == "llama" and len(kinds) > 1
    solved = 0
    for name in load_file(tiny_llama / "model.safetensors"):
        layer, stored = name.removesuffix(".weight"), names.name(name)
        if stored is None or ".layers." not in name or "norm" in name:
            continue
        grids = {layer: gguf_grid(file.tensors[stored].kind)}
        chosen = next(t for n, t in BlockFiles.read_all(tmp_path / "work" / "quantize" / "q4_0", _Any(grids)) if n == layer)
        found = dequantize(file.data(stored), file.tensors[stored].kind)
        order = names.row_order(name, len(found))
        expected = chosen.dequantize().numpy()
        np.testing.assert_allclose(found, expected if order is None else expected[order], rtol=2e-3, atol=1e-6)
        solved += 1
    assert solved == 4 * 7


class _Any(dict):  # type: ignore[type-arg]
    """One grid for every name."""

    def __missing__(self, key: str) -> object:
        return next(iter(self.values()))


def test_without_calibration_it_is_llama_quantizes_rounding(
    gguf: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    assert cli(*gguf, "solver=rtn", f"output_dir={tmp_path}")[0] == 0
    file, names = opened(tmp_path), TensorMap(read_json(tiny_llama / "config.json"))
    assert not (tmp_path / "work" / "quantize").exists()
    checked = 0
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        if stored := names.name(name):
            values = names.transform(name, tensor.float().numpy())
            kind = file.tensors[stored].kind
            assert np.array_equal(file.data(stored).reshape(-1), quantize(np.ascontiguousarray(values), kind).reshape(-1)), (
                stored
            )
            checked += kind == "Q4_0"
    assert checked == 4 * 7


def test_gptq_is_nearer_to_the_models_outputs_than_rounding(
    gguf: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    found = {}
    for solver in ("rtn", "gptq", "awq+gptq"):
        run = tmp_path / solver
        code, _, err = cli(*gguf, f"solver={solver}", "stages=[load,calibrate,quantize,export,evaluate]", f"output_dir={run}")
        assert code == 0, err
        found[solver] = read_json(run / "work" / "evaluate" / "q4_0.json")
        assert "gguf" in found[solver]["consumer"]
    # A random model's perplexity says little; the file is loaded and runs.
    assert all(np.isfinite(figures["ppl"]) for figures in found.values())


@pytest.mark.parametrize("grid", ["null", "f32", "bf16", "f16"])
def test_dense_files(gguf: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path, grid: str) -> None:
    code, _, err = cli(*gguf, "solver=none", f"grid={grid}", f"output_dir={tmp_path}")
    assert code == 0, err
    kind = opened(tmp_path).tensors[MOST].kind
    assert kind == {"null": "F16"}.get(grid, grid.upper())
    back = open_checkpoint(str(tmp_path / "variants" / "q4_0" / "model.gguf"))
    source = load_file(tiny_llama / "model.safetensors")
    for name in back.names():
        expected = source[name].float()
        close = torch.allclose(back.tensor(name).float(), expected, rtol=2**-8 if grid == "bf16" else 1e-6, atol=1e-7)
        assert close, name


def test_skipped_layers_are_f16_and_chosen_types_count(gguf: list[str], cli: Cli, tmp_path: Path) -> None:
    settings = ["solver.skip=[down_proj]", "variants.q4_0.token_embedding_type=q4_1"]
    assert cli(*gguf, *settings, f"output_dir={tmp_path}")[0] == 0
    tensors = opened(tmp_path).tensors
    assert {tensors[f"blk.{i}.ffn_down.weight"].kind for i in range(4)} == {"F16"}
    assert tensors["token_embd.weight"].kind == "Q4_1" and tensors[MOST].kind == "Q4_0"


def test_same_bytes_whatever_the_way(gguf: list[str], cli: Cli, tmp_path: Path) -> None:
    hashes = set()
    for number, setting in enumerate(("memory", "memory", "disk")):
        run = tmp_path / str(number)
        assert cli(*gguf, f"calibration.activations={setting}", f"output_dir={run}")[0] == 0
        hashes.add(sha256_file(run / "variants" / "q4_0" / "model.gguf"))
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["grid=null"], r"variants\.q4_0\.grid=None is unknown; use one of q8_0, q4_0"),
        (["grid=iq2_xxs"], r"grid=iq2_xxs is unknown"),
        (["grid=f16"], r"grid=f16 is unknown; use one of q8_0"),
        (["solver=none"], r"grid=q4_0 is unknown; use one of f32, f16, bf16"),
        (["container=gptq"], r"variants\.q4_0\.grid is for container=gguf; gptq takes"),
        (["container=gptq", "grid=null", "variants.q4_0.pure=true"], r"variants\.q4_0\.pure is for container=gguf"),
        (["solver=awq"], r"container=gguf cannot hold what solver\.name=awq makes"),
        (["solver.lm_head=true"], r"container=gguf leaves the output embedding dense"),
        (["solver.overrides=[{match: q_proj, bits: 8}]"], r"overrides: q4_0 says what layers get"),
        (["variants.q4_0.output_tensor_type=q3"], r"output_tensor_type=q3 is unknown; use one of f32"),
        (["solver.input_activations=dynamic"], r"has no place for input_activations=dynamic"),
    ],
)
def test_impossible_combinations_are_refused(
    gguf: list[str], cli: Cli, tmp_path: Path, changes: list[str], message: str
) -> None:
    code, _, err = cli(*gguf, *changes, f"output_dir={tmp_path}")
    assert code == 2
    assert re.search(message, err), err
