"""The decode step in C++ against the engine's own, part by part and as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from inference.attention import attend
from inference.attention_naive import NaiveAttention
from inference.bench_cases import Bench
from inference.engine import Engine
from inference.generate import generate
from inference.generate import main as generate_main
from inference.int4 import from_tensor
from inference.kv_cache import KVCache
from inference.linear import quantize_rows
from inference.load import LoadOptions, load
from inference.native import build, linear
from inference.native.attention import attend_pages, attend_slots
from inference.native.linear import FEW_TOKENS, NativeLinear
from inference.native.step import NativeEngine, NativeStep
from inference.paged import PagedCache
from inference.requests import Request
from inference.scheduler import Policy, Scheduler
from inference.speculative import DraftModel, Speculator
from inference.static_batching import StaticBatching
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor, quantize_nearest

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="needs a C++ compiler: apt-get install g++"
)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied-biases": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-odd": lambda: LlamaConfig(
        **SIZES | {"num_attention_heads": 6, "hidden_size": 60, "intermediate_size": 44}, head_dim=10
    ),
    "llama-seven-to-one": lambda: LlamaConfig(
        **SIZES | {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
    ),
    "llama-dynamic": lambda: LlamaConfig(**SIZES | {"max_position_embeddings": 8}, rope_parameters=DYNAMIC),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
}
TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    path: Path = make_checkpoint(tmp_path_factory.mktemp(request.param) / "dense", FAMILIES[request.param]())
    return path


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def both(path: Path, cache: torch.dtype = torch.float32, **options: Any) -> tuple[Engine, NativeEngine]:
    """The engine in torch and in C++, as the same options load it."""
    plain = load(path, LoadOptions(**options, max_tokens=64))
    native = load(path, LoadOptions(**options, max_tokens=64, native=True))
    return Engine(plain, 64, cache), NativeEngine(native, 64, cache)


def steps(engine: Engine, prompt: int = 5) -> Tensor:
    """Logits of every position from the prompt's end on."""
    first = engine.prefill(TOKENS[:prompt])
    return torch.stack([first, *(engine.decode(token) for token in TOKENS[prompt:])])


