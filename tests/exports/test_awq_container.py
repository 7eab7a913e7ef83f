"""The AWQ container: its bits are those of AutoAWQ's layout, and reading undoes writing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exports.awq import ORDER, pack, pack_outputs, unpack, unpack_outputs
from exports.base import Artifact
from exports.containers import CONTAINERS
from exports.shards import read_shards, write_shards
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor, group_index

CONTAINER = CONTAINERS["awq"]
LAYERS = {"model.layers.0.self_attn.q_proj": (40, 96), "model.layers.0.mlp.down_proj": (24, 192)}


def quantized_layer(shape: tuple[int, int], grid: Grid, seed: int = 0) -> QuantizedTensor:
    """Random codes and zero points over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.num_groups(shape[1])
    return QuantizedTensor(
        codes=torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8),
        scales=(torch.rand(shape[0], groups, generator=generator) + 0.01).half(),
        zeros=torch.randint(0, 16, (shape[0], groups), generator=generator, dtype=torch.uint8),
        g_idx=group_index(shape[1], grid.group_size),
        grid=grid,
    )


def artifact(grid: Grid) -> tuple[Artifact, dict[str, QuantizedTensor], dict[str, Tensor]]:
    layers = {name: quantized_layer(shape, grid, i) for i, (name, shape) in enumerate(LAYERS.items())}
    dense = {"model.embed_tokens.weight": torch.randn(7, 96, dtype=torch.float16), "model.norm.weight": torch.randn(96)}
    skipped = ("model.layers.1.mlp.up_proj",)
    grids = dict.fromkeys(LAYERS, grid)
    return Artifact({}, dense.items(), layers.items(), grid, skipped, {}, grids, ("lm_head",)), layers, dense


@given(st.integers(1, 40), st.integers(1, 6))
def test_packing_is_the_layout_in_words(rows: int, words: int) -> None:
    codes = torch.randint(0, 16, (rows, 8 * words), dtype=torch.uint8)
    packed = pack_outputs(codes)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words)
    for position, output in enumerate(ORDER):
        assert torch.equal((packed >> (4 * position)) & 15, codes[:, output::8].int())
    assert torch.equal(unpack_outputs(packed), codes)


@given(st.sampled_from([-1, 16, 32]), st.integers(1, 4), st.integers(1, 4))
def test_unpacking_undoes_packing_and_gptqmodel_reads_the_same(group_size: int, eights: int, groups: int) -> None:
    grid = Grid(4, group_size, symmetric=False, zero_min=0)
    layer = quantized_layer((8 * eights, 32 * groups), grid, eights)
    stored = pack(layer)
    found = unpack(stored, grid)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, part), getattr(layer, part)), part
    size = grid.columns_per_group(32 * groups)
    theirs = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].float(), 4, size)
    assert torch.equal(theirs.t(), layer.dequantize())


@pytest.mark.parametrize("group_size", [-1, 32])
def test_reading_undoes_writing(tmp_path: Path, group_size: int) -> None:
    written, layers, dense = artifact(Grid(4, group_size, symmetric=False, zero_min=0))
    CONTAINER.write(tmp_path, written)
    found_layers, found_dense = CONTAINER.read(tmp_path)
    assert found_layers.keys() == layers.keys()
    for name, layer in layers.items():
        assert found_layers[name].grid == layer.grid
        assert torch.equal(found_layers[name].dequantize(), layer.dequantize())
    assert found_dense.keys() == dense.keys()
    assert all(torch.equal(found_dense[name], tensor) for name, tensor in dense.items())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": ["model.layers.1.mlp.up_proj", "lm_head"],
    }


def test_a_symmetric_grid_stores_its_zero_points() -> None:
    grid = Grid(4, 32, symmetric=True)
    layer = quantized_layer((16, 64), grid)
    layer = replace(layer, zeros=torch.full_like(layer.zeros, 8))
    assert torch.equal(unpack(pack(layer), grid).dequantize(), layer.dequantize())


def test_shuffled_groups_cannot_be_stored() -> None:
    layer = quantized_layer((8, 32), Grid(4, 16, False, 0))
    with pytest.raises(ValueError, match="groups must be consecutive columns"):
        pack(replace(layer, g_idx=layer.g_idx.flip(0)))


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((8, 64), Grid(8, 32), r"bits=8 of layer cannot be stored in an AWQ checkpoint; use solver\.bits=4"),
        ((12, 64), Grid(4, 32), r"out_features=12 of layer is not a multiple of 8"),
        ((8, 576), Grid(4, 128), "group_size=128 does not divide in_features=576 of layer; use 64, 32, 16 or -1"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, int], grid: Grid, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CONTAINER.check("layer", *shape, grid)


@pytest.mark.parametrize("change", [{"quant_method": "gptq"}, {"version": "gemv"}, {"bits": 3}])
def test_other_checkpoints_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    CONTAINER.write(tmp_path, artifact(Grid(4, 32, False, 0))[0])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not describe a 4-bit AWQ checkpoint"):
        CONTAINER.read(tmp_path)


def test_a_layer_without_its_zero_points_is_named(tmp_path: Path) -> None:
    CONTAINER.write(tmp_path, artifact(Grid(4, 32, False, 0))[0])
    stored = read_shards(tmp_path)
    lost = next(iter(LAYERS))
    del stored[f"{lost}.qzeros"]
    write_shards(tmp_path, stored.items())
    with pytest.raises(InputError, match=f"layer {lost} lacks .qzeros"):
        CONTAINER.read(tmp_path)
