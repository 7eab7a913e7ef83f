"""The compiled decode step: the eager engine's logits and tokens, buckets, batches; what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import config as inductor
from transformers import Qwen3Config

from exports.gguf_convert import convert
from exports.gguf_quantize import Options, quantize_file
from inference import compile as compiling
from inference.attention import attend_each
from inference.attention_naive import NaiveAttention
from inference.bench_compile import share_of_products
from inference.compile import CompiledDecode, attend_bucket, bucket_of, need_compiler
from inference.engine import Engine
from inference.generate import generate, main
from inference.int4 import Int4Linear
from inference.kv_cache import KVCache
from inference.load import LoadOptions, load
from inference.model import Model
from inference.window import RollingCache
from quantize.errors import InputError

TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_buckets_hold_what_is_asked_for_and_are_few(length: int, longest: int) -> None:
    bucket = bucket_of(min(length, longest), longest)
    assert min(length, longest) <= bucket <= longest
    assert bucket == longest or bucket in (256 * 2**power for power in range(6))
    assert bucket < 2 * max(length, 256)


@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (6, 3)]), st.integers(1, 20), st.data())
@settings(max_examples=50)
def test_a_masked_bucket_is_the_cache_up_to_the_end(
    sequences: int, heads: tuple[int, int], bucket: int, data: st.DataObject
) -> None:
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, bucket), min_size=sequences, max_size=sequences)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    queries = 3 * torch.randn(sequences, heads[0], 8, generator=generator)
    past = torch.randn(2, sequences, heads[1], bucket, 8, generator=generator)
    new = torch.randn(2, sequences, heads[1], 8, generator=generator)
    bias = torch.zeros(sequences, 1, 1, bucket).masked_fill(torch.arange(bucket) >= lengths[:, None, None, None], -torch.inf)
    found = attend_bucket(queries, new[0], new[1], past[0], past[1], bias)
    for index, length in enumerate(lengths.tolist()):
        whole = torch.cat((past[:, index, :, :length], new[:, index, :, None]), 2)
        wanted = attend_each(queries[index : index + 1], whole[:1], whole[1:], torch.zeros(1))
        torch.testing.assert_close(found[index : index + 1], wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as plain Python: what is compiled, without the time it takes."""

    def plain(function: Any, **options: Any) -> Any:
        return function

    monkeypatch.setattr(compiling.torch, "compile", plain)


OPTIONS = {
    "packed": LoadOptions(),
    "plain": LoadOptions(dense="plain"),
    "stored": LoadOptions(dense="stored"),
    "int8": LoadOptions(weights="int8", head="int8"),
    "bfloat16": LoadOptions(dtype=torch.bfloat16),
}


def run(engine: Engine, tokens: list[int]) -> Tensor:
    """Logits of decoding ``tokens`` after a prompt, ``[tokens, vocab]``."""
    engine.prefill(TOKENS)
    return torch.stack([engine.decode(token) for token in tokens])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_step_is_the_engines(tiny_llama: Path, name: str) -> None:
    model = load(tiny_llama, OPTIONS[name])
    wanted, engine = run(Engine(model, 64), TOKENS[::-1]), Engine(model, 64, compiled=True)
    loose = name == "bfloat16"
    torch.testing.assert_close(run(engine, TOKENS[::-1]), wanted, atol=0.1 if loose else 1e-4, rtol=0)
    assert list(engine.compiled.seconds) == [(1, 64)]  # type: ignore[union-attr]


@pytest.mark.usefixtures("uncompiled")
def test_a_text_grows_through_its_buckets(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SMALLEST_BUCKET", 8)
    model = load(tiny_llama)
    engine = Engine(model, 40, compiled=True)
    assert engine.compiled is not None
    assert engine.compiled.prepare(9) >= 0
    assert list(engine.compiled.seconds) == [(1, 8), (1, 16)]
    wanted = list(generate(Engine(model, 40), TOKENS[:5], 36, stop=()))
    assert list(generate(engine, TOKENS[:5], 36, stop=())) == wanted
    assert list(engine.compiled.seconds) == [(1, 8), (1, 16), (1, 32), (1, 40)]
    with pytest.raises(InputError, match=r"40 \+ 1 tokens do not fit"):
        engine.decode(3)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sequences_of_different_lengths_share_a_step(tiny_llama: Path, dtype: torch.dtype) -> None:
    model = load(tiny_llama)
    caches = [KVCache(model.config, 32, dtype, slots=4) for _ in range(2)]
    step = CompiledDecode(model, caches[0])
    with torch.inference_mode():
        for cache in caches:
            model.forward(torch.tensor(TOKENS), cache.context([3, 9], [1, 2]))
        for pair in ([4, 8], [15, 16], [23, 42]):
            found = step(pair, first=1)
            wanted = model.forward(torch.tensor(pair), caches[1].context([1, 1], [1, 2]))
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert caches[0].lengths == caches[1].lengths == [0, 6, 12, 0]
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=1e-3, rtol=0)
    torch.testing.assert_close(caches[0].values, caches[1].values, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("uncompiled")
def test_weights_are_shared_and_let_go(tiny_llama: Path) -> None:
    from inference.opaque import _KERNELS

    before = len(_KERNELS)
    model = load(tiny_llama)
    engine = Engine(model, 16, compiled=True)
    assert len(_KERNELS) == before + 4 * 4
    twin: Any = engine.compiled._blocks[0].qkv  # type: ignore[union-attr]
    assert twin.nbytes() == model.blocks[0].qkv.nbytes()
    del engine, twin
    assert len(_KERNELS) == before


@pytest.mark.usefixtures("uncompiled")
def test_the_command_compiles_first(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_llama), "def function", "--tokens", "8"]
    assert main([*arguments]) == 0
    plain = capsys.readouterr()
    assert main([*arguments, "--compile"]) == 0
    found = capsys.readouterr()
    assert found.out == plain.out
    assert found.err.startswith("compiled in ") and not plain.err


