"""Generation: logits to tokens, one after the other, until a stop token or a limit.

python -m inference.generate ARTIFACT "Once upon a time" --tokens 64 [--temperature 0.8 --top-k 40 --seed 1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inference.engine import Engine
from inference.load import LoadOptions, load
from quantize.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: tokens the choice is among, the likeliest ones; 0 for all.
        seed: of the random numbers; the same seed gives the same text on one machine.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} is no temperature; use 0 (greedy) or above, such as 0.8")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} is no number of tokens; use 0 (all) or above, such as 40")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token for ``logits``, float32 ``[vocab_size]``; ties of the greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # On the CPU, so that one seed gives one text on every device whose logits agree.
    scaled = logits.cpu().double() / sampling.temperature
    if sampling.top_k:
        kept = scaled.topk(min(sampling.top_k, len(scaled)))
        drawn = torch.multinomial(torch.softmax(kept.values, -1), 1, generator=generator)
        return int(kept.indices[drawn])
    return int(torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator))


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
    generator = torch.Generator().manual_seed(sampling.seed)
    token = choose(engine.prefill(prompt), sampling, generator)
    yield token
    for _ in range(max_new_tokens - 1):
        if token in stop:
            return
        token = choose(engine.decode(token), sampling, generator)
        yield token


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the text that follows a prompt as it comes."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(prog="python -m inference.generate", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64, help="the most to generate")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        sampling = Sampling(options.temperature, options.top_k, options.seed)
        model = load(options.artifact, LoadOptions())
        file = options.artifact / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{options.artifact} has no tokenizer.json; the engine needs one to read a prompt")
        tokenizer = Tokenizer.from_file(str(file))
        prompt = tokenizer.encode(options.prompt).ids
        engine = Engine(model, min(model.config.max_tokens, max(1, len(prompt) + options.tokens)))
        made: list[int] = []
        shown = 0
        for token in generate(engine, prompt, options.tokens, sampling):
            made.append(token)
            text = tokenizer.decode(made)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