@pytest.mark.parametrize("cache", [torch.float32, torch.float16])
def test_logits_are_the_engines(checkpoint: Path, threads: int, cache: torch.dtype) -> None:
    plain, native = both(checkpoint, cache)
    assert isinstance(plain.cache, KVCache) and isinstance(native.cache, KVCache)
    # In float16, a key within float32 rounding of two neighbours is stored as either.
    tolerance = 1e-4 if cache == torch.float32 else 2e-3
    torch.testing.assert_close(steps(native), steps(plain), atol=tolerance, rtol=0)
    torch.testing.assert_close(native.cache.keys, plain.cache.keys, atol=tolerance, rtol=2e-3)
    torch.testing.assert_close(native.cache.values, plain.cache.values, atol=tolerance, rtol=2e-3)
    assert native.cache.lengths == plain.cache.lengths == [len(TOKENS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_embedding_of_any_width_is_looked_up(tiny_llama: Path, dtype: torch.dtype) -> None:
    models = [load(tiny_llama, LoadOptions(native=native)) for native in (True, False)]
    for model in models:
        model.embedding = model.embedding.to(dtype)
    native, plain = NativeEngine(models[0], 8), Engine(models[1], 8)
    for engine in (native, plain):
        engine.prefill([1])
    for token in (0, 7, models[0].config.vocab_size - 1):
        assert (native.decode(token) - plain.decode(token)).abs().max() < 1e-4
    for token in (-1, models[0].config.vocab_size):
        with pytest.raises(IndexError, match=f"token {token} of"):
            native.decode(token)
    models[0].embedding = models[0].embedding.double()
    with pytest.raises(InputError, match="float64"):
        NativeEngine(models[0], 8)


def test_greedy_text_is_the_engines_and_a_second_one_does_not_see_the_first(checkpoint: Path) -> None:
    plain, native = both(checkpoint)
    for prompt in (TOKENS[:4], TOKENS[3:9], TOKENS[:1]):
        assert list(generate(native, prompt, 30, stop=())) == list(generate(plain, prompt, 30, stop=()))


@pytest.mark.parametrize("cache", [torch.float32, torch.float16])
def test_attention_over_more_positions_than_a_tile(tmp_path: Path, make_checkpoint: Any, cache: torch.dtype) -> None:
    path = make_checkpoint(tmp_path / "dense", LlamaConfig(**SIZES | {"max_position_embeddings": 256}))
    plain, native = (
        kind(load(path, LoadOptions(max_tokens=256, native=kind is NativeEngine)), 256, cache)
        for kind in (Engine, NativeEngine)
    )
    prompt = [index * 7 % 300 for index in range(190)]
    for engine in (plain, native):
        engine.prefill(prompt)
    for token in TOKENS:
        torch.testing.assert_close(
            native.decode(token), plain.decode(token), atol=1e-4 if cache == torch.float32 else 2e-3, rtol=0
        )


def test_float16_weights_stay_16_bits_wide(checkpoint: Path) -> None:
    plain, native = both(checkpoint, dense="stored")
    torch.testing.assert_close(steps(native), steps(plain), atol=1e-4, rtol=0)
    wide = load(checkpoint, LoadOptions(native=True))
    held = native.model.nbytes() - native.model.embedding.nbytes
    assert held < 0.6 * (wide.nbytes() - wide.embedding.nbytes)


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_int8_artifacts(tmp_path: Path, make_checkpoint: Any, make_int8: Any, activations: str, group_size: int) -> None:
    if activations != "none" and group_size != -1:
        group_size = -1  # activations of one scale a token go with weights of one scale a channel
    source = make_checkpoint(tmp_path / "dense", LlamaConfig(**SIZES))
    plain, native = both(make_int8(source, tmp_path / "int8", activations, group_size))
    wanted, found = steps(plain), steps(native)
    near = (found - wanted).abs()
    # An input within float32 rounding of a tie takes either code, and one such code moves a logit by about a step.
    assert float(near.median()) < 1e-4
    assert float(near.max()) < (1e-4 if activations == "none" else 0.05 * float(wanted.abs().max()))


def native_layer(kind: str, tensor: QuantizedTensor, weight: Tensor, bias: Tensor | None) -> NativeLinear:
    if kind in ("float32", "float16"):
        return linear.dense(weight, bias, kind == "float16")
    if kind == "int4":
        codes = from_tensor(tensor)
        assert codes is not None
        return linear.int4(codes, bias)
    rows, scales = quantize_rows(weight)
    return linear.int8_weight_only(rows, scales, bias) if kind == "int8-weight" else linear.int8(rows, scales, bias)


def rounded_by_block(x: Tensor) -> Tensor:
    """Inputs as 4-bit layers see them: 8 bits in blocks of 32."""
    blocks = x.view(-1, linear.BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return (torch.round(blocks / scale.clamp_min(1e-30)) * scale).view(-1)


@given(
    st.sampled_from(["float32", "float16", "int8-weight", "int8", "int4"]),
    st.sampled_from([32, 64, 128, 256]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(-3, 3),
    st.integers(0, 99),
)
@settings(max_examples=120)
def test_products_are_those_of_the_weight(
    kind: str, group_size: int, symmetric: bool, shuffled: bool, blocks: int, groups: int, magnitude: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns, rows = group_size * groups, 16 * blocks
    tensor = quantize_nearest(torch.randn(rows, columns, generator=generator), Grid(4, group_size, symmetric, 0))
    if shuffled:
        tensor.g_idx = tensor.g_idx[torch.randperm(columns, generator=generator)]
    weight = torch.randn(rows, columns, generator=generator).half().float()
    bias = torch.randn(rows, generator=generator) if seed % 2 else None
    x = torch.randn(columns, generator=generator) * 10.0**magnitude
    layer = native_layer(kind, tensor, weight, bias)
    if kind == "int4":
        codes = from_tensor(tensor)
        assert codes is not None
        inputs = x if codes.order is None else x[codes.order]
        seen = rounded_by_block(inputs)
        weight = tensor.dequantize() if codes.order is None else tensor.dequantize()[:, codes.order]
        torch.testing.assert_close(
            layer(x.expand(FEW_TOKENS + 1, -1))[0],
            functional.linear(inputs, weight, bias),
            atol=1e-4 * 10.0**magnitude,
            rtol=1e-4,
        )
    elif kind == "int8":
        rounded, scale = quantize_rows(x[None])
        seen, (held, scales) = (rounded * scale)[0], quantize_rows(weight)
        weight = held * scales
    else:
        seen = x
        weight = layer(torch.eye(columns)).t() - (0 if bias is None else bias[:, None])
    reach = float((seen.abs() @ weight.abs().t()).max())
    found = layer.few(x[None])[0]
    torch.testing.assert_close(found, functional.linear(seen, weight, bias), atol=1e-5 * reach + 1e-6, rtol=1e-5)
    # Beside others, a token is multiplied as it is alone.
    beside = torch.randn(seed % FEW_TOKENS + 1, columns, generator=generator)
    at = seed % len(beside)
    beside[at] = x
    assert torch.equal(layer(beside)[at], found)


@given(st.booleans(), st.integers(1, 30), st.integers(1, 50), st.integers(1, FEW_TOKENS), st.integers(0, 99))
def test_floats_of_any_shape(half: bool, rows: int, columns: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).half().float()
    bias, x = torch.randn(rows, generator=generator), torch.randn(tokens, columns, generator=generator)
    layer = linear.dense(weight, bias if seed % 2 else None, half)
    found = layer.few(x)
    torch.testing.assert_close(found, functional.linear(x, weight, bias if seed % 2 else None), atol=1e-4, rtol=1e-5)
    assert all(torch.equal(layer.few(token[None])[0], row) for token, row in zip(x, found, strict=True))


@given(
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([4, 10, 16, 64]),
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_sequences_attend_as_torch_has_them(
    dtype: torch.dtype, kv_heads: int, shared: int, head_dim: int, ends: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(5, kv_heads, 150, head_dim, generator=generator).to(dtype) for _ in range(2))
    queries = torch.randn(len(ends), kv_heads * shared, head_dim, generator=generator) * 3
    slots = torch.randperm(5, generator=generator)[: len(ends)]
    found = attend_slots(queries, keys, values, slots, torch.tensor(ends))
    for row, (slot, end) in enumerate(zip(slots.tolist(), ends, strict=True)):
        wanted = attend(queries[row : row + 1], keys[slot, :, :end], values[slot, :, :end])[0]
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend_slots(queries.double(), keys, values, slots, torch.tensor(ends)), found.double())
    # The same in pages: 10 tokens of a slot are a block.
    key_pages, value_pages = (part.transpose(0, 1).reshape(kv_heads, 75, 10, head_dim) for part in (keys, values))
    tables = slots[:, None] * 15 + torch.arange(15)
    assert torch.equal(attend_pages(queries, key_pages, value_pages, tables, torch.tensor(ends)), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_native_batch_is_what_its_requests_are_alone(checkpoint: Path, dtype: torch.dtype) -> None:
    plain, native = (load(checkpoint, LoadOptions(max_tokens=64, native=native)) for native in (False, True))
    assert native.native and not plain.native
    requests = [Request(TOKENS[:length], length, stop=()) for length in (3, 7, 5)]
    found = StaticBatching(native, 3, dtype).run(requests)
    wanted = StaticBatching(plain, 1, dtype).run(requests)
    assert [result.tokens for result in found] == [result.tokens for result in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_native_pages_give_what_requests_are_alone(tiny_llama: Path, dtype: torch.dtype) -> None:
    plain, native = load(tiny_llama), load(tiny_llama, LoadOptions(native=True))
    scheduler = Scheduler(native, PagedCache(native.config, 24, 4, dtype, native=True), Policy(budget=6, max_sequences=3))
    requests = [Request(TOKENS[: 3 + index], 14 - index, stop=()) for index in range(6)]
    numbers = [scheduler.submit(request) for request in requests]
    results = scheduler.run()
    for number, request in zip(numbers, requests, strict=True):
        alone = generate(Engine(plain, 64, dtype), request.prompt, request.max_new_tokens, stop=())
        assert list(results[number].tokens) == list(alone)


def test_a_native_draft_guesses_the_same_text(tiny_llama: Path) -> None:
    plain, native = load(tiny_llama), load(tiny_llama, LoadOptions(native=True))
    draft = DraftModel(load(tiny_llama, LoadOptions(weights="int8", head="int8", native=True)), 64)
    speculator = Speculator(native, draft, 4, 64)
    assert list(speculator.generate(TOKENS, 40, stop=())) == list(generate(Engine(plain, 64), TOKENS, 40, stop=()))
    assert speculator.acceptance.accepted > 0


def test_rows_of_zeros_and_extreme_codes() -> None:
    codes = torch.tensor([[-128, 127] * 32, [127] * 64, [-128] * 64], dtype=torch.int8)
    layer = linear.int8(codes, torch.ones(3, 1), None)
    assert layer.few(torch.zeros(1, 64)).tolist() == [[0.0, 0.0, 0.0]]
    x = torch.tensor([-1.0, 1.0] * 32)
    rounded, scale = quantize_rows(x[None])
    wanted = (rounded.double() @ codes.double().t() * scale.double())[0].float()
    torch.testing.assert_close(layer.few(x[None])[0], wanted, atol=0, rtol=1e-6)


def test_four_bit_artifacts(tmp_path: Path, tiny_llama: Path) -> None:
    from exports.gguf_convert import convert
    from exports.gguf_quantize import Options, quantize_file

    convert(tiny_llama, tmp_path / "f16.gguf", "F16")
    for kind in ("Q4_0", "Q4_1"):
        quantize_file(tmp_path / "f16.gguf", tmp_path / f"{kind}.gguf", Options(kind))
        plain = Engine(load(tmp_path / f"{kind}.gguf"), 64)
        native = NativeEngine(load(tmp_path / f"{kind}.gguf", LoadOptions(weights="int4", native=True)), 64)
        wanted, found = steps(plain), steps(native)
        # Inputs of 8 bits by blocks of 32: about half a percent of each.
        assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
        kinds = {layer.kind for block in native.model.blocks for layer in (block.o, block.down)}  # type: ignore[attr-defined]
        assert kinds == {linear.INT4_MIDDLE if kind == "Q4_0" else linear.INT4}


def test_what_the_step_has_not_is_refused(tiny_llama: Path) -> None:
    native = load(tiny_llama, LoadOptions(native=True))
    with pytest.raises(InputError, match="plain float32 or float16 cache"):
        NativeEngine(native, 16, torch.bfloat16)
    with pytest.raises(InputError, match="plain float32 or float16 cache"):
        NativeEngine(native, 16, torch.int8)
    with pytest.raises(InputError, match="default attention"):
        NativeStep(native, KVCache(native.config, 16, attention=NaiveAttention()))
    with pytest.raises(InputError, match="native=True"):
        NativeEngine(load(tiny_llama), 16)
    with pytest.raises(InputError, match="float32 on the CPU"):
        LoadOptions(dtype=torch.bfloat16, native=True)
    engine = NativeEngine(native, 4)
    engine.prefill([1, 2, 3])
    engine.decode(4)
    with pytest.raises(InputError, match="do not fit"):
        engine.decode(5)


def test_a_missing_or_broken_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path))
    for compiler, message in (
        ("no-such-compiler", "no-such-compiler is not on the path"),
        ("false", "does not compile step.cpp"),
    ):
        build.library.cache_clear()
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(InputError, match=message):
            build.library()
    assert not list(tmp_path.rglob("*.so"))
    build.library.cache_clear()


def test_the_command_line_decodes_natively(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_main([str(tiny_llama), "the cat", "--tokens", "5"]) == 0
    plain = capsys.readouterr().out
    assert generate_main([str(tiny_llama), "the cat", "--tokens", "5", "--native"]) == 0
    assert capsys.readouterr().out == plain


def test_the_bench_runs_in_torch_where_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    build.library.cache_clear()
    bench = Bench(tiny_llama, tmp_path, rounds=1, prompt=4, tokens=2)
    assert not bench.has_compiler and bench.fp32_step is bench.fp32 and bench.int8_step is bench.int8
    build.library.cache_clear()
