"""Four-bit layers as codes: the kernel against the dequantized weight, and artifacts of every container that has such codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from exports.base import Artifact
from exports.containers import CONTAINERS
from exports.gguf_convert import main as convert_main
from exports.gguf_quantize import Options, quantize_file
from inference.engine import Engine
from inference.int4 import Int4Linear, from_tensor, join_codes
from inference.linear import Int8Linear, SideBySide
from inference.load import LoadOptions, load
from inference.read import read_model
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor, quantize_nearest

TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]


def layer(rows: int, columns: int, grid: Grid, seed: int, shuffled: bool = False) -> QuantizedTensor:
    """Random weights on ``grid``; ``shuffled`` groups are those of desc_act."""
    generator = torch.Generator().manual_seed(seed)
    tensor = quantize_nearest(torch.randn(rows, columns, generator=generator), grid)
    if shuffled:
        tensor.g_idx = tensor.g_idx[torch.randperm(columns, generator=generator)]
    return tensor


@given(
    st.sampled_from([32, 64, 128, 256, -1]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_kernel_is_the_dequantized_product_to_bfloat16(
    group_size: int, symmetric: bool, shuffled: bool, blocks: int, groups: int, tokens: int, seed: int
) -> None:
    columns = (96 if group_size == -1 else group_size) * groups
    tensor = layer(16 * blocks, columns, Grid(4, group_size, symmetric, 0), seed, shuffled)
    codes = from_tensor(tensor)
    assert codes is not None
    weight = tensor.dequantize()
    torch.testing.assert_close(codes.dequantize(), weight, atol=1e-5, rtol=1e-5)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(16 * blocks)
    found = Int4Linear(codes, bias)(x) - bias
    offset = (codes.minima + 8 * codes.scales).abs().repeat_interleave(codes.group_size, 1)
    spread = (codes.codes.float() - 8).abs() * codes.scales.repeat_interleave(codes.group_size, 1)
    inputs = x if codes.order is None else x[:, codes.order]
    reach = inputs.abs() @ (spread + offset).t()
    assert bool(((found - x @ weight.t()).abs() <= 2**-7 * reach + 1e-5).all())


def test_layers_the_kernel_cannot_hold_are_left_to_others() -> None:
    assert from_tensor(layer(24, 64, Grid(4, 32), 0)) is None  # rows
    assert from_tensor(layer(16, 64, Grid(8, 32), 0)) is None  # bits
    assert from_tensor(layer(16, 40, Grid(4, -1), 0)) is None  # columns
    assert from_tensor(layer(16, 72, Grid(4, 64), 0)) is None  # a ragged last group
    one, other = (from_tensor(layer(16, 64, Grid(4, 32), seed, True)) for seed in (1, 2))
    assert one is not None
    assert other is not None
    assert join_codes([one, other]) is None
    both = join_codes([one, one])
    assert both is not None
    assert torch.equal(both.dequantize(), torch.cat([one.dequantize()] * 2))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A float16 Llama whose layers have whole groups."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    path: Path = make_checkpoint(tmp_path_factory.mktemp("int4") / "dense", config)
    return path


def quantized(dense: Path, path: Path, container: str, grid: Grid) -> Path:
    """``dense`` rounded to nearest and written by one container."""
    checkpoint = open_checkpoint(str(dense))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    layers = {
        name.removesuffix(".weight"): quantize_nearest(tensors.pop(name), grid) for name in [*tensors] if "_proj." in name
    }
    config = checkpoint.config_dict()
    artifact = Artifact(config, tensors.items(), layers.items(), grid, (), {}, dict.fromkeys(layers, grid), ("lm_head",))
    path.mkdir()
    CONTAINERS[container].write(path, artifact)
    return path


def logits(path: Path, **options: Any) -> Tensor:
    """The last token's."""
    return Engine(load(path, LoadOptions(**options)), 64).prefill(TOKENS)


@pytest.mark.parametrize(
    ("container", "grid"),
    [
        ("gptq", Grid(4, 32)),
        ("gptq", Grid(4, 64, False)),
        ("awq", Grid(4, 32, False, 0)),
        ("compressed-tensors", Grid(4, 32, False, 0)),
    ],
)
def test_codes_stay_codes(dense: Path, tmp_path: Path, container: str, grid: Grid) -> None:
    path = quantized(dense, tmp_path / "artifact", container, grid)
    kept = load(path, LoadOptions(weights="int4"))
    assert all(
        isinstance(part, Int4Linear) for block in kept.blocks for part in (block.qkv, block.o, block.gate_up, block.down)
    )
    assert kept.nbytes() < load(path).nbytes()
    exact, found = logits(path), logits(path, weights="int4")
    assert 0 < float((found - exact).abs().max()) < 0.05 * float(exact.std())


@pytest.fixture(scope="module")
def gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as F16 GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    assert convert_main([str(tiny_llama), str(path)]) == 0
    return path


def reference(file: Path) -> Tensor:
    """transformers' logits of a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_types_give_transformers_logits(gguf: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.gguf"
    if kind == "F16":
        file.symlink_to(gguf)
    else:
        quantize_file(gguf, file, Options(kind, pure=True))
    wanted = reference(file)
    for path in (file, tmp_path):  # a file, and the directory of an artifact
        torch.testing.assert_close(logits(path), wanted, atol=1e-4, rtol=0)
    if kind.startswith("Q4"):
        stored = read_model(file, keep_int4=True)
        assert len(stored.int4) == 7 * 4
        plain = read_model(file, keep_int4=False).tensors
        for name, codes in stored.int4.items():
            torch.testing.assert_close(codes.dequantize(), plain[f"{name}.weight"], atol=1e-6, rtol=1e-6)
        found = logits(file, weights="int4")
        assert 0 < float((found - wanted).abs().max()) < 0.05 * float(wanted.std())


def test_dense_layers_can_be_rounded_to_int8_on_load(dense: Path) -> None:
    rounded = load(dense, LoadOptions(weights="int8"))
    assert isinstance(rounded.blocks[0].qkv, Int8Linear)
    assert not isinstance(rounded.head, Int8Linear | SideBySide)
    exact, found = logits(dense), logits(dense, weights="int8")
    assert 0 < float((found - exact).abs().max()) < 0.1 * float(exact.std())
    with pytest.raises(InputError, match="weights='int3' is not an option; use artifact, int4, int8"):
        LoadOptions(weights="int3")
