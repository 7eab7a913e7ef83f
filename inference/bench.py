"""Speed of artifacts, side by side: ``python -m inference.bench A B --prompt 128 --tokens 64 --rounds 7``.

Every round runs every artifact once, in alternating order, so a machine that slows down slows all of them and a ratio compares
neighbours in time. An artifact is a directory, with options behind commas: ``DIR,dense=stored,head=int8`` (see
:class:`inference.load.LoadOptions`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from inference.config import gguf_file
from inference.engine import Engine
from inference.load import LoadOptions, load
from inference.native.step import engine_of
from inference.sampling import likeliest
from quantize.devices import resolve_device
from quantize.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Round:
    """One artifact's figures in one round.

    Attributes:
        ttft: seconds from the prompt to the first token.
        tpot: seconds a further token, the mean of the round.
        prefill_rate, decode_rate: tokens a second in either phase.
    """

    ttft: float
    tpot: float
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True)
class Summary:
    """Median, least and greatest of one figure over the rounds."""

    median: float
    least: float
    greatest: float


def summarize(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))


def parse_artifact(text: str, dtype: torch.dtype, device: torch.device) -> tuple[Path, LoadOptions]:
    """``DIR[,dense=..][,weights=..][,head=..][,native=..]``.

    Raises:
        InputError: no such directory, or an option that is none.
    """
    directory, *settings = text.split(",")
    options: dict[str, Any] = dict(setting.partition("=")[::2] for setting in settings)
    unknown = sorted(options.keys() - {"dense", "weights", "head", "native"})
    if unknown:
        raise InputError(f"{text}: {unknown[0]!r} is no option; use dense=, weights=, head= or native=")
    if options.setdefault("native", "false") not in ("true", "false"):
        raise InputError(f"{text}: native={options['native']!r} is not an option; use true or false")
    options["native"] = options["native"] == "true"
    if not Path(directory).is_dir() and gguf_file(Path(directory)) is None:
        raise InputError(f"{directory} is no directory; name an artifact's, such as artifacts/gptq/w4")
    return Path(directory), LoadOptions(dtype=dtype, device=device, **options)


def run_round(engine: Engine, prompt: Sequence[int], tokens: int) -> Round:
    """Prefill ``prompt``, then decode ``tokens`` tokens greedily; stop tokens do not stop it."""
    started = time.perf_counter()
    # Reading the choice back is what waits for a device that computes behind Python's back.
    token = likeliest(engine.prefill(prompt))
    first = time.perf_counter()
    for _ in range(tokens):
        token = likeliest(engine.decode(token))
    ended = time.perf_counter()
    ttft, tpot = first - started, (ended - first) / tokens
    return Round(ttft, tpot, len(prompt) / ttft, 1 / tpot)


def run(engines: Sequence[Engine], prompt: int, tokens: int, rounds: int) -> list[list[Round]]:
    """All rounds of each engine, in the order of ``engines``; one round before them is not counted.

    Args:
        engines: with room for ``prompt + tokens`` tokens.
        prompt: length of the prompt; its ids are the same pseudo-random ones for every engine and round.
        tokens: to decode in each round.
        rounds: at least one.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(engine.model.config.vocab_size for engine in engines)
    ids = torch.randint(vocabulary, (prompt,), generator=generator).tolist()
    results: list[list[Round]] = [[] for _ in engines]
    for number in range(rounds + 1):
        order = range(len(engines)) if number % 2 else reversed(range(len(engines)))
        for index in order:
            measured = run_round(engines[index], ids, tokens)
            if number:
                results[index].append(measured)
    return results


def report(names: Sequence[str], engines: Sequence[Engine], results: Sequence[Sequence[Round]]) -> list[dict[str, object]]:
    """One entry an artifact: weight bytes, each figure's summary, and its ratios to the first artifact, round by round."""
    entries: list[dict[str, object]] = []
    for name, engine, rounds in zip(names, engines, results, strict=True):
        entry: dict[str, object] = {"artifact": name, "weight_bytes": engine.model.nbytes()}
        for figure in ("ttft", "tpot", "prefill_rate", "decode_rate"):
            entry[figure] = asdict(summarize([getattr(measured, figure) for measured in rounds]))
        for figure in ("prefill_rate", "decode_rate"):
            pairs = zip(rounds, results[0], strict=True)
            entry[f"{figure}_ratio"] = asdict(
                summarize([getattr(one, figure) / getattr(other, figure) for one, other in pairs])
            )
        entries.append(entry)
    return entries


def show(entries: Sequence[dict[str, object]]) -> None:
    """Print a report as a table."""
    names = ("artifact", "weights MiB", "prefill tok/s", "decode tok/s", "TTFT ms", "TPOT ms", "prefill ratio", "decode ratio")
    table = Table(*names)

    def cell(entry: dict[str, object], key: str, scale: float, digits: int) -> str:
        value = entry[key]
        assert isinstance(value, dict)
        median, least, greatest = (f"{value[part] * scale:.{digits}f}" for part in ("median", "least", "greatest"))
        return f"{median} ({least}-{greatest})"

    for entry in entries:
        size = entry["weight_bytes"]
        assert isinstance(size, int)
        table.add_row(
            str(entry["artifact"]),
            f"{size / 2**20:.0f}",
            cell(entry, "prefill_rate", 1, 0),
            cell(entry, "decode_rate", 1, 1),
            cell(entry, "ttft", 1e3, 1),
            cell(entry, "tpot", 1e3, 2),
            cell(entry, "prefill_rate_ratio", 1, 2),
            cell(entry, "decode_rate_ratio", 1, 2),
        )
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inference.bench", description=__doc__)
    parser.add_argument(
        "artifacts",
        nargs="+",
        help="DIR[,dense=auto|packed|plain|stored][,weights=artifact|int4|int8][,head=artifact|int8][,native=true]; "
        "ratios are to the first",
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens to prefill")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute type of all artifacts")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    try:
        for key in ("prompt", "tokens", "rounds"):
            if getattr(options, key) < 1:
                raise InputError(f"--{key}={getattr(options, key)} measures nothing; use 1 or more")
        device = resolve_device(options.device)
        artifacts = [parse_artifact(text, DTYPES[options.dtype], device) for text in options.artifacts]
        engines = [engine_of(load(path, loading), options.prompt + options.tokens) for path, loading in artifacts]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = run(engines, options.prompt, options.tokens, options.rounds)
    entries = report(options.artifacts, engines, results)
    protocol = {
        "prompt": options.prompt,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "dtype": options.dtype,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in protocol.items()) + "; median (least-greatest) over the rounds")
    show(entries)
    if options.json:
        options.json.write_text(json.dumps({"protocol": protocol, "artifacts": entries}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
