"""The decoder against transformers, in float32, on tiny random models of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from inference.attention import attend
from inference.config import read_config
from inference.engine import Engine
from inference.generate import generate
from inference.kv_cache import KVCache
from inference.load import LoadOptions, load
from inference.norm import RMSNorm
from inference.rope import rope_table
from quantize.errors import InputError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
}
TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A random checkpoint of each family."""
    path: Path = make_checkpoint(tmp_path_factory.mktemp(request.param) / "dense", FAMILIES[request.param]())
    return path


def reference(checkpoint: Path, tokens: list[int]) -> Tensor:
    """transformers' float32 logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


@torch.inference_mode()
def every_logit(checkpoint: Path, tokens: list[int], options: LoadOptions | None = None) -> Tensor:
    """The engine's logits of every position, from one prefill."""
    model = load(checkpoint, options)
    return model.forward(torch.tensor(tokens), KVCache(model.config, 64, model.dtype), every_position=True)


def test_prefill_gives_transformers_logits(checkpoint: Path) -> None:
    wanted = reference(checkpoint, TOKENS)
    for dense in ("packed", "plain", "stored"):
        torch.testing.assert_close(every_logit(checkpoint, TOKENS, LoadOptions(dense=dense)), wanted, atol=1e-4, rtol=0)


def test_decoding_step_by_step_gives_transformers_logits(checkpoint: Path) -> None:
    wanted = reference(checkpoint, TOKENS)
    engine = Engine(load(checkpoint), 64)
    found = [engine.prefill(TOKENS[:4])] + [engine.decode(token) for token in TOKENS[4:]]
    torch.testing.assert_close(torch.stack(found), wanted[3:], atol=1e-4, rtol=0)


def test_a_prompt_in_pieces_gives_the_same_logits(checkpoint: Path) -> None:
    model = load(checkpoint)
    cache = KVCache(model.config, 64)
    with torch.inference_mode():
        pieces = [model.forward(torch.tensor(part), cache, every_position=True) for part in (TOKENS[:5], TOKENS[5:])]
    torch.testing.assert_close(torch.cat(pieces), reference(checkpoint, TOKENS), atol=1e-4, rtol=0)


def test_greedy_text_is_transformers(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    wanted = model.generate(torch.tensor([TOKENS]), max_new_tokens=40, do_sample=False, pad_token_id=1)[0, len(TOKENS) :]
    assert list(generate(Engine(load(checkpoint), 64), TOKENS, 40)) == wanted.tolist()


def test_a_second_sequence_does_not_see_the_first(checkpoint: Path) -> None:
    engine = Engine(load(checkpoint), 64)
    fresh = engine.prefill(TOKENS[:3])
    engine.prefill(TOKENS)
    engine.decode(9)
    assert torch.equal(engine.prefill(TOKENS[:3]), fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_compute_and_cache_stay_close(checkpoint: Path, dtype: torch.dtype) -> None:
    wanted = reference(checkpoint, TOKENS)
    spread = float(wanted.std())
    engine = Engine(load(checkpoint, LoadOptions(dtype=dtype)), 64)
    assert engine.cache.keys.dtype == dtype
    assert float((engine.prefill(TOKENS) - wanted[-1]).abs().max()) < 0.1 * spread
    narrow_cache = Engine(load(checkpoint), 64, cache_dtype=dtype)
    narrow_cache.prefill(TOKENS[:-1])
    error = float((narrow_cache.decode(TOKENS[-1]) - wanted[-1]).abs().max())
    assert 0 < error < 0.05 * spread


@given(st.integers(1, 9), st.integers(0, 9), st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]), st.integers(0, 1000))
def test_attention_is_softmax_of_what_each_query_may_see(tokens: int, earlier: int, heads: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, kv_heads = heads
    queries = torch.randn(tokens, count, 8, generator=generator)
    keys, values = torch.randn(2, kv_heads, tokens + earlier, 8, generator=generator)
    wanted = torch.empty(tokens, count, 8)
    for token in range(tokens):
        for head in range(count):
            seen = slice(0, earlier + token + 1)
            shared = head // (count // kv_heads)
            share = functional.softmax(keys[shared, seen] @ queries[token, head] / 8**0.5, 0)
            wanted[token, head] = share @ values[shared, seen]
    torch.testing.assert_close(attend(queries, keys, values), wanted.view(tokens, -1), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-6, 1e-2), st.integers(-4, 4), st.integers(0, 1000))
def test_rms_norm_is_its_formula(rows: int, size: int, eps: float, magnitude: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, size, generator=generator) * 10.0**magnitude, torch.randn(size, generator=generator)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    torch.testing.assert_close(RMSNorm(weight, eps)(x).double(), wanted, atol=1e-12, rtol=2e-6)


def test_an_unknown_rope_type_is_refused() -> None:
    with pytest.raises(InputError, match=r"rope_type='yarn' is not supported; the engine has default, llama3"):
        rope_table({"rope_type": "yarn", "rope_theta": 1e4}, 8, 4)


def test_a_cache_too_small_or_too_large_is_refused(checkpoint: Path) -> None:
    model = load(checkpoint)
    with pytest.raises(InputError, match="max_tokens=257 is outside the model's context; use 1 to 256"):
        Engine(model, 257)
    with pytest.raises(InputError, match=r"dtype=torch.int8 is not supported; use torch.float32"):
        KVCache(model.config, 4, torch.int8)
    engine = Engine(model, 4)
    engine.prefill(TOKENS[:4])
    with pytest.raises(InputError, match=r"4 \+ 1 tokens do not fit into max_tokens=4; make it 5"):
        engine.decode(3)
    assert engine.cache.nbytes() == 2 * 3 * 2 * 4 * model.config.head_dim * 4


def test_bad_prompts_are_refused(checkpoint: Path) -> None:
    engine = Engine(load(checkpoint), 8)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        engine.prefill([])
    for token in (300, -1):
        with pytest.raises(InputError, match=f"token id {token} is outside the vocabulary; use 0 to 299"):
            engine.prefill([3, token])


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    MistralConfig(**SIZES, sliding_window=100).save_pretrained(tmp_path / "on")
    Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=100).save_pretrained(tmp_path / "off")
    assert read_config(tmp_path / "on").max_tokens == 100
    assert read_config(tmp_path / "off").max_tokens == 256
