"""Speed of an artifact in the program that runs it: tokens a second of greedy decoding, and the time to the first token.

    python -m eval.latency ARTIFACT --baseline FP16_ARTIFACT --record

Each artifact is loaded as it is stored, in a process of its own: llama.cpp for GGUF files where it is built, else transformers.
With a baseline, every round runs both, in alternating order, so a machine that slows down slows both; ``decode_ratio`` is the
median of the rounds' ratios. The artifacts are compared as their consumers run them: types of arithmetic may differ, and are
part of the result. ``--record`` writes it to ``evaluation.json`` as ``speed``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from eval.bench_process import PROJECT, table_console
from eval.consumers import CONSUMERS, llamacpp
from eval.consumers.gguf_model import gguf_file
from eval.llamacpp_tools import VERSION, find_tool
from eval.perplexity import container_of
from quantize.artifact import fingerprint, record_evaluation
from quantize.errors import InputError
from quantize.files import write_json
from quantize.manifest import cpu_name

CONSUMER_CHOICES = ("auto", "transformers", "llamacpp")


class Runner(Protocol):
    """An artifact that can be asked to generate."""

    described: dict[str, Any]
    """``consumer``, ``compute_dtype``, ``device``, ``threads``."""

    def round(self) -> dict[str, float]:
        """``ttft`` (seconds) and ``decode`` (tokens a second) of one generation."""


@dataclass
class _Transformers:
    """A worker process (:mod:`eval.latency_worker`), which sleeps while it is not asked."""

    process: subprocess.Popen[str]
    described: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.described = self._answer()

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told with the answer that does not come
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            if code == 2:
                raise InputError("the artifact cannot be run; the reason is above")
            raise RuntimeError(f"the process that runs the artifact ended with {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class _LlamaCpp:
    """llama-bench, started anew for every round: it answers once and ends."""

    file: Path
    prompt: int
    tokens: int
    described: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.described = {"consumer": f"llama.cpp (llama-cpp-python {VERSION})", "compute_dtype": "as llama.cpp chooses"}
        self.described |= {"device": "cpu", "threads": None}

    def round(self) -> dict[str, float]:
        speed = llamacpp.bench(self.file, prompt_tokens=self.prompt, generated_tokens=self.tokens, repetitions=1)
        self.described["threads"] = speed.threads
        return {"ttft": self.prompt / speed.prompt, "decode": speed.generation}


def measure(
    artifacts: Sequence[Path],
    *,
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 5,
    device: str = "cpu",
    consumer: str = "auto",
) -> list[dict[str, Any]]:
    """Measure artifacts side by side, each once in a round, after a round that does not count.

    Args:
        artifacts: their directories, the one in question first; a second is its baseline.
        prompt: tokens read at once before the first is generated.
        tokens: tokens generated.
        rounds: how often.
        device: torch's name of it; llama.cpp runs on the CPU.
        consumer: one of :data:`CONSUMER_CHOICES`.

    Returns:
        For each what :class:`Runner` says of it, and ``ttft`` and ``decode``, the rounds' figures.

    Raises:
        InputError: an artifact cannot be run so, or the numbers are impossible.
    """
    for name, value, least in (("--prompt", prompt, 1), ("--tokens", tokens, 2), ("--rounds", rounds, 1)):
        if value < least:
            raise InputError(f"{name} {value} is below {least}; use {least} or more")
    with contextlib.ExitStack() as stack:
        runners = [
            stack.enter_context(_runner(artifact, prompt=prompt, tokens=tokens, device=device, consumer=consumer))
            for artifact in artifacts
        ]
        found: list[list[dict[str, float]]] = [[] for _ in runners]
        for number in range(rounds + 1):
            order = range(len(runners)) if number % 2 else reversed(range(len(runners)))
            for place in order:
                figures = runners[place].round()
                if number:
                    found[place].append(figures)
    return [
        {**runner.described, **{key: [figures[key] for figures in series] for key in ("ttft", "decode")}}
        for runner, series in zip(runners, found, strict=True)
    ]


def speed_of(
    artifact: Path, baseline: Path | None = None, *, prompt: int = 128, tokens: int = 32, **options: Any
) -> dict[str, Any]:
    """The ``speed`` of ``evaluation.json``.

    Returns:
        ``decode_tokens_per_second`` and ``ttft_seconds`` (medians), ``decode_range`` (least and greatest), ``prompt``,
        ``tokens``, ``rounds``, ``consumer``, ``compute_dtype``, ``device``, ``threads``, ``cpu``, and ``baseline``: None, or
        the same medians of the baseline with its ``name``, ``artifact_fingerprint``, ``consumer`` and ``compute_dtype``, and
        ``decode_ratio`` and ``ttft_ratio``, medians of the rounds' ratios (the artifact's over the baseline's).

    Raises:
        InputError: as :func:`measure`.
    """
    artifacts = [artifact] if baseline is None else [artifact, baseline]
    measured = measure(artifacts, prompt=prompt, tokens=tokens, **options)
    ours = measured[0]
    result = {
        **_medians(ours),
        "decode_range": [min(ours["decode"]), max(ours["decode"])],
        "prompt": prompt,
        "tokens": tokens,
        "rounds": len(ours["decode"]),
        **{key: ours[key] for key in ("consumer", "compute_dtype", "device", "threads")},
        "cpu": cpu_name(),
        "baseline": None,
    }
    if baseline is not None:
        theirs = measured[1]
        result["baseline"] = {
            "name": baseline.resolve().name,
            "artifact_fingerprint": fingerprint(baseline),
            **_medians(theirs),
            **{key: theirs[key] for key in ("consumer", "compute_dtype")},
            **{f"{key}_ratio": _ratio(ours[key], theirs[key]) for key in ("decode", "ttft")},
        }
    return result


def _medians(measured: dict[str, Any]) -> dict[str, float]:
    return {
        "decode_tokens_per_second": statistics.median(measured["decode"]),
        "ttft_seconds": statistics.median(measured["ttft"]),
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def _runner(artifact: Path, *, prompt: int, tokens: int, device: str, consumer: str) -> Iterator[Runner]:
    container = container_of(artifact)
    if consumer == "llamacpp" and container != "gguf":
        raise InputError(f"{artifact} is no GGUF file, which is all that llama.cpp runs; use --consumer transformers")
    if consumer == "llamacpp" or (consumer == "auto" and container == "gguf" and find_tool("llama-bench") is not None):
        yield _LlamaCpp(gguf_file(artifact), prompt, tokens)
        return
    command = [sys.executable, "-m", "eval.latency_worker", str(artifact), "--device", device]
    command += ["--prompt", str(prompt), "--tokens", str(tokens)]
    environment = {**os.environ, **CONSUMERS[container].environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield _Transformers(process)
        finally:
            process.kill()  # it holds nothing that needs an orderly end


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    measured = {key: getattr(options, key) for key in ("prompt", "tokens", "rounds", "device", "consumer")}
    try:
        speed = speed_of(options.artifact, options.baseline, **measured)
        if options.json:
            write_json(options.json, speed)
        if options.record:
            record_evaluation(options.artifact, {"speed": speed})
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    table_console().print(_table(options.artifact.resolve().name, speed))
    return 0


def _table(name: str, speed: dict[str, Any]) -> Table:
    table = Table("artifact", "decode (tokens/s)", "first token (ms)", "ratio", "type", "consumer")
    against = speed["baseline"]
    rows = [(name, speed, f"{against['decode_ratio']:.3f}x" if against else "-")]
    rows += [(against["name"], against, "1")] if against else []
    for label, figures, ratio in rows:
        decode, first = figures["decode_tokens_per_second"], 1000 * figures["ttft_seconds"]
        table.add_row(label, f"{decode:.2f}", f"{first:.1f}", ratio, figures["compute_dtype"], figures["consumer"])
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.latency", description="Decode speed of an artifact in its consumer.")
    parser.add_argument("artifact", type=Path, help="artifact directory")
    parser.add_argument("--baseline", type=Path, help="artifact directory to run in turn with it")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read before the first is generated")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=5, help="how often; medians are given")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (transformers)")
    parser.add_argument("--consumer", choices=CONSUMER_CHOICES, default="auto", help="default: llama.cpp for GGUF, if built")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--record", action="store_true", help="write the result to the artifact's evaluation.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
