"""Rows of the bench about keys and values in 8 bits: what they weigh, and what they cost in perplexity."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from calibration.sources import load_text
from inference.bench_cases import Bench, LeftOut, Row
from inference.context import Cache
from inference.kv_cache import KVCache
from inference.kv_int8 import Int8KVCache
from inference.model import Model

WINDOW = 512  # tokens of a window; every token but the first of each is scored


@torch.inference_mode()
def perplexity(model: Model, windows: list[Tensor], cache: Cache) -> float:
    """Of windows of tokens, each read in one forward through ``cache``: keys and values are those it gives back."""
    total, scored = 0.0, 0
    for window in windows:
        cache.reset()
        logits = model.forward(window[:-1], cache.context([len(window) - 1])).float()
        total += float(functional.cross_entropy(logits, window[1:], reduction="sum"))
        scored += len(window) - 1
    return math.exp(total / scored)


def int8_cache(bench: Bench) -> list[Row]:
    """The cache in 8 bits against 16, in bytes, and against float32, in perplexity of held-out English text."""
    file = bench.model / "tokenizer.json"
    if not file.exists():
        raise LeftOut(f"KV INT8: {bench.model} has no tokenizer.json to read a text with")
    model = bench.fp32
    longest = min(WINDOW, model.config.max_tokens)
    text = load_text("builtin", "heldout").text
    ids = torch.tensor(Tokenizer.from_file(str(file)).encode(text).ids)
    whole = min(bench.windows, len(ids) // longest)
    windows = [ids[index * longest : (index + 1) * longest] for index in range(whole)]
    if not windows:
        raise LeftOut(f"KV INT8: the text has fewer than {longest} tokens")
    narrow, half = Int8KVCache(model.config, longest), KVCache(model.config, longest, torch.float16)
    exact = perplexity(model, windows, KVCache(model.config, longest))
    found = perplexity(model, windows, narrow)
    size = f"{narrow.nbytes() / longest / 1024:.1f} KiB a token against {half.nbytes() / longest / 1024:.1f}"
    change = 100 * abs(found / exact - 1)
    detail = f"fp32 weights; perplexity {found:.4f} against {exact:.4f} on {len(windows)} windows of {longest} tokens"
    return [
        Row("KV INT8 against FP16, cache size", 1.9, (half.nbytes() / narrow.nbytes(),), f"{size}: half, but for the scales"),
        Row("KV INT8, change of perplexity", 0.1, (change,), detail, at_least=False, unit=" %"),
    ]
