"""Reading what llama.cpp's programs print: perplexity, divergence from the unquantized model, speed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from quantize.errors import InputError

_LAST_LINES = 4
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|-?nan|-?inf)"


@dataclass(frozen=True)
class Perplexity:
    """What ``llama-perplexity`` says of a file.

    Attributes:
        ppl: perplexity per token.
        error: its standard error, of the text and not of the model.
        chunks: windows.
        tokens: tokens scored.
        seconds: wall time of the program.
    """

    ppl: float
    error: float
    chunks: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Divergence:
    """How far a file's predictions are from those of the model it was made from, token by token.

    Attributes:
        mean: Kullback-Leibler divergence of the base's distribution from this one's, in nats; so are ``median``, ``p99`` and
            ``maximum``.
        mean_error: standard error of ``mean``.
        median: half of the tokens lie below.
        p99: 99 % of the tokens lie below.
        maximum: of the worst token.
        same_top: share, 0 to 1, of tokens where both find the same token likeliest.
        ppl: this file's perplexity on the same tokens, as :class:`Perplexity` has it.
        ppl_error: its standard error.
        base_ppl: the base's.
        tokens: tokens compared.
        seconds: wall time of the program.
    """

    mean: float
    mean_error: float
    median: float
    p99: float
    maximum: float
    same_top: float
    ppl: float
    ppl_error: float
    base_ppl: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Tokens in a second, each with its standard deviation over repetitions: reading a prompt, and generating.

    Attributes:
        prompt: of ``prompt_tokens`` tokens in one batch.
        generation: one token at a time.
        threads: llama.cpp computed with.
    """

    prompt: float
    prompt_deviation: float
    generation: float
    generation_deviation: float
    threads: int


def parse_perplexity(output: str, seconds: float) -> Perplexity:
    """Read the output of ``llama-perplexity``.

    Raises:
        InputError: it has no final figure, or that is not finite.
    """
    final = re.search(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}\s*\n", output)
    windows = parse_windows(output)
    if final is None or windows is None:
        raise failed("llama-perplexity", "gave no perplexity", output)
    ppl, error = float(final[1]), float(final[2])
    if not math.isfinite(ppl):
        raise failed("llama-perplexity", f"found a perplexity of {ppl}", output)
    return Perplexity(ppl, error, windows[0], scored_tokens(*windows), seconds)


def scored_tokens(chunks: int, context: int) -> int:
    """Tokens that ``llama-perplexity`` scores: those behind the middle of each window."""
    return chunks * (context - context // 2 - 1)


def parse_windows(output: str) -> tuple[int, int] | None:
    """How many windows ``llama-perplexity`` or ``llama-imatrix`` took, and of how many tokens; None where it does not say."""
    found = re.search(r"(?:calculating perplexity|computing) over (\d+) chunks, n_ctx=(\d+)", output)
    return (int(found[1]), int(found[2])) if found else None


def parse_divergence(output: str, seconds: float) -> Divergence:
    """Read the output of ``llama-perplexity --kl-divergence``.

    Raises:
        InputError: it lacks a figure.
    """

    def figures(label: str) -> tuple[float, float]:
        found = re.search(rf"^\s*{label}\s*:\s*{_NUMBER}(?:\s*±\s*{_NUMBER})?\s*%?\s*\n", output, re.MULTILINE)
        if found is None:
            raise failed("llama-perplexity --kl-divergence", f"gave no line {label!r}", output)
        return float(found[1]), float(found[2] or "nan")

    windows = parse_windows(output)
    if windows is None:
        raise failed("llama-perplexity --kl-divergence", "gave no windows", output)
    mean, mean_error = figures(r"Mean\s+KLD")
    ppl, ppl_error = figures(r"Mean PPL\(Q\)")
    return Divergence(
        mean=mean,
        mean_error=mean_error,
        median=figures(r"Median\s+KLD")[0],
        p99=figures(r"99\.0%\s+KLD")[0],
        maximum=figures(r"Maximum KLD")[0],
        same_top=figures(r"Same top p")[0] / 100,
        ppl=ppl,
        ppl_error=ppl_error,
        base_ppl=figures(r"Mean PPL\(base\)")[0],
        tokens=scored_tokens(*windows),
        seconds=seconds,
    )


def parse_bench(output: str) -> Speed:
    """Read the JSON of ``llama-bench``.

    Raises:
        InputError: it is no JSON, or lacks one of the two measurements.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(output)
        prompt = next(row for row in rows if row["n_prompt"] and not row["n_gen"])
        generation = next(row for row in rows if row["n_gen"] and not row["n_prompt"])
        return Speed(
            prompt=float(prompt["avg_ts"]),
            prompt_deviation=float(prompt["stddev_ts"]),
            generation=float(generation["avg_ts"]),
            generation_deviation=float(generation["stddev_ts"]),
            threads=int(generation["n_threads"]),
        )
    except (json.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
        raise failed("llama-bench", "gave no measurements", output) from error


def failed(name: str, outcome: str, output: str) -> InputError:
    """The error of a tool that gave no answer, with its last lines."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    last = " | ".join([line for line in lines if line][-_LAST_LINES:])
    return InputError(f"{name} {outcome}; its last lines: {last or '(none)'}")
