"""Keys that describe the model, for each family, and the configurations that llama.cpp does not compute."""

from __future__ import annotations

import logging
import math
from typing import Any

import gguf
import pytest

from exports.gguf_config import complete_config, warn_of_differences
from exports.gguf_metadata import add_model_metadata, add_values
from exports.gguf_names import rope_tensors
from quantize.errors import InputError

# config.json files as published, cut to what matters.
LLAMA2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
}
LLAMA31: dict[str, Any] = {
    **LLAMA2,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 48, "long_factor": [float(i + 1) for i in range(48)]},
    "sliding_window": 262144,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}
PHI2 = {
    "model_type": "phi",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "hidden_act": "gelu_new",
}
GPT2 = {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    """The architecture's keys without its name in front."""
    complete = complete_config(config)
    name = {"phi": "phi2", "gemma3_text": "gemma3"}.get(complete["model_type"], complete["model_type"])
    writer = gguf.GGUFWriter(None, name)
    add_model_metadata(writer, complete)
    found = {key: value.value for key, value in writer.kv_data[0].items()}
    assert found.pop("general.architecture") == name
    assert all(key.startswith(f"{name}.") for key in found)
    return {key.removeprefix(f"{name}."): value for key, value in found.items()}


def test_llama() -> None:
    found = keys(LLAMA2)
    assert found == {
        "vocab_size": 32000,
        "context_length": 4096,
        "embedding_length": 4096,
        "block_count": 32,
        "feed_forward_length": 11008,
        "rope.dimension_count": 128,
        "rope.freq_base": 10000.0,
        "attention.head_count": 32,
        "attention.head_count_kv": 32,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-05,
    }
    newer = keys(LLAMA31)
    assert {key for key in newer if newer[key] != found.get(key)} == {
        "vocab_size",
        "context_length",
        "feed_forward_length",
        "rope.freq_base",
        "attention.head_count_kv",
    }
    assert set(rope_tensors(complete_config(LLAMA31))) == {"rope_freqs.weight"}


def test_rope_is_read_in_both_spellings() -> None:
    old = {**LLAMA2, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**LLAMA2, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}
    assert keys(old) == keys(new)
    assert keys(old)["rope.scaling.type"] == "linear"
    assert keys(old)["rope.scaling.factor"] == 2
    assert keys(old)["rope.freq_base"] == 1e6


def test_yarn_gives_the_magnitude_relative_to_llama_cpps_own() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = keys({**QWEN3, "rope_scaling": yarn})
    assert found["rope.scaling.type"] == "yarn"
    assert found["rope.scaling.original_context_length"] == 32768
    assert "rope.scaling.attn_factor" not in found
    own = 0.1 * math.log(4) + 1
    changed = keys({**QWEN3, "rope_scaling": {**yarn, "attention_factor": 1.0, "beta_fast": 16.0}})
    assert changed["rope.scaling.attn_factor"] == pytest.approx(1 / own)
    assert changed["rope.scaling.yarn_beta_fast"] == 16
    cancelling = keys({**QWEN3, "rope_scaling": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}})
    assert cancelling["rope.scaling.attn_factor"] == pytest.approx(1 / own)


