"""Ranks as processes against one rank: ``torchrun --nproc-per-node 2 -m inference.parallel_check MODEL``.

Every rank loads its part, tensor parallel and then as a pipeline; rank 0 also loads the whole model and prints the largest
difference of the logits and the bytes a token took between ranks, beside the formula, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inference import parallel, pipeline
from inference.config import read_config
from inference.kv_cache import KVCache
from inference.link import Link
from inference.load import LoadOptions, load
from inference.model import Model
from inference.parallel import RowParallelInt8, load_tensor_parallel
from inference.pipeline import MicroBatch, load_stage
from quantize.errors import InputError


def prompt(vocabulary: int, count: int) -> Tensor:
    """Pseudo-random tokens, the same on all ranks."""
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def check_tensor(directory: Path, link: Link, tokens: Tensor, options: LoadOptions) -> tuple[Tensor, dict[str, Any]]:
    """All ranks' logits of every token, and the bytes this rank put into sums and gatherings."""
    model = load_tensor_parallel(directory, link, options)
    logits = model.forward(tokens, KVCache(model.config, len(tokens), model.dtype).context([len(tokens)]))
    scaled = sum(isinstance(layer, RowParallelInt8) for block in model.blocks for layer in (block.o, block.down))
    sums, gathered = parallel.bytes_per_token(read_config(directory), link.ranks, scaled, model.dtype)
    measured = (link.reduced_bytes + link.gathered_bytes) / len(tokens)
    return logits, {"bytes_per_token": measured, "formula": sums + gathered}


def check_pipeline(directory: Path, link: Link, tokens: Tensor, options: LoadOptions) -> tuple[Tensor, dict[str, Any]]:
    """The same of a pipeline, in two micro-batches, each a sequence."""
    stage = load_stage(directory, link, options)
    config = stage.model.config
    cache = KVCache(config, len(tokens), stage.model.dtype, slots=2)
    before = link.sent_bytes
    found = stage.forward([MicroBatch(tokens, cache.context([len(tokens)], [slot])) for slot in range(2)])
    sent = link.sent_bytes - before
    logits = (
        torch.stack(found) if found is not None else torch.empty(2, len(tokens), config.vocab_size, dtype=stage.model.dtype)
    )
    shared = stage.share(logits)
    assert torch.equal(shared[0], shared[1])
    formula = pipeline.bytes_per_token(config, stage.model.dtype) if link.ranks > 1 else 0
    return shared[0], {"bytes_per_token": sent / (2 * len(tokens)), "formula": formula}


def difference(model: Model, tokens: Tensor, logits: Tensor) -> float:
    """The largest from one rank's logits."""
    wanted = model.forward(tokens, KVCache(model.config, len(tokens), model.dtype).context([len(tokens)]))
    return float((wanted - logits).abs().max())


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of one rank; ``torchrun`` says which."""
    parser = argparse.ArgumentParser(prog="python -m inference.parallel_check", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--weights", choices=("artifact", "int4"), default="artifact")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--ranks", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--store", type=Path, help="a file in which ranks find each other; torchrun's way by default")
    options = parser.parse_args(arguments)
    where = f"file://{options.store.resolve()}" if options.store else None
    try:
        if where is None and "MASTER_ADDR" not in os.environ:
            raise InputError("nothing says where the other ranks are: start with torchrun, or give all ranks one --store FILE")
        wait = timedelta(seconds=120)
        dist.init_process_group("gloo", init_method=where, rank=options.rank, world_size=options.ranks, timeout=wait)
        assert dist.group.WORLD is not None
        settings = LoadOptions(weights=options.weights)
        tokens = prompt(read_config(options.model).vocab_size, options.tokens)
        found: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        for name, check in (("tensor", check_tensor), ("pipeline", check_pipeline)):
            found[name] = check(options.model, Link(dist.group.WORLD), tokens, settings)
        if options.rank == 0:
            whole = load(options.model, settings)
            for logits, report in found.values():
                report["largest_difference"] = difference(whole, tokens, logits)
            print(json.dumps({"ranks": options.ranks, **{name: report for name, (_, report) in found.items()}}, indent=2))
        dist.barrier()
        dist.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
