"""The GPTQ container: what is written comes back exactly, and the config says what consumers need to know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import exports.gptq
from exports.base import Artifact
from exports.containers import CONTAINERS
from exports.packing import unpack_rows
from exports.shards import SINGLE_FILE, read_shards, write_shards
from quantize.errors import InputError
from quantize.grids import SUPPORTED_BITS, Grid, QuantizedTensor, group_index

LAYERS = {"model.layers.0.self_attn.q_proj": (64, 96), "model.layers.0.mlp.down_proj": (32, 192)}
OPTIONS = {"desc_act": True, "damp_percent": 0.05, "true_sequential": False, "quantizer": "quantize:0.1.0"}
SKIPPED = ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj")


def quantized_layer(shape: tuple[int, int], grid: Grid, act_order: bool, seed: int) -> QuantizedTensor:
    """Random codes and zero points over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.num_groups(shape[1])
    zeros = torch.randint(1, grid.maxq + 1, (shape[0], groups), generator=generator, dtype=torch.uint8)
    order = torch.randperm(shape[1], generator=generator) if act_order else torch.arange(shape[1])
    return QuantizedTensor(
        codes=torch.randint(0, grid.maxq + 1, shape, generator=generator, dtype=torch.uint8),
        scales=torch.rand(shape[0], groups, generator=generator).half(),
        zeros=torch.full_like(zeros, 2 ** (grid.bits - 1)) if grid.symmetric else zeros,
        g_idx=group_index(shape[1], grid.group_size)[order],
        grid=grid,
    )


def artifact(grid: Grid, act_order: bool = False) -> tuple[Artifact, dict[str, QuantizedTensor], dict[str, Tensor]]:
    layers = {name: quantized_layer(shape, grid, act_order, i) for i, (name, shape) in enumerate(LAYERS.items())}
    dense = {
        "model.embed_tokens.weight": torch.randn(7, 96, dtype=torch.float16),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(64, dtype=torch.bfloat16),
        "model.norm.weight": torch.randn(96),
    }
    config = {"model_type": "llama", "hidden_size": 96}
    return Artifact(config, dense.items(), layers.items(), grid, SKIPPED, OPTIONS), layers, dense


