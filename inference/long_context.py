"""Perplexity against position, within the trained context and beyond it, for each way of going beyond.

python -m inference.long_context MODEL --text FILE --lengths 4096 8192 12288 --scaling none yarn window+sinks --png FILE

A model reads the text once for each scaling. Every token is scored given all tokens before it that the cache keeps, and the
figure for a length is the perplexity of the tokens between the length before it and this one. All scalings are scored on the
same tokens, so differences along a row are the scalings' own; differences down a column are the text's too.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from inference.config import read_config
from inference.context import Cache
from inference.kv_cache import KVCache
from inference.load import LoadOptions, load
from inference.model import Model
from inference.score import losses
from inference.window import RollingCache
from quantize.errors import InputError
from quantize.files import atomic_path, write_json, write_text

ROPES = ("linear", "dynamic", "yarn")
WINDOWS = ("window", "window+sinks")
SCALINGS = ("none", *ROPES, *WINDOWS)


@dataclass(frozen=True)
class Protocol:
    """What is read, and how.

    Attributes:
        model, text: where they are.
        trained: tokens of the model's own context, from its config.
        factor: of linear, dynamic and YaRN.
        window: tokens that rolling caches hold, sinks counted.
        sinks: of ``window+sinks``.
        chunk: tokens of a forward.
    """

    model: str
    text: str
    trained: int
    factor: float
    window: int
    sinks: int
    chunk: int


@dataclass(frozen=True)
class Curve:
    """One scaling's perplexities: ``perplexities[i]`` is of the tokens up to ``lengths[i]`` that no shorter length has."""

    scaling: str
    lengths: tuple[int, ...]
    perplexities: tuple[float, ...]
    cache_bytes: int


def prepared(scaling: str, protocol: Protocol, longest: int) -> tuple[Model, Cache]:
    """The model under a scaling, and an empty cache for ``longest`` tokens.

    Raises:
        InputError: no such scaling, or no such model.
    """
    if scaling not in SCALINGS:
        raise InputError(f"scaling={scaling!r} is not known; use {', '.join(SCALINGS)}")
    rope = {"rope_type": scaling, "factor": protocol.factor} if scaling in ROPES else None
    model = load(Path(protocol.model), LoadOptions(rope=rope, max_tokens=longest))
    if scaling not in WINDOWS:
        return model, KVCache(model.config, longest)
    sinks = protocol.sinks if scaling == "window+sinks" else 0
    return model, RollingCache(model.config, model.rope, protocol.window - sinks, sinks, longest)


def between(scores: Tensor, lengths: Sequence[int]) -> tuple[float, ...]:
    """``exp`` of the mean of ``scores`` between neighbouring lengths; ``scores[i]`` is of token ``i + 1``."""
    edges = [1, *lengths]
    return tuple(math.exp(float(scores[start - 1 : end - 1].double().mean())) for start, end in pairwise(edges))


def curve(scaling: str, protocol: Protocol, tokens: Sequence[int], lengths: Sequence[int]) -> Curve:
    """Read ``tokens``, as many as the last of the ascending ``lengths``, under a scaling."""
    model, cache = prepared(scaling, protocol, lengths[-1])
    scores = losses(model, tokens, cache, protocol.chunk)
    return Curve(scaling, tuple(lengths), between(scores, lengths), cache.nbytes())


