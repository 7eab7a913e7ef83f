"""Predicted memory: well-known models by their published figures, containers by packed tensors, caches by real caches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from eval.memory_containers import CONTAINERS, VariantSpec, Weights, variants
from eval.memory_geometry import CacheLayer, geometry, load_config
from eval.memory_predict import MemoryPrediction, Predictor, predict
from exports.gptq import pack
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN2_05B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_local_experts=8,
)
FP16, FP32 = VariantSpec("fp16", dtype="float16"), VariantSpec("fp32", dtype="float32")
INT4 = VariantSpec("int4", "gptq", bits=4, group_size=64, symmetric=False)


@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes_per_token"),
    [
        # Counts as the models' own repositories give them; a token's KV: 2 * layers * key heads * head_dim * 2 bytes.
        (LLAMA_2_7B, 6_738_415_616, 512 * 1024),
        (LLAMA_3_8B, 8_030_261_248, 128 * 1024),
        (QWEN2_05B, 494_032_768, 24 * 2 * 2 * 64 * 2),
        (MIXTRAL_8X7B, 46_702_792_704, 128 * 1024),
    ],
    ids=["llama-2-7b", "llama-3-8b", "qwen2-0.5b", "mixtral-8x7b"],
)
def test_well_known_models_have_their_published_sizes(config: Any, parameters: int, kv_bytes_per_token: int) -> None:
    prediction = predict(config, FP16, 100, 3)
    assert prediction.parameters == parameters
    assert prediction.stored.total == 2 * parameters
    assert prediction.kv_bytes_per_token == kv_bytes_per_token
    assert prediction.kv_bytes == 300 * kv_bytes_per_token


def test_llama_2_7b_by_hand() -> None:
    """The sizes that papers quote: 13.48 GB in FP16, and at INT4 with groups of 128 the layers' 6,476,005,376 weights."""
    predictor = Predictor(LLAMA_2_7B)
    assert round(predictor.predict(FP16, 1, 1).stored.total / 1e9, 2) == 13.48
    weights = predictor.predict(dataclasses.replace(INT4, group_size=128, dtype="float16"), 1, 1).stored
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert weights.codes == layers // 2
    assert weights.scales == layers // 128 * 2
    assert weights.zeros == layers // 128 // 2
    assert weights.g_idx == 32 * (6 * 4096 + 11008) * 4
    assert weights.embeddings == 2 * 32000 * 4096 * 2
    assert weights.dense == (2 * 32 + 1) * 4096 * 2
    # One int8 a weight and one float16 a row.
    int8 = predictor.predict(VariantSpec("int8", "int-quantized", 8, dtype="float16"), 1, 1).stored
    assert (int8.codes, int8.scales) == (layers, 32 * (5 * 4096 + 2 * 11008) * 2)
    # FP16 logits of 4096 positions, and the hidden states they are computed from.
    activations = predictor.predict(FP16, 4096, 2)
    assert activations.activation_bytes >= 2 * 4096 * 32000 * 2
    assert activations.largest[0].shape in ((2, 4096, 32000), (2, 4096, 11008))


def test_tied_embeddings_count_once() -> None:
    untied = Qwen2Config(**{**QWEN2_05B.to_dict(), "tie_word_embeddings": False})
    matrix = 151936 * 896
    assert geometry(untied).parameters - geometry(QWEN2_05B).parameters == matrix
    assert predict(QWEN2_05B, FP16, 1, 1).stored.embeddings == 2 * matrix
    assert predict(untied, FP16, 1, 1).stored.embeddings == 4 * matrix


def test_experts_are_quantized_and_routers_are_not() -> None:
    shapes = geometry(
        Qwen2MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=96
        )
    )
    attention = {(64, 64): 2 * 4, (32, 64): 2 * 4}
    experts = {(32, 64): 2 * 4 * 4, (64, 32): 4 * 4}
    shared = {(96, 64): 2 * 4, (64, 96): 4}
    expected: dict[tuple[int, int], int] = {}
    for part in (attention, experts, shared):
        for shape, count in part.items():
            expected[shape] = expected.get(shape, 0) + count
    assert shapes.layers == expected
    assert not any(name.endswith(("mlp.gate", "shared_expert_gate")) for name in shapes.layer_names)


def test_an_overridden_head_dim_counts() -> None:
    config = LlamaConfig(**SMALL, head_dim=32)
    assert predict(config, FP16, 1, 1).kv_bytes_per_token == 4 * 2 * 2 * 32 * 2


@pytest.mark.parametrize("context", [8, 31, 32, 33, 100])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        MistralConfig(**SMALL, sliding_window=32),
        Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 7}, head_dim=16, sliding_window=32),
    ],
    ids=["full", "sliding", "mixed"],
)
@torch.inference_mode()
def test_the_cache_is_what_a_real_cache_holds(config: Any, context: int) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cache = DynamicCache(config=config)
    model(input_ids=torch.zeros(2, context, dtype=torch.int64), past_key_values=cache)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    visible = sum(tensor.numel() * 4 for tensor in tensors)
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert predict(config, FP32, context, 2).kv_bytes == visible
    assert predict(config, FP32, context, 2, runtime="transformers").kv_bytes == held


