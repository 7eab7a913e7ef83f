"""The keys of a GGUF file that describe the model: what llama.cpp needs to build its graph.

Keys are those of the format's specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) as llama.cpp reads
them (``src/llama-arch.cpp``, ``src/llama-model.cpp`` there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gguf

from exports.gguf_config import WINDOW_PATTERN, architecture, full_attention_layers, head_dim, rope_parameters
from quantize.errors import InputError

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]


def add_model_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """Add the architecture's keys to a ``gguf.GGUFWriter``.

    Args:
        config: a completed configuration (:func:`exports.gguf_config.complete_config`).
    """
    name = architecture(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(_feed_forward_length(config))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    if name == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    if name == "phi2":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if name not in ("phi2", "phi3"):
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    _add_windows(writer, config, name)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if name in ("gemma2", "gemma3") and config.get(key):
            add(config[key])
    _add_rope(writer, config, name)


def _feed_forward_length(config: Mapping[str, Any]) -> int:
    # GPT-2 leaves n_inner out where it is four times the width.
    return int(config.get("intermediate_size") or config.get("n_inner") or 4 * config["hidden_size"])


def _add_windows(writer: Any, config: Mapping[str, Any], name: str) -> None:
    if name == "phi3":
        # Zero tells Phi-4 from the rest of the family.
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if name not in WINDOW_PATTERN:
        return
    full = full_attention_layers(config) or []
    if name == "gemma3" and all(full):
        return
    writer.add_sliding_window(config["sliding_window"])
    if full != [(layer + 1) % WINDOW_PATTERN[name] == 0 for layer in range(len(full))]:
        writer.add_sliding_window_pattern([not each for each in full])


def _add_rope(writer: Any, config: Mapping[str, Any], name: str) -> None:
    rope = rope_parameters(config)
    rotated = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    if name in ("llama", "phi2", "phi3"):
        writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(rope["rope_theta"])
    if name == "gemma3":
        writer.add_rope_freq_base_swa(rope_parameters(config, "sliding_attention")["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn(writer, config, rope)
    elif kind == "longrope":
        _add_longrope(writer, config, rope)
    elif name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])


def _add_yarn(writer: Any, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """YaRN (https://arxiv.org/abs/2309.00071).

    llama.cpp multiplies cosines and sines by 0.1 ln(factor) + 1; a checkpoint that wants another magnitude is served by
    the ratio of the two.
    """
    factor = rope["factor"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    usual = _magnitude(factor, 1.0)
    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = _magnitude(factor, rope["mscale"]) / _magnitude(factor, rope["mscale_all_dim"])
    if wanted is not None and wanted != usual:
        writer.add_rope_scaling_attn_factors(wanted / usual)
    if rope.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if rope.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _add_longrope(writer: Any, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = config["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(attention)


def add_values(writer: Any, values: Mapping[str, Value]) -> None:
    """Add or replace keys, typed by their values: bool, int (uint32, or int32 below zero), float (float32), str, lists.

    Raises:
        InputError: a value of another type, an integer beyond 32 bits, or an empty list.
    """
    for key, value in values.items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            if not -(2**31) <= value < 2**32:
                raise InputError(f"metadata {key}={value} is no 32-bit integer; give a smaller one, or a string")
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        elif isinstance(value, Sequence) and len(value) and isinstance(value[0], bool | int | float | str):
            writer.add_array(key, value)
        else:
            raise InputError(f"metadata {key}={value!r} cannot be stored; give a bool, int, float, str or a list of them")
