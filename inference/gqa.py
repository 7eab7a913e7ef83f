"""From many key/value heads to few: ``python -m inference.gqa CHECKPOINT OUT --kv-heads 1 --text FILE``.

Ainslie et al. 2023 (arXiv:2305.13245), section 2.1: each new key head, and value head, is the mean of the heads of its group.
The cache shrinks by the same factor. The paper goes on training; without that the model is worse, by how much is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from exports.base import Artifact
from exports.containers import CONTAINERS
from inference.config import ModelConfig, read_config
from inference.kv_cache import KVCache
from inference.load import load
from inference.score import perplexity
from quantize.atomic import atomic_directory
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError


def pooled(tensor: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rows of ``heads`` new heads, each the mean of as many old ones: ``[old * head_dim, ...]`` to ``[heads * head_dim, ...]``.

    The mean is taken in float32 and rounded to the tensor's type.
    """
    grouped = tensor.float().view(heads, -1, head_dim, *tensor.shape[1:])
    return grouped.mean(1).flatten(0, 1).to(tensor.dtype)


def convert(source: Path, target: Path, kv_heads: int) -> None:
    """Write the checkpoint ``source`` with ``kv_heads`` key/value heads to ``target``.

    Raises:
        InputError: no such checkpoint or one the engine does not run, a quantized one, a number of heads that does not divide
            its own, or a target that exists.
    """
    config = read_config(source)
    if kv_heads < 1 or config.num_kv_heads % kv_heads:
        fits = ", ".join(str(count) for count in range(1, config.num_kv_heads) if config.num_kv_heads % count == 0)
        raise InputError(
            f"kv_heads={kv_heads} does not divide the {config.num_kv_heads} of {source}; use {fits or 'another model'}"
        )
    if target.exists():
        raise InputError(f"{target} exists; name a new directory")
    checkpoint = open_checkpoint(str(source))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            is_head = ".k_proj." in name or ".v_proj." in name
            yield name, pooled(tensor, kv_heads, config.head_dim) if is_head else tensor

    raw = {**checkpoint.config_dict(), "num_key_value_heads": kv_heads}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(target) as directory:
        CONTAINERS["safetensors"].write(directory, Artifact(raw, tensors(), (), None, (), {}))
        checkpoint.copy_side_files(directory)


@dataclass(frozen=True)
class Figures:
    """A model's: key/value heads, bytes of cache a token in float16, perplexity."""

    kv_heads: int
    cache_bytes: int
    perplexity: float


def cache_bytes(config: ModelConfig, element_size: int = 2) -> int:
    """Of one token: keys and values of all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_size


def figures(path: Path, tokens: Sequence[int]) -> Figures:
    """Of the checkpoint ``path``, in float32, on one text."""
    model = load(path)
    cache = KVCache(model.config, len(tokens), model.dtype, model.device)
    return Figures(model.config.num_kv_heads, cache_bytes(model.config), perplexity(model, tokens, cache))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m inference.gqa", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="directory of safetensors, unquantized, with a tokenizer.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv-heads", type=int, required=True, help="key/value heads of the new model; 1 is MQA")
    parser.add_argument("--text", type=Path, required=True, help="a text to measure both models on")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    try:
        for file in (options.checkpoint / "tokenizer.json", options.text):
            if not file.is_file():
                raise InputError(f"{file} is missing; it is needed to measure both models on a text")
        ids = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json")).encode(options.text.read_text()).ids
        ids = ids[: min(options.tokens, read_config(options.checkpoint).max_tokens)]
        convert(options.checkpoint, options.out, options.kv_heads)
        rows = [figures(path, ids) for path in (options.checkpoint, options.out)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([vars(row) for row in rows]))
        return 0
    print(f"perplexity of {len(ids) - 1} tokens of {options.text}, float32, all tokens before each as context")
    for row in rows:
        print(
            f"{row.kv_heads} key/value heads: {row.cache_bytes} bytes of float16 cache a token, perplexity {row.perplexity:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