def test_gemma() -> None:
    found = keys(GEMMA2)
    assert found["attention.sliding_window"] == 4096
    assert found["attn_logit_softcapping"] == 50
    assert found["final_logit_softcapping"] == 30
    assert found["attention.key_length"] == found["attention.value_length"] == 256
    assert "attention.sliding_window_pattern" not in found
    # What the published file leaves out is in transformers' defaults.
    third = keys(GEMMA3)
    assert third["attention.head_count"] == 8
    assert third["attention.head_count_kv"] == 4
    assert third["context_length"] == 131072
    assert third["rope.freq_base"] == 1_000_000
    assert third["rope.freq_base_swa"] == 10_000
    assert third["rope.scaling.factor"] == 8
    assert third["attention.sliding_window"] == 1024
    assert "final_logit_softcapping" not in third
    assert "attention.sliding_window_pattern" not in third
    other = {**GEMMA3["text_config"], "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    assert keys(other)["attention.sliding_window_pattern"] == [False, True]


def test_phi() -> None:
    found = keys(PHI3)
    assert found["rope.scaling.type"] == "longrope"
    assert found["rope.scaling.original_context_length"] == 4096
    assert found["rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert found["rope.dimension_count"] == 96
    assert found["attention.sliding_window"] == 262144
    tensors = rope_tensors(complete_config(PHI3))
    assert tensors["rope_factors_long.weight"].tolist() == [i + 1 for i in range(48)]
    assert tensors["rope_factors_short.weight"].tolist() == [1.5] * 48
    second = keys(PHI2)
    assert second["rope.dimension_count"] == 32
    assert second["attention.layer_norm_epsilon"] == 1e-5
    assert "attention.layer_norm_rms_epsilon" not in second


def test_gpt2() -> None:
    assert keys(GPT2) == {
        "block_count": 12,
        "context_length": 1024,
        "embedding_length": 768,
        "feed_forward_length": 3072,
        "attention.head_count": 12,
        "attention.layer_norm_epsilon": 1e-5,
        "vocab_size": 50257,
    }
    assert keys({**GPT2, "n_inner": 1000})["feed_forward_length"] == 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba' cannot become GGUF; these can: llama, mistral"),
        ({}, r"model_type=None cannot become GGUF"),
        ({**LLAMA2, "hidden_act": "gelu"}, r"hidden_act='gelu'.*only with one of silu, swish"),
        ({**LLAMA2, "hidden_size": "wide"}, r"model_type='llama' is not usable"),
        ({**QWEN3, "rope_scaling": LLAMA31["rope_scaling"]}, r"rope_type='llama3'.*only with default, linear, yarn, dynamic"),
        ({**GEMMA2, "query_pre_attn_scalar": 144}, r"query_pre_attn_scalar=144.*only with 256 \(with 26 layers\)"),
        ({**GEMMA3["text_config"], "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0.*only with null"),
        ({**GEMMA3["text_config"], "use_bidirectional_attention": True}, r"use_bidirectional_attention=True"),
        ({**GEMMA2, "tie_word_embeddings": False}, r"tie_word_embeddings=False.*only with true"),
        ({**PHI2, "tie_word_embeddings": True}, r"tie_word_embeddings=True.*only with false"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True.*only with false"),
    ],
)
def test_models_that_llama_cpp_does_not_compute_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete_config(config)


def test_missing_longrope_factors_are_refused() -> None:
    complete = complete_config(PHI3)
    del complete["rope_parameters"]["long_factor"]
    with pytest.raises(InputError, match=r"long_factor must be a list of 48 numbers, not None"):
        rope_tensors(complete)


def test_windows_that_llama_cpp_ignores_are_told(caplog: pytest.LogCaptureFixture) -> None:
    window = {"sliding_window": 1024}
    with caplog.at_level(logging.WARNING):
        warn_of_differences(complete_config({**LLAMA2, "model_type": "mistral", "sliding_window": None}))
        warn_of_differences(complete_config({**QWEN3, **window, "use_sliding_window": False}))
        warn_of_differences(complete_config({**GEMMA2, **window}))
    assert "sliding_window" not in caplog.text
    with caplog.at_level(logging.WARNING):
        warn_of_differences(complete_config({**LLAMA2, "model_type": "mistral", **window}))
    assert "sliding_window=1024: llama.cpp attends to the whole context" in caplog.text


def test_the_given_configuration_is_left_alone() -> None:
    config = {**PHI3, "rope_scaling": dict(PHI3["rope_scaling"])}
    complete_config(config)
    assert config == PHI3


def test_extra_keys() -> None:
    writer = gguf.GGUFWriter(None, "llama")
    values: dict[str, Any] = {"a": True, "b": 4_000_000_000, "c": -1, "d": 0.5, "e": "", "f": [1, 2], "g": ["x"]}
    add_values(writer, values)
    found = writer.kv_data[0]
    assert {key: found[key].value for key in values} == values
    kinds = {key: found[key].type.name for key in values}
    assert kinds == {"a": "BOOL", "b": "UINT32", "c": "INT32", "d": "FLOAT32", "e": "STRING", "f": "ARRAY", "g": "ARRAY"}
    wrongs: tuple[Any, ...] = (2**32, [], None)
    for wrong in wrongs:
        with pytest.raises(InputError, match=r"metadata k="):
            add_values(writer, {"k": wrong})
