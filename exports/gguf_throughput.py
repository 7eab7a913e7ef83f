"""How fast tensors were quantized, as a share of the speed at which the machine copies memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from exports.gguf_layout import Bytes


@dataclass(frozen=True)
class TensorReport:
    """What became of a tensor.

    Attributes:
        name, source, target: its name, and its types before and after.
        weights: how many it has.
        moved: bytes read plus bytes written.
        seconds: thread time spent on it, divided by the number of threads.
    """

    name: str
    source: str
    target: str
    weights: int
    moved: int
    seconds: float


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy_rate(threads: int) -> float:
    """Bytes a second, read plus written, at which ``threads`` threads copy memory: what rounding is held against."""
    size = 32 << 20
    pairs = [(np.zeros(size, np.uint8), np.ones(size, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[Bytes, Bytes]) -> None:
        np.copyto(*pair)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(copy, pairs))
            best = min(best, time.perf_counter() - started)
    return 2 * size * threads / best


def describe(reports: Sequence[TensorReport], rate: float) -> str:
    """A table: each tensor's time and throughput, as a share of ``rate`` bytes a second."""
    lines = [f"copying memory: {rate / 1e9:.1f} GB/s"]
    for one in reports:
        share = one.moved / one.seconds / rate if one.seconds else 0.0
        change = one.source if one.source == one.target else f"{one.source} -> {one.target}"
        speed = f"{one.moved / max(one.seconds, 1e-9) / 1e9:6.2f} GB/s {share:6.1%} of copying"
        lines.append(f"{one.name:40} {change:14} {one.weights:12d} weights {one.seconds * 1e3:9.2f} ms {speed}")
    return "\n".join(lines)
