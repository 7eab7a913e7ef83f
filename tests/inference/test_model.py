"""The decoder against transformers, in float32, on tiny random models of every family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from inference.attention import attend
from inference.config import read_config
from inference.context import Uncached, last_rows
from inference.engine import Engine
from inference.generate import generate
from inference.kv_cache import KVCache
from inference.load import LoadOptions, load
from inference.model import Model
from inference.norm import RMSNorm
from inference.rope import inverse_frequencies
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


@functools.cache
def tiny_model(path: Path) -> Model:
    """One model for all examples."""
    return load(path)


def reference(checkpoint: Path, tokens: list[int]) -> Tensor:
    """transformers' float32 logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


@torch.inference_mode()
def every_logit(checkpoint: Path, tokens: list[int], options: LoadOptions | None = None) -> Tensor:
    """The engine's logits of every position, from one prefill."""
    model = load(checkpoint, options)
    return model.forward(torch.tensor(tokens), KVCache(model.config, 64, model.dtype).context([len(tokens)]))


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
        pieces = [model.forward(torch.tensor(part), cache.context([len(part)])) for part in (TOKENS[:5], TOKENS[5:])]
    torch.testing.assert_close(torch.cat(pieces), reference(checkpoint, TOKENS), atol=1e-4, rtol=0)


def test_chunks_of_any_size_give_the_same_logits(checkpoint: Path) -> None:
    engine = Engine(load(checkpoint), 64)
    wanted = engine.prefill(TOKENS)
    for chunk in (1, 5, len(TOKENS), 100):
        torch.testing.assert_close(engine.prefill(TOKENS, chunk), wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="chunk=0 tokens makes no progress; use 1 or more"):
        engine.prefill(TOKENS, 0)


def test_without_a_cache_the_text_is_the_same(checkpoint: Path) -> None:
    model = load(checkpoint)
    engine = Engine(model, 64, use_cache=False)
    assert engine.cache is None
    assert list(generate(engine, TOKENS, 20)) == list(generate(Engine(model, 64), TOKENS, 20))
    torch.testing.assert_close(engine.prefill(TOKENS), reference(checkpoint, TOKENS)[-1], atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=r"0 \+ 13 tokens do not fit into max_tokens=12"):
        Engine(model, 12, use_cache=False).prefill([*TOKENS, 3])


@given(st.data())
@settings(max_examples=25)
def test_packed_sequences_are_each_what_they_are_alone(tiny_llama: Path, data: st.DataObject) -> None:
    """Sequences join, grow by any number of tokens at a time, and change slots' order; each has the logits it has alone."""
    model = tiny_model(tiny_llama)
    slots = data.draw(st.integers(1, 4))
    cache = KVCache(model.config, 32, slots=slots)
    texts: list[list[int]] = [[] for _ in range(slots)]
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(st.integers(0, slots - 1), min_size=1, unique=True))
        single = data.draw(st.booleans())
        added = [data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=1 if single else 6)) for _ in chosen]
        for slot, tokens in zip(chosen, added, strict=True):
            texts[slot] += tokens
        counts = [len(tokens) for tokens in added]
        with torch.inference_mode():
            packed = torch.tensor([token for tokens in added for token in tokens])
            found = model.forward(packed, cache.context(counts, chosen), last_rows(counts))
            for logits, slot in zip(found, chosen, strict=True):
                alone = model.forward(torch.tensor(texts[slot]), Uncached([len(texts[slot])]))[-1]
                torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
    whole = [text for text in texts if text]
    counts = [len(text) for text in whole]
    with torch.inference_mode():
        found = model.forward(torch.tensor([token for text in whole for token in text]), Uncached(counts), last_rows(counts))
    for logits, text in zip(found, whole, strict=True):
        torch.testing.assert_close(logits, Engine(model, 32).prefill(text), atol=1e-5, rtol=0)


def test_a_truncated_sequence_goes_on_from_there(tiny_llama: Path) -> None:
    model = tiny_model(tiny_llama)
    cache = KVCache(model.config, 16)
    with torch.inference_mode():
        model.forward(torch.tensor([3, 4, 5, 6]), cache.context([4]))
        cache.truncate(2)
        found = model.forward(torch.tensor([9]), cache.context([1]))[0]
    torch.testing.assert_close(found, Engine(model, 16).prefill([3, 4, 9]), atol=1e-5, rtol=0)


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
    assert isinstance(engine.cache, KVCache)
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
    with pytest.raises(InputError, match=r"rope_type='longrope' is not supported; the engine has default, linear"):
        inverse_frequencies({"rope_type": "longrope", "rope_theta": 1e4}, 8)
    with pytest.raises(InputError, match=r"rope_type='linear' needs factor in rope_parameters"):
        inverse_frequencies({"rope_type": "linear", "rope_theta": 1e4}, 8)


def test_a_cache_too_small_or_too_large_is_refused(checkpoint: Path) -> None:
    model = load(checkpoint)
    with pytest.raises(InputError, match="max_tokens=257 is outside the model's context; use 1 to 256"):
        Engine(model, 257)
    with pytest.raises(InputError, match="slots=0 holds no sequence"):
        KVCache(model.config, 4, slots=0)
    with pytest.raises(InputError, match=r"dtype=torch.int8 is not supported; use torch.float32"):
        KVCache(model.config, 4, torch.int8)
    engine = Engine(model, 4)
    engine.prefill(TOKENS[:4])
    with pytest.raises(InputError, match=r"4 \+ 1 tokens do not fit into max_tokens=4; make it 5"):
        engine.decode(3)
    assert engine.cache is not None
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
    assert read_config(tmp_path / "on").max_tokens == read_config(tmp_path / "on").window == 100
    assert read_config(tmp_path / "off").window is None
    assert read_config(tmp_path / "off").max_tokens == 256