@pytest.mark.parametrize("name", ["packed", "plain", "stored", "int8"])
def test_the_profile_knows_the_products(tiny_llama: Path, name: str) -> None:
    engine = Engine(load(tiny_llama, OPTIONS[name]), 32)
    assert 0 < share_of_products(engine, TOKENS, 4) < 1


@pytest.mark.usefixtures("uncompiled")
def test_blocks_of_a_kind_share_a_graph(tiny_llama: Path) -> None:
    mixed, narrow = load(tiny_llama), load(tiny_llama, OPTIONS["int8"])
    mixed.blocks[2] = narrow.blocks[2]
    mixed.blocks[3] = dataclasses.replace(mixed.blocks[3], down=narrow.blocks[3].down)
    wanted, engine = run(Engine(mixed, 64), TOKENS[::-1]), Engine(mixed, 64, compiled=True)
    torch.testing.assert_close(run(engine, TOKENS[::-1]), wanted, atol=1e-4, rtol=0)
    kinds = engine.compiled._kinds  # type: ignore[union-attr]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3


def test_other_caches_and_no_compiler_are_refused(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with pytest.raises(InputError, match=r"compiled=True runs on the contiguous cache .* not on RollingCache"):
        Engine(model, cache=RollingCache(model.config, model.rope, 8), compiled=True)
    with pytest.raises(InputError, match="not on no cache"):
        Engine(model, 16, use_cache=False, compiled=True)
    with pytest.raises(InputError, match="its default attention"):
        Engine(model, 16, attention=NaiveAttention(), compiled=True)
    nowhere = inductor.patch({"cpp.cxx": ("/none/g++",)})
    with nowhere, pytest.raises(InputError, match=r"needs a C\+\+ compiler, and torch finds none; install g\+\+"):
        need_compiler()


def compiled_equals_eager(model: Model, tolerance: float) -> CompiledDecode:
    engine = Engine(model, 64, compiled=True)
    torch.testing.assert_close(run(engine, TOKENS[::-1]), run(Engine(model, 64), TOKENS[::-1]), atol=tolerance, rtol=0)
    assert list(generate(engine, TOKENS, 40, stop=())) == list(generate(Engine(model, 64), TOKENS, 40, stop=()))
    assert engine.compiled is not None
    return engine.compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "plain", "stored", "int8"])
def test_compiled_it_is_the_engines_too(tiny_llama: Path, name: str) -> None:
    found = compiled_equals_eager(load(tiny_llama, OPTIONS[name]), 1e-4)
    assert found.seconds[1, 64] > 0


@pytest.mark.slow
def test_compiled_four_bits_are_the_engines(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "f16.gguf", "F16")
    quantize_file(tmp_path / "f16.gguf", tmp_path / "q4_0.gguf", Options("Q4_0"))
    model = load(tmp_path / "q4_0.gguf", LoadOptions(weights="int4"))
    assert isinstance(model.blocks[0].down, Int4Linear)
    engine = Engine(model, 64, compiled=True)
    # Inputs within float32 rounding of a tie in bfloat16 may go either way.
    torch.testing.assert_close(run(engine, TOKENS), run(Engine(model, 64), TOKENS), atol=0.02, rtol=0)


@pytest.mark.slow
def test_compiled_head_norms_are_the_engines(tmp_path: Path, make_checkpoint: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    config = Qwen3Config(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, **sizes)
    compiled_equals_eager(load(make_checkpoint(tmp_path / "qwen3", config)), 1e-4)
