"""Fewer key/value heads, and the perplexity that tells what it costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config

from inference import gqa
from inference.kv_cache import KVCache
from inference.kv_int8 import Int8KVCache
from inference.load import load
from inference.score import perplexity
from inference.window import RollingCache
from quantize.errors import InputError

TOKENS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_a_new_head_is_the_mean_of_its_group(heads: int, group: int, half: int, seed: int) -> None:
    weight = torch.randn(heads * group * 2 * half, 5, generator=torch.Generator().manual_seed(seed))
    found = gqa.pooled(weight, heads, 2 * half).view(heads, 2 * half, 5)
    for head in range(heads):
        old = [weight.view(-1, 2 * half, 5)[head * group + member] for member in range(group)]
        torch.testing.assert_close(found[head], sum(old) / group)


@pytest.fixture(scope="module")
def mha(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A model with as many key as query heads, and biases."""
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    path: Path = make_checkpoint(tmp_path_factory.mktemp("gqa") / "mha", config)
    return path


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_transformers_runs_the_converted_model_and_agrees(mha: Path, tmp_path: Path, kv_heads: int) -> None:
    target = tmp_path / "few"
    gqa.convert(mha, target, kv_heads)
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert reference.config.num_key_value_heads == kv_heads
    with torch.inference_mode():
        logits = reference(torch.tensor([TOKENS])).logits[0]
    wanted = math.exp(float(functional.cross_entropy(logits[:-1], torch.tensor(TOKENS[1:]))))
    model = load(target)
    assert perplexity(model, TOKENS, KVCache(model.config, 64)) == pytest.approx(wanted, rel=1e-5)
    assert gqa.cache_bytes(model.config) * 4 == gqa.cache_bytes(load(mha).config) * kv_heads


def test_equal_heads_lose_nothing(mha: Path, tmp_path: Path) -> None:
    gqa.convert(mha, tmp_path / "two", 2)
    shared = load(tmp_path / "two")
    raw = json.loads((tmp_path / "two" / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "two" / "model.safetensors")
    for name, tensor in tensors.items():  # each head twice: a model of four heads that says the same
        if ".k_proj." in name or ".v_proj." in name:
            tensors[name] = tensor.view(2, 1, 16, -1).repeat(1, 2, 1, 1).view(64, *tensor.shape[1:]).contiguous()
    (tmp_path / "four").mkdir()
    save_file(tensors, tmp_path / "four" / "model.safetensors", {"format": "pt"})
    (tmp_path / "four" / "config.json").write_text(json.dumps({**raw, "num_key_value_heads": 4}))
    gqa.convert(tmp_path / "four", tmp_path / "back", 2)
    back = load(tmp_path / "back")
    assert perplexity(back, TOKENS, KVCache(back.config, 64)) == perplexity(shared, TOKENS, KVCache(shared.config, 64))


def test_perplexity_does_not_depend_on_chunks(mha: Path) -> None:
    model = load(mha)
    exact = perplexity(model, TOKENS, KVCache(model.config, 64))
    for cache in (KVCache(model.config, 64), RollingCache(model.config, model.rope, 36, 4, max_tokens=64)):
        assert perplexity(model, TOKENS, cache, 7) == pytest.approx(exact, rel=1e-5)
    rounded = perplexity(model, TOKENS, Int8KVCache(model.config, 64), 7)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    with pytest.raises(InputError, match="perplexity of 1 tokens"):
        perplexity(model, TOKENS[:1], KVCache(model.config, 64))


def test_the_command_prints_size_and_quality(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def function(argument): return argument\n" * 20)
    out = tmp_path / "out"
    arguments = [str(tiny_llama), str(out), "--kv-heads", "1", "--text", str(text), "--tokens", "50"]
    assert gqa.main([*arguments, "--json"]) == 0
    before, after = json.loads(capsys.readouterr().out)
    assert (before["kv_heads"], after["kv_heads"]) == (2, 1)
    assert before["cache_bytes"] == 2 * after["cache_bytes"] == 2 * 4 * 2 * 16 * 2
    assert before["perplexity"] != after["perplexity"]
    assert (out / "tokenizer.json").exists()
    assert gqa.main(arguments) == 2
    assert "exists; name a new directory" in capsys.readouterr().err
    arguments[1] = str(tmp_path / "other")
    arguments[3] = "3"
    assert gqa.main(arguments) == 2
    assert "kv_heads=3 does not divide the 2" in capsys.readouterr().err
    arguments[5] = str(tmp_path / "none")
    assert gqa.main(arguments) == 2
