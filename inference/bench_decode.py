"""Rows of the bench about one sequence: the cache, precisions, and other programs."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from eval.consumers import llamacpp
from inference.bench_cases import Bench, LeftOut, Row, decode_seconds, ratios, read_bandwidth, stopwatch, weight_bytes
from inference.engine import Engine
from inference.generate import generate
from inference.model import Model
from inference.native.step import engine_of
from inference.speculative import DraftModel, Speculator
from quantize.errors import InputError


def _rate(seconds: list[float]) -> str:
    return f"{1 / statistics.median(seconds):.1f}"


def cache_against_none(bench: Bench) -> Row:
    """Decode at a context of 512 tokens, with the cache and computing everything again."""
    ids = bench.ids(512)

    def with_cache() -> float:
        return decode_seconds(bench.fp32, ids, 16)

    def without() -> float:
        engine = Engine(bench.fp32, 520, use_cache=False)
        engine.prefill(ids)
        return stopwatch(lambda: engine.decode(5))

    cached, none = bench.turns(with_cache, without)
    detail = f"fp32, 512 tokens of context: {_rate(cached)} tokens/s with the cache, {_rate(none)} without"
    return Row("KV cache against none, decode", 10, ratios(none, cached), detail)


def native_against_torch(bench: Bench) -> list[Row]:
    """The step as one C++ function against the same as torch operations."""
    if not bench.has_compiler:
        raise LeftOut("the native step: there is no C++ compiler here")
    ids, rows = bench.ids(bench.prompt), []
    for name, native, torch_model in (
        ("fp32", bench.fp32_step, bench.fp32),
        ("int8", bench.int8_step, bench.int8),
        ("int4", bench.int4_step, bench.int4),
    ):
        fast, slow = bench.turns(
            *(lambda model=model: decode_seconds(model, ids, bench.tokens) for model in (native, torch_model))
        )
        detail = f"{_rate(fast)} tokens/s against {_rate(slow)}"
        rows.append(Row(f"decode step in C++ against torch operations, {name}", None, ratios(slow, fast), detail))
    return rows


def against_transformers(bench: Bench) -> Row:
    """Greedy decode here and in ``transformers.generate``, both float32."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    ids = bench.ids(bench.prompt)

    def generate(tokens: int) -> float:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return stopwatch(lambda: peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings))

    def theirs() -> float:
        return (generate(bench.tokens + 1) - generate(1)) / bench.tokens

    ours, other = bench.turns(lambda: decode_seconds(bench.fp32_step, ids, bench.tokens), theirs)
    detail = f"{_rate(ours)} tokens/s here, {_rate(other)} there; prefill taken off both"
    return Row("our fp32 decode against `transformers.generate` fp32", 2, ratios(other, ours), detail)


def int8_against_fp32(bench: Bench) -> list[Row]:
    """INT8 weights and activations against float32, over a float32 cache and over the usual one of 16 bits."""
    ids = bench.ids(bench.prompt)
    cases = ((bench.int8_step, None), (bench.int8_step, torch.float16), (bench.fp32_step, None))
    fast, half, slow = bench.turns(
        *(lambda model=model, cache=cache: decode_seconds(model, ids, bench.tokens, cache) for model, cache in cases)
    )
    title, against = "INT8 decode against our fp32 decode", f"(weights=int8, head=int8) against {_rate(slow)}"
    return [
        Row(title, 3, ratios(slow, fast), f"float32 caches; {_rate(fast)} tokens/s {against}"),
        Row(f"{title}, 16-bit cache", None, ratios(slow, half), f"{_rate(half)} tokens/s {against} over a float32 cache"),
    ]


def against_llamacpp(bench: Bench) -> list[Row]:
    """The best precision here against llama.cpp's Q4_0 and F16, on as many threads."""
    ids, threads = bench.ids(bench.prompt), torch.get_num_threads()

    def theirs(file: Path) -> float:
        speed = llamacpp.bench(file, prompt_tokens=16, generated_tokens=bench.tokens, repetitions=1, threads=threads)
        return 1 / speed.generation

    try:
        theirs(bench.f16_file)
    except InputError as error:
        raise LeftOut(f"against llama.cpp: {error}") from error
    models: dict[str, Model] = {"int8": bench.int8_step, "int4 of the same Q4_0 file": bench.int4_step}
    # llama.cpp's cache is in 16 bits too.
    half = torch.float16
    measures = [lambda model=model: decode_seconds(model, ids, bench.tokens, half) for model in models.values()]
    found = bench.turns(*measures, lambda: theirs(bench.q4_file), lambda: theirs(bench.f16_file))
    best = min(range(len(models)), key=lambda index: statistics.median(found[index]))
    name, ours, q4, f16 = list(models)[best], found[best], found[-2], found[-1]
    detail = (
        f"{threads} threads, 16-bit caches; here {_rate(ours)} tokens/s ({name}), "
        f"llama.cpp {_rate(q4)} in Q4_0, {_rate(f16)} in F16"
    )
    return [
        Row("our best precision against llama.cpp Q4_0, decode", 0.7, ratios(q4, ours), detail),
        Row("our best precision against llama.cpp F16, decode", 1, ratios(f16, ours), detail),
    ]


def roofline(bench: Bench) -> Row:
    """Weights' bytes read in decode against what a probe reads from memory in the same time."""
    ids = bench.ids(bench.prompt)
    seconds, rate = bench.turns(lambda: decode_seconds(bench.fp32_step, ids, bench.tokens), read_bandwidth)
    size = weight_bytes(bench.fp32_step)
    shares = tuple(100 * size / second / bandwidth for second, bandwidth in zip(seconds, rate, strict=True))
    gigabytes = size / 1e9
    detail = (
        f"fp32: {gigabytes:.2f} GB of weights a token, {gigabytes / statistics.median(seconds):.1f} GB/s read in decode, "
        f"{statistics.median(rate) / 1e9:.1f} GB/s by the probe"
    )
    return Row("share of the memory bandwidth reached in decode", 70, shares, detail, unit=" %")


def speculative(bench: Bench) -> Row:
    """An INT8 draft of the float32 model, on the model's own text."""
    prompt = bench.ids(16)
    longest = len(prompt) + bench.tokens + 8
    speculator = Speculator(bench.fp32_step, DraftModel(bench.int8_step, longest), 4, longest)

    def guessed() -> float:
        return stopwatch(lambda: list(speculator.generate(prompt, bench.tokens, stop=())))

    def plain() -> float:
        engine = engine_of(bench.fp32_step, longest)
        return stopwatch(lambda: list(generate(engine, prompt, bench.tokens, stop=())))

    fast, slow = bench.turns(guessed, plain)
    found = speculator.acceptance
    detail = (
        f"int8 draft, 4 guesses: {100 * found.rate:.0f} % accepted, {found.made / found.forwards:.2f} tokens a forward, "
        f"{bench.tokens / statistics.median(fast):.1f} tokens/s against {bench.tokens / statistics.median(slow):.1f}"
    )
    return Row("speculative decoding against plain, the same text", None, ratios(slow, fast), detail)
