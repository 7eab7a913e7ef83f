"""One artifact in its consumer, in a process of its own, generating when asked to: the measuring half of ``eval.latency``.

Standard output says once, in a line of JSON, what was loaded, then ``ttft`` and ``decode`` (seconds to the first token; tokens
a second behind it) for every line read from standard input. The process ends with its input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.consumers import CONSUMERS
from eval.consumers.transformers_model import TransformersArtifact
from eval.perplexity import container_of
from quantize.errors import InputError
from quantize.logs import quiet_libraries, setup_logging, stdout_to_stderr


class _Clock:
    """What ``generate`` calls for every token; the first call is with the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(artifact: Path, device: str, prompt: int, tokens: int) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Load an artifact as it is stored; what it is, and a function that generates once and gives its times.

    Args:
        artifact: its directory.
        device: torch's name of it.
        prompt: tokens in front of the first one generated.
        tokens: tokens generated, greedily; none ends it early.

    Raises:
        InputError: the consumer refuses the artifact, or its context is too short.
    """
    from transformers import GenerationConfig

    entry = CONSUMERS[container_of(artifact)]
    loaded = entry.load(artifact, device)
    assert isinstance(loaded, TransformersArtifact)
    if prompt + tokens > loaded.max_tokens:
        raise InputError(f"{artifact} has a context of {loaded.max_tokens} tokens; use --prompt and --tokens of less together")
    ids = torch.arange(prompt).remainder(len(loaded.tokenizer)).unsqueeze(0).to(loaded.model.device)
    greedy = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, use_cache=True)

    @torch.inference_mode()
    def generate() -> dict[str, float]:
        clock = _Clock()
        started = time.perf_counter()
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return {"ttft": first - started, "decode": (tokens - 1) / (last - first)}

    described = {
        "consumer": loaded.consumer,
        "compute_dtype": loaded.compute_dtype,
        "device": str(loaded.model.device),
        "threads": torch.get_num_threads(),
    }
    return described, generate


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.latency_worker")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    options = parser.parse_args(arguments)
    setup_logging("info")
    quiet_libraries()
    # GPTQModel greets on standard output, which is for the figures alone.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, stdout_to_stderr(shown=False):
        try:
            described, generate = load(options.artifact, options.device, options.prompt, options.tokens)
        except InputError as error:
            logging.getLogger("eval").error("%s", error)
            return 2
        print(json.dumps(described), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(generate()), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
