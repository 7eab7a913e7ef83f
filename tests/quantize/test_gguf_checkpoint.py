"""GGUF files: the same tensors as transformers' own loader gives, read one by one."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quantize.blocks import DecoderWalk
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import InputError
from quantize.forwards import run_block

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


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's order of the rows of q and k: the halves of each head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, source: Checkpoint, tokenizer: PreTrainedTokenizerFast, kind: Kind, leave_out: str | None = None
) -> None:
    """Write the tiny Llama as a GGUF file; matrices in ``kind``, norms in F32."""
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
            writer.add_tensor(theirs, gguf.quants.quantize(weight, kind), raw_dtype=kind)
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


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.F32, Kind.BF16])
def test_tensors_are_transformers_to_the_bit(
    tmp_path: Path, source: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast, kind: Kind
) -> None:
    write_gguf(tmp_path / "tiny.gguf", source, tiny_tokenizer, kind)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected = model.state_dict()
    dtype = {Kind.F32: torch.float32, Kind.BF16: torch.bfloat16}.get(kind, torch.float16)
    assert checkpoint.names() == source.names()
    for name in checkpoint.names():
        found = checkpoint.tensor(name)
        assert found.dtype == checkpoint.dtype(name) == dtype
        assert tuple(found.shape) == checkpoint.shape(name)
        assert torch.equal(found, expected[name].to(dtype)), name
    assert checkpoint.config_dict()["dtype"] == str(dtype).removeprefix("torch.")


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
