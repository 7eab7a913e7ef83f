"""The names of a GGUF file's tensors: transformers' own, though its map is not shown the blocks from inside."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from quantize.gguf_checkpoint import _Outside

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = [
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    FalconConfig(**SIZES),
    Gemma2Config(**GROUPED, head_dim=8),
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    LlamaConfig(**GROUPED),
    Phi3Config(**GROUPED, pad_token_id=0),
    Qwen2Config(**GROUPED),
    Qwen3Config(**GROUPED),
    StableLmConfig(**GROUPED),
    Starcoder2Config(**GROUPED),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_map_is_that_of_the_whole_model(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
    expected = get_gguf_hf_weights_map(model, processor)
    assert len(expected) > 2 * 4
    assert get_gguf_hf_weights_map(_Outside(model), processor) == expected
