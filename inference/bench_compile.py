"""Rows of the bench about torch.compile: the decode step compiled and as it is, in one engine's place after the other."""

from __future__ import annotations

import statistics
import time

from torch.profiler import ProfilerActivity, profile

from inference.bench_cases import Bench, LeftOut, Row, engine_seconds, ratios
from inference.engine import Engine
from inference.sampling import likeliest
from quantize.errors import InputError

# What multiplies by weights, as the profiler names it: bound by reading them, and the same compiled or not.
PRODUCTS = frozenset(
    (
        "aten::_int_mm",
        "aten::_weight_int4pack_mm_for_cpu",
        "aten::addmm",
        "aten::mm",
        "mkldnn::_linear_pointwise",
        "quantized::linear_dynamic",
        "quantized::linear_dynamic_fp16",
    )
)


def share_of_products(engine: Engine, prompt: list[int], tokens: int) -> float:
    """The part of decode that is spent in products with weights, by torch's profiler: 0 to 1."""
    token = likeliest(engine.prefill(prompt))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(tokens):
            token = likeliest(engine.decode(token))
        whole = time.perf_counter() - started
    microseconds = sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key in PRODUCTS)
    return float(microseconds) / 1e6 / whole


def compiled_against_eager(bench: Bench) -> list[Row]:
    """Decode with and without torch.compile, in INT8 and in float32; what compiling takes is told apart."""
    ids, longest = bench.ids(bench.prompt), bench.prompt + bench.tokens
    rows = []
    for name, model in (("int8", bench.int8), ("fp32", bench.fp32)):
        plain = Engine(model, longest)
        try:
            fast = Engine(model, longest, compiled=True)
        except InputError as error:
            raise LeftOut(f"torch.compile: {error}") from error
        assert fast.compiled is not None
        waited = fast.compiled.prepare(longest)
        ours, other = bench.turns(
            *(lambda engine=engine: engine_seconds(engine, ids, bench.tokens) for engine in (fast, plain))
        )
        share = 100 * share_of_products(fast, ids, min(16, bench.tokens))
        detail = (
            f"{name}: {1 / statistics.median(ours):.1f} tokens/s compiled, {1 / statistics.median(other):.1f} not; "
            f"compiling took {waited:.0f} s for {len(fast.compiled.seconds)} bucket(s), not counted; "
            f"products with weights are {share:.0f} % of the compiled step"
        )
        rows.append(Row(f"torch.compile decode, {name}", 1.3, ratios(other, ours), detail))
    return rows
