"""What the bench of the engine is made of: rows with a goal, pairs measured in turns, and the models they need, made once."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from exports.gguf_convert import convert
from exports.gguf_quantize import Options, quantize_file
from inference.bench import run_round
from inference.engine import Engine
from inference.load import LoadOptions, load
from inference.model import Model
from inference.native.build import library
from inference.native.step import engine_of
from quantize.errors import InputError


class LeftOut(Exception):
    """A row that cannot be measured here, and why."""


@dataclass(frozen=True)
class Row:
    """One figure against its goal.

    Attributes:
        title: what is measured.
        goal: that is to be reached; None for a figure without one.
        values: of each round; the figure is their median.
        detail: what was run, and the absolute figures behind the ratio.
        at_least: whether more is better.
        unit: behind the figure: ``x`` or `` %``.
    """

    title: str
    goal: float | None
    values: tuple[float, ...]
    detail: str
    at_least: bool = True
    unit: str = "x"

    @property
    def value(self) -> float:
        """The figure."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the figure is at its goal; None without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def entry(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "value": self.value, "reached": self.reached}


@dataclass
class Bench:
    """The settings of a run, and the models its rows share.

    Attributes:
        model: directory of the unquantized model.
        work: directory for files made on the way.
        rounds: of each pair.
        prompt, tokens: lengths of a prompt and of a text.
        requests: of the trace that is batched.
        batch: sequences at a time in it.
        windows: of text that perplexity is measured on.
    """

    model: Path
    work: Path
    rounds: int = 5
    prompt: int = 256
    tokens: int = 128
    requests: int = 64
    batch: int = 16
    windows: int = 16

    @cached_property
    def fp32(self) -> Model:
        """Float32 in the fastest layout."""
        return load(self.model, LoadOptions())

    @cached_property
    def int8(self) -> Model:
        """INT8 weights and dynamic INT8 activations, output embedding too, rounded to nearest on load."""
        return load(self.model, LoadOptions(weights="int8", head="int8"))

    @cached_property
    def f16_file(self) -> Path:
        """GGUF in F16."""
        return self._made("f16.gguf", lambda path: convert(self.model, path, "F16"))

    @cached_property
    def q4_file(self) -> Path:
        """GGUF in Q4_0, llama-quantize's bytes."""
        return self._made("q4_0.gguf", lambda path: quantize_file(self.f16_file, path, Options("Q4_0")))

    @cached_property
    def int4(self) -> Model:
        """That file, four bits wide, output embedding in int8."""
        return load(self.q4_file, LoadOptions(weights="int4", head="int8"))

    @cached_property
    def has_compiler(self) -> bool:
        """Whether the native step can be built here."""
        try:
            library()
        except InputError:
            return False
        return True

    @cached_property
    def fp32_step(self) -> Model:
        """Float32 for decode: native where that can be built."""
        return load(self.model, LoadOptions(native=True)) if self.has_compiler else self.fp32

    @cached_property
    def int8_step(self) -> Model:
        """:attr:`int8` for decode."""
        return load(self.model, LoadOptions(weights="int8", head="int8", native=True)) if self.has_compiler else self.int8

    @cached_property
    def int4_step(self) -> Model:
        """:attr:`int4` for decode."""
        return load(self.q4_file, LoadOptions(weights="int4", head="int8", native=True)) if self.has_compiler else self.int4

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.work / name
        if not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    def ids(self, count: int, seed: int = 0) -> list[int]:
        """Pseudo-random tokens: their time does not depend on what they say."""
        rng = random.Random(seed)
        return [rng.randrange(1000, self.fp32.config.vocab_size) for _ in range(count)]

    def turns(self, *measures: Callable[[], float], rounds: int | None = None) -> list[list[float]]:
        """Every measure once a round, ``[measure][round]``, in alternating order: a machine that slows down slows them all."""
        found: list[list[float]] = [[] for _ in measures]
        for turn in range(rounds or self.rounds):
            order = list(range(len(measures)))
            for index in order if turn % 2 == 0 else reversed(order):
                found[index].append(measures[index]())
        return found


def ratios(above: list[float], below: list[float]) -> tuple[float, ...]:
    """Of neighbours in time."""
    return tuple(one / other for one, other in zip(above, below, strict=True))


def decode_seconds(model: Model, prompt: list[int], tokens: int, cache_dtype: torch.dtype | None = None) -> float:
    """Seconds a token of greedy decode after ``prompt``, the mean of ``tokens``; the cache in the model's type by default."""
    return engine_seconds(engine_of(model, len(prompt) + tokens, cache_dtype), prompt, tokens)


def engine_seconds(engine: Engine, prompt: list[int], tokens: int) -> float:
    """:func:`decode_seconds` of an engine made already, and with it of what it has compiled."""
    return run_round(engine, prompt, tokens).tpot


def stopwatch(work: Callable[[], object]) -> float:
    """Seconds it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """Bytes a second that this machine reads from memory with torch's threads: the best of sums and matrix-vector products."""
    numbers = torch.ones(64 * 2**20)  # 256 MiB, more than any cache
    vector = torch.ones(4096)
    kernels: list[Callable[[], object]] = [numbers.sum, lambda: torch.mv(numbers.view(-1, 4096), vector)]
    best = min(stopwatch(kernel) for _ in range(5) for kernel in kernels)
    return 4 * numbers.numel() / best


def weight_bytes(model: Model) -> int:
    """Bytes that decode reads for each token: all weights but the input embedding, of which it reads one row."""
    return model.nbytes() - model.embedding.numel() * model.embedding.element_size()
