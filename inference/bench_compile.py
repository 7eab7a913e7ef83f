"""Rows of the bench about torch.compile: the decode step compiled and as it is, in one engine's place after the other."""

from __future__ import annotations

import statistics
import time

from inference.bench_cases import Bench, LeftOut, Row, ratios
from inference.engine import Engine
from quantize.errors import InputError


def seconds(engine: Engine, prompt: list[int], tokens: int) -> float:
    """Seconds a token of greedy decode after ``prompt``, the mean of ``tokens``; what was compiled already stays so."""
    token = int(engine.prefill(prompt).argmax())
    started = time.perf_counter()
    for _ in range(tokens):
        token = int(engine.decode(token).argmax())
    return (time.perf_counter() - started) / tokens


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
        ours, other = bench.turns(*(lambda engine=engine: seconds(engine, ids, bench.tokens) for engine in (fast, plain)))
        detail = (
            f"{name}: {1 / statistics.median(ours):.1f} tokens/s compiled, {1 / statistics.median(other):.1f} not; "
            f"compiling took {waited:.0f} s for {len(fast.compiled.seconds)} bucket(s), not counted"
        )
        rows.append(Row(f"torch.compile decode, {name}", 1.3, ratios(other, ours), detail))
    return rows
