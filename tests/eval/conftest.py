"""A tiny model as a GGUF file, for the programs that read such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from quantize.checkpoint import Checkpoint, open_checkpoint

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_INNER = {
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


def _metadata(writer: gguf.GGUFWriter, config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
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
    writer.add_add_bos_token(False)


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's order of the rows of q and k: the halves of each head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_tiny(file: Path, source: Checkpoint, tokenizer: PreTrainedTokenizerFast, leave_out: str | None = None) -> Path:
    """Write the tiny Llama as a GGUF file, matrices in F16 and norms in F32."""
    config = source.config
    writer = gguf.GGUFWriter(file, "llama")
    _metadata(writer, config, tokenizer)
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _OUTER.items()}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight" for ours, theirs in _INNER.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for ours, theirs in names.items():
        weight = source.tensor(ours).float().numpy()
        for kind, count in heads.items():
            if kind in ours:
                weight = _interleaved(weight, count)
        if theirs != leave_out:
            writer.add_tensor(theirs, weight if weight.ndim == 1 else weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama in F16, alone in its directory. Read it only."""
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf", open_checkpoint(str(tiny_llama)), tiny_tokenizer)


@pytest.fixture(scope="session")
def incomplete_gguf(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The same without one of its matrices."""
    file = tmp_path_factory.mktemp("incomplete") / "tiny.gguf"
    return write_tiny(file, open_checkpoint(str(tiny_llama)), tiny_tokenizer, leave_out="blk.1.ffn_up.weight")
