"""Perplexity here beside the loop anybody would write over transformers, on one model, text and machine.

    python -m eval.bench_scoring MODEL --text FILE --windows 16 --seq-len 1024

The plain loop is ``model(input_ids=ids, labels=ids).loss``, window by window, in float32. Both read the same windows with the
same model object, one after the other in rounds, each round's order turned round; medians over rounds are printed, and the
largest growth of the process's memory. Figures that differ by more than 0.01 % are an error: then something else was measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.consumers import transformers_model
from eval.protocols import Window, plan
from eval.scoring import likelihood
from quantize.checks import check_eval
from quantize.config import EvalConfig
from quantize.errors import InputError
from quantize.files import write_json
from quantize.logs import quiet_libraries, setup_logging
from quantize.manifest import cpu_name, peak_rss_bytes, release_memory, reset_peak_rss

_AGREE = 1e-4


def plain_loop(model: Any, windows: list[Window]) -> float:
    """Mean loss of windows of equal length by transformers' own, in nats."""
    total = 0.0
    with torch.no_grad():
        for window in windows:
            ids = window.ids[None]
            total += float(model(input_ids=ids, labels=ids).loss)
    return total / len(windows)


def measure(model: Path, config: EvalConfig, rounds: int) -> dict[str, Any]:
    """Seconds and memory of both, and the perplexity they agree on.

    Raises:
        InputError: the model or the text cannot be read.
        RuntimeError: the two figures differ.
    """
    check_eval(config)
    loaded = transformers_model.for_evaluation(transformers_model.load(model, "cpu"))
    assert isinstance(loaded, transformers_model.TransformersArtifact)
    windows = plan(config, loaded.tokenizer).windows
    tokens = sum(len(window.ids) - window.first for window in windows)
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: plain_loop(loaded.model, windows),
        "here": lambda: likelihood(loaded, windows) / tokens,
    }
    for side in sides.values():  # the first forward of a process is no one's figure
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    growth: dict[str, int] = dict.fromkeys(sides, 0)
    means: dict[str, float] = {}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            release_memory()
            reset_peak_rss()
            before, started = peak_rss_bytes(), time.perf_counter()
            means[name] = sides[name]()
            seconds[name].append(time.perf_counter() - started)
            growth[name] = max(growth[name], peak_rss_bytes() - before)
    if abs(means["here"] / means["plain"] - 1) > _AGREE:
        raise RuntimeError(f"the two perplexities differ: {means}")
    ratios = [plain / here for plain, here in zip(seconds["plain"], seconds["here"], strict=True)]
    return {
        "ppl": math.exp(means["here"]),
        "tokens": tokens,
        "windows": len(windows),
        "seconds_plain": round(statistics.median(seconds["plain"]), 3),
        "seconds_here": round(statistics.median(seconds["here"]), 3),
        "speedup": round(statistics.median(ratios), 3),
        "memory_growth_plain": growth["plain"],
        "memory_growth_here": growth["here"],
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench_scoring", description="Perplexity here beside a plain loop.")
    parser.add_argument("model", type=Path, help="unquantized model directory")
    parser.add_argument("--text", default="builtin", help="text file, or builtin")
    parser.add_argument("--windows", type=int, default=16, help="number of windows")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are timed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    setup_logging("warning")
    quiet_libraries()
    try:
        if options.rounds < 1:
            raise InputError(f"--rounds={options.rounds} measures nothing; use 3")
        found = measure(options.model, EvalConfig(options.text, options.windows, options.seq_len), options.rounds)
        if options.json:
            write_json(options.json, found)
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