def assert_equal(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert found.grid == expected.grid
    for part in ("codes", "scales", "zeros", "g_idx"):
        left, right = getattr(found, part), getattr(expected, part)
        assert left.dtype == right.dtype, part
        assert torch.equal(left, right), part


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_reading_undoes_writing(tmp_path: Path, bits: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    written, layers, dense = artifact(Grid(bits, group_size, symmetric), act_order)
    CONTAINERS["gptq"].write(tmp_path, written)
    found_layers, found_dense = CONTAINERS["gptq"].read(tmp_path)
    assert found_layers.keys() == layers.keys()
    for name, layer in layers.items():
        assert_equal(found_layers[name], layer)
        assert torch.equal(found_layers[name].dequantize(), layer.dequantize())
    assert found_dense.keys() == dense.keys()
    for name, tensor in dense.items():
        assert found_dense[name].dtype == tensor.dtype
        assert torch.equal(found_dense[name], tensor)


def test_stored_tensors_have_autogptqs_layout(tmp_path: Path) -> None:
    grid = Grid(4, 32, symmetric=False)
    written, layers, _ = artifact(grid)
    CONTAINERS["gptq"].write(tmp_path, written)
    stored = read_shards(tmp_path)
    for name, (rows, columns) in LAYERS.items():
        groups = columns // 32
        parts = {suffix: stored[name + suffix] for suffix in exports.gptq.SUFFIXES}
        assert {suffix: (tuple(part.shape), part.dtype) for suffix, part in parts.items()} == {
            ".qweight": ((columns // 8, rows), torch.int32),
            ".qzeros": ((groups, rows // 8), torch.int32),
            ".scales": ((groups, rows), torch.float16),
            ".g_idx": ((columns,), torch.int32),
        }
        # Input column c of output row r: nibble c % 8 of word c // 8.
        nibbles = torch.stack([parts[".qweight"][c // 8] >> (4 * (c % 8)) & 15 for c in range(columns)])
        assert torch.equal(nibbles.to(torch.uint8), layers[name].codes.t())
        assert torch.equal(unpack_rows(parts[".qzeros"].t().contiguous(), 4) + 1, layers[name].zeros)


def test_config_describes_the_layers(tmp_path: Path) -> None:
    written, _, _ = artifact(Grid(3, 32, symmetric=False))
    CONTAINERS["gptq"].write(tmp_path, written)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == written.config
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == quantization
    patterns = quantization.pop("dynamic")
    assert quantization.pop("modules_in_block_to_quantize") == [list(written.layers)]
    assert quantization == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 3,
        "group_size": 32,
        "sym": False,
        "desc_act": True,
        "static_groups": False,
        "true_sequential": False,
        "damp_percent": 0.05,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["quantize:0.1.0"]},
    }
    assert all(pattern.startswith("-:") for pattern in patterns)
    expressions = [re.compile(pattern.removeprefix("-:")) for pattern in patterns]
    for name in SKIPPED:
        assert sum(bool(expression.match(name)) for expression in expressions) == 1
        # Neither a longer name nor one with another character for a dot.
        assert not any(expression.match(name + "2") or expression.match(name.replace(".", "x")) for expression in expressions)


def test_nothing_skipped_leaves_no_patterns() -> None:
    assert "dynamic" not in exports.gptq.quantization_config(Grid(4), {})


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_shards_read_like_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    def write_small_shards(directory: Path, tensors: Any) -> None:
        write_shards(directory, tensors, shard_bytes=2000)

    monkeypatch.setattr(exports.gptq, "write_shards", write_small_shards)
    written, layers, _ = artifact(Grid(bits, 32), act_order=True)
    CONTAINERS["gptq"].write(tmp_path, written)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    found, _ = CONTAINERS["gptq"].read(tmp_path)
    for name, layer in layers.items():
        assert_equal(found[name], layer)


def test_equal_artifacts_have_equal_bytes(tmp_path: Path) -> None:
    written, _, _ = artifact(Grid(4, 32))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        CONTAINERS["gptq"].write(tmp_path / name, written)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second
    assert first.keys() == {SINGLE_FILE, "config.json", "quantize_config.json"}


@pytest.mark.parametrize(
    ("bits", "shape", "message"),
    [
        (4, (64, 100), r"in_features=100 of layer is not a multiple of 8, as 4-bit GPTQ packing needs; skip the layer"),
        (4, (60, 64), r"out_features=60 of layer is not a multiple of 8"),
        (3, (64, 48), r"in_features=48 of layer is not a multiple of 32, as 3-bit"),
        (2, (8, 64), r"out_features=8 of layer is not a multiple of 16"),
        (8, (64, 66), r"in_features=66 of layer is not a multiple of 4"),
    ],
)
def test_check_refuses_what_cannot_be_packed(bits: int, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CONTAINERS["gptq"].check("layer", *shape, Grid(bits))


def test_check_refuses_ragged_groups_and_accepts_the_rest() -> None:
    with pytest.raises(InputError, match=r"group_size=128 does not divide in_features=576 of layer; use 64, 32, 16 or -1"):
        CONTAINERS["gptq"].check("layer", 64, 576, Grid(4, 128))
    for bits in SUPPORTED_BITS:
        CONTAINERS["gptq"].check("layer", 96, 64, Grid(bits, 64))


def test_zero_point_zero_is_refused() -> None:
    layer = quantized_layer((32, 32), Grid(4, symmetric=False), act_order=False, seed=0)
    layer.zeros[3, 0] = 0
    with pytest.raises(ValueError, match="zero points below 1 cannot be stored in GPTQ v1"):
        exports.gptq.pack(layer)


def test_artifact_without_a_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the grid"):
        CONTAINERS["gptq"].write(tmp_path, Artifact({}, (), (), None, (), {}))


@pytest.mark.parametrize("suffix", [".qzeros", ".scales", ".g_idx"])
def test_missing_tensor_is_named(tmp_path: Path, suffix: str) -> None:
    written, _, _ = artifact(Grid(4, 32))
    CONTAINERS["gptq"].write(tmp_path, written)
    stored = load_file(tmp_path / SINGLE_FILE)
    layer = next(iter(LAYERS))
    del stored[layer + suffix]
    save_file(stored, tmp_path / SINGLE_FILE)
    with pytest.raises(InputError, match=rf"layer {re.escape(layer)} lacks {re.escape(suffix)}; the checkpoint is damaged"):
        CONTAINERS["gptq"].read(tmp_path)


@pytest.mark.parametrize(
    "quantization", [None, {"quant_method": "awq"}, {"quant_method": "gptq", "checkpoint_format": "marlin"}]
)
def test_other_formats_are_refused(tmp_path: Path, quantization: dict[str, str] | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(InputError, match=r"config\.json does not describe a GPTQ checkpoint"):
        CONTAINERS["gptq"].read(tmp_path)


def test_dense_container_keeps_every_tensor(tmp_path: Path) -> None:
    written, _, dense = artifact(Grid(4))
    CONTAINERS["safetensors"].check("layer", 7, 13, Grid(4, 128))
    CONTAINERS["safetensors"].write(tmp_path, Artifact(written.config, dense.items(), (), None, (), {}))
    layers, found = CONTAINERS["safetensors"].read(tmp_path)
    assert layers == {}
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in dense.items())
    assert json.loads((tmp_path / "config.json").read_text()) == written.config
