"""The compressed-tensors container, and that the package it is named after reads and writes the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exports.base import Artifact
from exports.compressed_tensors import pack, pack_columns, quantization_config, unpack_columns
from exports.containers import CONTAINERS
from exports.shards import read_shards, write_shards
from quantize.errors import InputError
from quantize.grids import SUPPORTED_BITS, Grid, QuantizedTensor, group_index

CONTAINER = CONTAINERS["compressed-tensors"]
LAYERS = {"model.layers.0.self_attn.q_proj": (40, 96), "model.layers.0.mlp.down_proj": (24, 192)}


def quantized_layer(shape: tuple[int, int], grid: Grid, seed: int, input_scale: Tensor | None = None) -> QuantizedTensor:
    """Random codes and zero points over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.num_groups(shape[1])
    zeros = torch.randint(0, grid.maxq + 1, (shape[0], groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(
        codes=torch.randint(0, grid.maxq + 1, shape, generator=generator, dtype=torch.uint8),
        scales=(torch.rand(shape[0], groups, generator=generator) + 0.01).to(grid.scale_dtype),
        zeros=torch.full_like(zeros, 2 ** (grid.bits - 1)) if grid.symmetric else zeros,
        g_idx=group_index(shape[1], grid.group_size),
        grid=grid,
        input_scale=input_scale,
    )


def artifact(grid: Grid, activations: str = "none") -> tuple[Artifact, dict[str, QuantizedTensor], dict[str, Tensor]]:
    step = torch.tensor([0.125]) if activations == "static" else None
    layers = {name: quantized_layer(shape, grid, i, step) for i, (name, shape) in enumerate(LAYERS.items())}
    dense = {"model.embed_tokens.weight": torch.randn(7, 96, dtype=torch.float16), "model.norm.weight": torch.randn(96)}
    written = Artifact(
        {"model_type": "llama"},
        dense.items(),
        layers.items(),
        grid,
        ("model.layers.1.mlp.up_proj",),
        {"input_activations": activations},
        dict.fromkeys(LAYERS, grid),
        ("lm_head",),
    )
    return written, layers, dense


def assert_equal(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert found.grid == expected.grid
    for part in ("codes", "scales", "zeros", "g_idx", "input_scale"):
        left, right = getattr(found, part), getattr(expected, part)
        assert (left is None) == (right is None), part
        if left is not None:
            assert left.dtype == right.dtype and torch.equal(left, right), part


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_reading_undoes_writing(tmp_path: Path, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    written, layers, dense = artifact(Grid(bits, group_size, symmetric, 0, scale_dtype))
    CONTAINER.write(tmp_path, written)
    found_layers, found_dense = CONTAINER.read(tmp_path)
    assert found_layers.keys() == layers.keys()
    for name, layer in layers.items():
        assert_equal(found_layers[name], layer)
    assert found_dense.keys() == dense.keys()
    for name, tensor in dense.items():
        assert found_dense[name].dtype == tensor.dtype and torch.equal(found_dense[name], tensor)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_layers_with_quantized_inputs_come_back(tmp_path: Path, activations: str) -> None:
    written, layers, _ = artifact(Grid(8, -1, True, 0), activations)
    CONTAINER.write(tmp_path, written)
    stored = read_shards(tmp_path)
    for name, shape in LAYERS.items():
        assert (stored[f"{name}.weight"].dtype, tuple(stored[f"{name}.weight"].shape)) == (torch.int8, shape)
        assert (f"{name}.input_scale" in stored) == (activations == "static")
    for name, tensor in CONTAINER.read(tmp_path)[0].items():
        assert_equal(tensor, layers[name])


def scheme(grid: Grid, activations: str = "none") -> QuantizationScheme:
    """The package's own object for what our config says of the first layer."""
    config = quantization_config(artifact(grid, activations)[0], ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    return parsed.config_groups["group_0"]


@given(st.sampled_from(SUPPORTED_BITS), st.sampled_from([-1, 8, 16]), st.booleans(), st.integers(17, 40), st.integers(1, 5))
def test_the_package_reads_and_writes_the_same_bits(
    bits: int, group_size: int, symmetric: bool, rows: int, sixteens: int
) -> None:
    # At least two words of zero points: the package's reader fails on a layer of fewer rows.
    columns = 16 * sixteens - (3 if group_size == -1 else 0)  # rows that do not end with a word
    grid = Grid(bits, group_size, symmetric, 0, torch.float32)
    layer = quantized_layer((rows, columns), grid, rows)
    ours = {name: tensor.clone() for name, tensor in pack(layer, "pack-quantized").items()}
    theirs = scheme(grid)
    # Its reader gives our weights, to the bit.
    decompressed = PackedQuantizationCompressor.decompress(ours, theirs)
    assert torch.equal(decompressed["weight"], layer.dequantize())
    # Its writer, given those weights and our scales, writes our bytes.
    state: dict[str, Tensor] = {"weight": layer.dequantize(), "weight_scale": layer.scales.clone()}
    if not symmetric:
        state["weight_zero_point"] = (layer.zeros.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    compressed = PackedQuantizationCompressor.compress(state, theirs)
    assert compressed.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(compressed[name], tensor), name


def test_the_package_reads_and_writes_the_same_bytes_where_inputs_are_quantized() -> None:
    grid = Grid(8, -1, True, 0, torch.float32)
    layer = quantized_layer((24, 40), grid, 0)
    ours = pack(layer, "int-quantized")
    theirs = scheme(grid, "dynamic")
    assert torch.equal(IntQuantizationCompressor.decompress(dict(ours), theirs)["weight"], layer.dequantize())
    state = {"weight": layer.dequantize(), "weight_scale": layer.scales}
    compressed = IntQuantizationCompressor.compress(state, theirs)
    assert torch.equal(compressed["weight"], ours["weight"])


@given(st.sampled_from(SUPPORTED_BITS), st.integers(1, 70), st.integers(1, 3))
def test_packing_fills_the_last_word(bits: int, count: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (count, columns), dtype=torch.uint8)
    packed = pack_columns(codes, bits)
    assert packed.shape == (-(-count * bits // 32), columns) and packed.dtype == torch.int32
    assert torch.equal(unpack_columns(packed, bits, count), codes)


def test_the_config_is_what_the_package_expects() -> None:
    static = scheme(Grid(8, -1, True, 0), "static")
    assert static.input_activations is not None and static.weights is not None
    assert (static.input_activations.dynamic, static.input_activations.strategy) == (False, "tensor")
    assert (static.weights.num_bits, static.weights.strategy, static.weights.symmetric) == (8, "channel", True)
    dynamic = scheme(Grid(8, -1, True, 0), "dynamic")
    assert dynamic.input_activations is not None
    assert (dynamic.input_activations.dynamic, dynamic.input_activations.strategy) == (True, "token")
    grouped = scheme(Grid(4, 32, False, 0))
    assert grouped.input_activations is None and grouped.weights is not None
    assert (grouped.weights.group_size, grouped.weights.strategy, grouped.weights.symmetric) == (32, "group", False)


def test_layers_on_several_grids_are_groups_by_name(tmp_path: Path) -> None:
    names = list(LAYERS)
    grids = {names[0]: Grid(4, 32, False, 0), names[1]: Grid(8, -1, True, 0)}
    layers = {name: quantized_layer(LAYERS[name], grid, 0) for name, grid in grids.items()}
    written = Artifact({}, (), layers.items(), grids[names[0]], (), {}, grids, ("lm_head",))
    CONTAINER.write(tmp_path, written)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    assert [group.weights.num_bits for group in parsed.config_groups.values() if group.weights] == [4, 8]
    for name, tensor in CONTAINER.read(tmp_path)[0].items():
        assert_equal(tensor, layers[name])


def test_shuffled_groups_cannot_be_stored() -> None:
    layer = quantized_layer((8, 32), Grid(4, 16, True, 0), 0)
    with pytest.raises(ValueError, match="groups must be consecutive columns"):
        pack(replace(layer, g_idx=layer.g_idx.flip(0)), "pack-quantized")


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="group_size=128 does not divide in_features=576 of layer; use 64, 32, 16 or -1"):
        CONTAINER.check("layer", 576, 576, Grid(4, 128))


@pytest.mark.parametrize("change", [{"quant_method": "gptq"}, {"format": "float-quantized"}])
def test_other_checkpoints_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    written, _, _ = artifact(Grid(8, -1, True, 0))
    CONTAINER.write(tmp_path, written)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not describe a compressed-tensors checkpoint"):
        CONTAINER.read(tmp_path)


def test_a_layer_without_its_weight_is_named(tmp_path: Path) -> None:
    written, _, _ = artifact(Grid(8, -1, True, 0))
    CONTAINER.write(tmp_path, written)
    stored = read_shards(tmp_path)
    lost = next(iter(LAYERS))
    del stored[f"{lost}.weight_packed"]
    write_shards(tmp_path, stored.items())
    with pytest.raises(InputError, match=f"layer {lost} lacks its weight"):
        CONTAINER.read(tmp_path)