def markdown(curves: Sequence[Curve], trained: int) -> str:
    """A table: a row a length, a column a scaling; lengths beyond the trained context are marked."""
    head = ["tokens", *(found.scaling for found in curves)]
    rows = [head, ["---"] * len(head)]
    starts = [1, *curves[0].lengths]
    for index, (start, end) in enumerate(pairwise(starts)):
        mark = " (beyond)" if end > trained else ""
        rows.append([f"{start}-{end}{mark}", *(f"{found.perplexities[index]:.2f}" for found in curves)])
    rows.append(["cache MiB", *(f"{found.cache_bytes / 2**20:.0f}" for found in curves)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(curves: Sequence[Curve], trained: int, target: Path) -> None:
    """Perplexity against the end of each stretch, and its ratio to the first curve's, which the text's difficulty is not in.

    Both are logarithmic; a dotted line marks the trained context.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    both = figure.subplots(2, sharex=True)
    for found in curves:
        quotients = [one / other for one, other in zip(found.perplexities, curves[0].perplexities, strict=True)]
        for axes, values in zip(both, (found.perplexities, quotients), strict=True):
            axes.plot(found.lengths, values, marker="o", label=found.scaling)
    for axes in both:
        axes.axvline(trained, color="black", linewidth=1, linestyle=":")
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")
    place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "bottom"}
    both[1].annotate("trained context", (trained, 0.6), **place)
    both[0].set_ylabel("perplexity of the stretch that ends here")
    both[0].legend()
    both[1].set(xlabel="tokens read", ylabel=f"the same, over that of {curves[0].scaling}")
    with atomic_path(target) as file:
        figure.savefig(file, format="png", dpi=100)


def text_ids(model: Path, text: Path, count: int) -> list[int]:
    """The first ``count`` tokens of a text.

    Raises:
        InputError: the model has no tokenizer.json, or the text is missing or shorter.
    """
    for file in (model / "tokenizer.json", text):
        if not file.is_file():
            raise InputError(f"{file} is missing; it is needed to read a text")
    ids: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text(), add_special_tokens=False).ids
    if len(ids) < count:
        raise InputError(f"{text} has {len(ids)} tokens, fewer than --lengths {count}; use a longer text or shorter lengths")
    return ids[:count]


def checked(options: argparse.Namespace) -> tuple[Protocol, list[int]]:
    """The protocol that a command line asks for, and its lengths in order.

    Raises:
        InputError: a length, window, chunk or factor that measures nothing.
    """
    lengths = sorted(set(options.lengths))
    if lengths[0] < 2:
        raise InputError(f"--lengths {lengths[0]} scores no token; use 2 or more")
    if options.chunk < 1:
        raise InputError(f"--chunk {options.chunk} makes no progress; use 1 or more, such as 256")
    if not 0 <= options.sinks < options.window:
        room = options.window - 1
        raise InputError(f"--sinks {options.sinks} leaves no window of --window {options.window}; use 0 to {room}")
    trained = read_config(options.model).max_tokens
    factor = max(1.0, lengths[-1] / trained) if options.factor is None else options.factor
    if factor < 1:
        raise InputError(f"--factor {factor} is below 1, which shortens the context; use 1 or more")
    places = str(options.model), str(options.text)
    return Protocol(*places, trained, factor, options.window, options.sinks, options.chunk), lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inference.long_context", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of an artifact with a tokenizer.json")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="where stretches end, in tokens")
    parser.add_argument("--scaling", nargs="+", choices=SCALINGS, default=list(SCALINGS))
    parser.add_argument("--factor", type=float, help="of linear, dynamic and yarn; the longest length over the trained context")
    parser.add_argument("--window", type=int, default=1024, help="tokens a rolling cache holds, sinks counted")
    parser.add_argument("--sinks", type=int, default=4, help="of window+sinks")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a forward")
    parser.add_argument("--png", type=Path, help="plot to this file")
    parser.add_argument("--json", type=Path, help="write protocol and figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    try:
        protocol, lengths = checked(options)
        tokens = text_ids(options.model, options.text, lengths[-1])
        curves = []
        for scaling in dict.fromkeys(options.scaling):
            curves.append(curve(scaling, protocol, tokens, lengths))
            print(f"{scaling}: {', '.join(f'{value:.2f}' for value in curves[-1].perplexities)}", file=sys.stderr, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(protocol)))
    table = markdown(curves, protocol.trained)
    print(table)
    if options.markdown:
        write_text(options.markdown, table + "\n")
    if options.json:
        write_json(options.json, _entries(arguments, protocol, curves))
    if options.png:
        plot(curves, protocol.trained, options.png)
    return 0


def _entries(arguments: Sequence[str], protocol: Protocol, curves: Sequence[Curve]) -> dict[str, Any]:
    command = shlex.join(["python", "-m", "inference.long_context", *arguments])
    settings = {**asdict(protocol), "torch": torch.__version__}
    return {"command": command, "protocol": settings, "curves": [asdict(found) for found in curves]}


if __name__ == "__main__":
    sys.exit(main())
