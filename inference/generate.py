"""Generation: logits to tokens, one after the other, until a stop token or a limit.

python -m inference.generate ARTIFACT "Once upon a time" --tokens 64 [--temperature 0.8 --top-p 0.95 --seed 1 --stop END]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from inference.engine import Engine
from inference.load import WEIGHTS, LoadOptions, load
from inference.native.step import NativeEngine
from inference.sampling import Sampler, Sampling
from inference.text import TextStream
from quantize.errors import InputError


def generate(
    engine: Engine,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow ``prompt``; a stop token is yielded, and is the last.

    Args:
        engine: its sequence is replaced.
        prompt: token ids, at least one.
        max_new_tokens: the most to yield.
        sampling: greedy by default.
        stop: ids to stop at; those of the model's config by default, ``()`` for none.

    Raises:
        InputError: prompt and new tokens do not fit into the engine's cache.
    """
    sampling = sampling or Sampling()
    stop = engine.model.config.stop_tokens if stop is None else stop
    # The last token is not fed back, so it needs no room.
    if len(prompt) + max_new_tokens - 1 > engine.max_tokens:
        raise InputError(
            f"max_new_tokens={max_new_tokens} after a prompt of {len(prompt)} does not fit into max_tokens="
            f"{engine.max_tokens}; use at most {max(0, engine.max_tokens - len(prompt) + 1)}"
        )
    if max_new_tokens < 1:
        return
    sampler = Sampler(sampling, prompt)
    token = sampler.choose(engine.prefill(prompt))
    yield token
    for _ in range(max_new_tokens - 1):
        if token in stop:
            return
        token = sampler.choose(engine.decode(token))
        yield token


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the text that follows a prompt as it comes."""
    options = _parser().parse_args(arguments)
    try:
        sampling = Sampling(
            options.temperature, options.top_k, options.seed, options.top_p, options.min_p, options.repetition_penalty
        )
        model = load(options.artifact, LoadOptions(weights=options.weights, native=options.native))
        file = options.artifact / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{options.artifact} has no tokenizer.json; the engine needs one to read a prompt")
        tokenizer = Tokenizer.from_file(str(file))
        prompt = tokenizer.encode(options.prompt).ids
        longest = min(model.config.max_tokens, max(1, len(prompt) + options.tokens))
        engine = NativeEngine(model, longest) if options.native else Engine(model, longest, compiled=options.compile)
        if engine.compiled is not None:
            print(f"compiled in {engine.compiled.prepare(longest):.1f} s", file=sys.stderr)
        stream = TextStream(tokenizer, options.stop)
        for token in generate(engine, prompt, options.tokens, sampling):
            print(stream.add(token), end="", flush=True)
            if stream.stopped:
                break
        print(stream.finish())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inference.generate", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64, help="the most to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--weights", choices=WEIGHTS, default="artifact", help="see inference.load.LoadOptions")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--native", action="store_true", help="decode by one C++ function, compiled on first use")
    steps.add_argument("--compile", action="store_true", help="compile the decode step first, see inference.compile")
    return parser


if __name__ == "__main__":
    sys.exit(main())