@given(elements=st.integers(1, 4096), window=st.integers(2, 5000), context=st.integers(1, 10000), chunk=st.integers(1, 10000))
def test_a_window_bounds_the_cache(elements: int, window: int, context: int, chunk: int) -> None:
    full, sliding = CacheLayer(elements, None), CacheLayer(elements, window)
    assert full.tokens(context) == full.tokens(context, chunk) == context
    assert sliding.tokens(context) == min(context, window - 1)
    assert sliding.tokens(context) <= sliding.tokens(context, chunk) <= context


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 4).map(lambda n: 32 * n),
    columns=st.integers(1, 4).map(lambda n: 64 * n),
    group_size=st.sampled_from([-1, 16, 32, 64]),
)
@settings(max_examples=30)
def test_gptq_bytes_are_those_of_packed_tensors(bits: int, rows: int, columns: int, group_size: int) -> None:
    grid = Grid(bits, group_size, symmetric=False)
    groups = grid.num_groups(columns)
    tensor = QuantizedTensor(
        codes=torch.zeros(rows, columns, dtype=torch.uint8),
        scales=torch.ones(rows, groups, dtype=torch.float16),
        zeros=torch.ones(rows, groups, dtype=torch.uint8),
        g_idx=torch.arange(columns, dtype=torch.int32) // grid.columns_per_group(columns),
        grid=grid,
    )
    stored = {suffix: packed.numel() * packed.itemsize for suffix, packed in pack(tensor).items()}
    weights = CONTAINERS["gptq"](VariantSpec("x", "gptq", bits, group_size, False), rows, columns, 2)
    assert weights == Weights(codes=stored["qweight"], scales=stored["scales"], zeros=stored["qzeros"], g_idx=stored["g_idx"])


def test_chunks_need_less_and_the_last_logits_least() -> None:
    config = LlamaConfig(**{**SMALL, "vocab_size": 5000})
    whole = predict(config, FP16, 256, 2)
    chunked = predict(config, FP16, 256, 2, prefill_chunk=64)
    last = predict(config, FP16, 256, 2, logits="last")
    assert chunked.activation_bytes < whole.activation_bytes / 3
    assert whole.activation_bytes - last.activation_bytes > 2 * 200 * 5000 * 2
    assert whole.kv_bytes == chunked.kv_bytes == last.kv_bytes
    assert whole.largest[0].shape == (2, 256, 5000)


@given(context=st.integers(1, 200), batch=st.integers(1, 8))
@settings(max_examples=15)
def test_more_of_anything_never_needs_less(context: int, batch: int) -> None:
    here = PREDICTOR.predict(INT4, context, batch)
    assert here.peak_bytes <= PREDICTOR.predict(INT4, context + 1, batch).peak_bytes
    assert here.peak_bytes <= PREDICTOR.predict(INT4, context, batch + 1).peak_bytes
    assert here.peak_bytes == here.resident.total + here.kv_bytes + here.activation_bytes


PREDICTOR = Predictor(MistralConfig(**SMALL, sliding_window=32))


def test_the_cache_may_have_a_type_of_its_own() -> None:
    config = LlamaConfig(**SMALL)
    sizes = {kind: predict(config, FP16, 64, 1, kv_dtype=kind).kv_bytes for kind in ("float32", "float16", "int8", "int4")}
    assert sizes["float32"] == 2 * sizes["float16"] == 4 * sizes["int8"] == 8 * sizes["int4"]
    assert sizes["float16"] == predict(config, FP16, 64, 1).kv_bytes


def test_predicting_leaves_the_config_as_it_is() -> None:
    config = LlamaConfig(**SMALL, dtype="float16", pad_token_id=1)
    before = config.to_dict()
    for spec in variants():
        Predictor(config, runtime="transformers").predict(spec, 16, 1)
    assert config.to_dict() == before


def test_a_prediction_is_json() -> None:
    prediction = predict(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, pad_token_id=1), INT4, 16, 1)
    assert isinstance(prediction, MemoryPrediction)
    values = json.loads(json.dumps(prediction.as_dict()))
    assert values["peak_bytes"] == prediction.peak_bytes
    assert values["resident"]["codes"] == prediction.resident.codes > 0


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="group_size=48 does not divide in_features=64"):
        predict(LlamaConfig(**SMALL), dataclasses.replace(INT4, group_size=48), 16, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{}", "has no model_type"),
        ("[", "not valid JSON"),
        ('{"model_type": "no-such-family"}', "no usable config"),
        ('{"model_type": "t5"}', "no causal language model"),
        ('{"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}', "keeps no KV cache"),
    ],
)
def test_what_is_no_decoder_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        geometry(load_config(str(tmp_path)))
