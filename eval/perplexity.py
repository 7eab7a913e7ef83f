"""Perplexity of an artifact as its consumer loads it from disk.

    python -m eval.perplexity ARTIFACT --text FILE --windows 16 --seq-len 1024

The protocol: the whole text is tokenised once, without special tokens; windows of ``seq_len`` tokens start every ``stride``
tokens; in each window only tokens no earlier window has scored count, and the very first token of a window without BOS
never does (nothing precedes it). ``ppl = exp(sum of -log p / tokens scored)``. With ``stride = seq_len`` windows do not
overlap: the protocol of the GPTQ paper's code; smaller strides give every token more context and lower figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.sources import load_text
from calibration.windows import token_stream
from eval.consumers import CONSUMERS
from quantize.checks import check_eval
from quantize.config import LOG_LEVELS, EvalConfig
from quantize.errors import InputError
from quantize.files import read_json, write_json
from quantize.logs import progress, quiet_libraries, setup_logging, stdout_to_stderr
from quantize.manifest import peak_rss_bytes, reset_peak_rss

_SCORE_CHUNK = 128  # positions whose logits are turned to float32 log-probabilities at once


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured; figures of different protocols cannot be compared.

    Attributes:
        text: ``builtin`` or the name of a file.
        part: ``all`` of the text, or the part that calibration never sees, ``heldout``.
        window: tokens in a window.
        stride: tokens between the starts of windows.
        bos: whether BOS is put before each window (and its first token scored).
        tokens: tokens scored.
    """

    text: str
    part: str
    window: int
    stride: int
    bos: bool
    tokens: int


def window_starts(length: int, window: int, stride: int, limit: int | None) -> list[int]:
    """Starts of the full windows in a stream of ``length`` tokens, at most ``limit`` of them."""
    return list(range(0, length - window + 1, stride))[:limit]


def negative_log_likelihood(
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    window: int,
    stride: int,
    windows: int | None = None,
    bos_token_id: int | None = None,
    label: str = "perplexity",
) -> tuple[float, int]:
    """Sum of ``-log p`` over the scored tokens, and their number.

    Args:
        logits: token ids int64 ``[1, n]`` to logits ``[1, n, vocabulary]``.
        tokens: int64 ``[length]``, the tokenised text.
        window: tokens in a window.
        stride: tokens between windows.
        windows: at most this many; None for all.
        bos_token_id: put before each window; None for no BOS.
        label: of the progress bar.

    Raises:
        InputError: the text has not even one window.
    """
    starts = window_starts(len(tokens), window, stride, windows)
    if not starts or (windows is not None and len(starts) < windows):
        raise InputError(
            f"the text has {len(tokens)} tokens, room for {len(starts)} windows of eval.seq_len={window}; "
            f"use eval.windows={max(len(starts), 1)}, a smaller eval.seq_len or a longer text"
        )
    total, count = 0.0, 0
    for start in progress(starts, label):
        ids = tokens[start : start + window]
        first_new = 0 if start == 0 else window - stride
        if bos_token_id is not None:
            ids = torch.cat([torch.tensor([bos_token_id]), ids])
            first_new += 1
        scored_from = max(first_new, 1)
        output = logits(ids[None])[0]
        for low in range(scored_from, len(ids), _SCORE_CHUNK):
            high = min(low + _SCORE_CHUNK, len(ids))
            part = output[low - 1 : high - 1].float()
            total += torch.nn.functional.cross_entropy(part, ids[low:high].to(part.device), reduction="sum").item()
        count += len(ids) - scored_from
    return total, count


def evaluate_artifact(
    artifact: Path,
    *,
    text: str = "builtin",
    part: str | None = None,
    heldout_fraction: float = 0.2,
    windows: int = 16,
    seq_len: int = 1024,
    stride: int | None = None,
    bos: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Load an artifact in its consumer and measure perplexity and memory.

    Returns:
        ``ppl`` (infinite when the model diverged), ``consumer``, ``protocol``, ``compute_dtype``, ``seconds``,
        ``peak_rss_bytes`` (of this process while loading, interpreter and libraries included),
        ``evaluation_peak_rss_bytes``.

    Raises:
        InputError: the artifact cannot be loaded, or the text is missing or too short.
    """
    check_eval(EvalConfig(text, windows, seq_len, stride, bos))
    part = part or ("heldout" if text == "builtin" else "all")
    content = _read_text(text, part, heldout_fraction)
    consumer = CONSUMERS[container_of(artifact)]
    reset_peak_rss()
    loaded = consumer.load(artifact, device)
    load_peak = peak_rss_bytes()
    loaded = consumer.for_evaluation(loaded)
    if seq_len + bos > loaded.max_tokens:
        raise InputError(f"eval.seq_len={seq_len} exceeds the model's context of {loaded.max_tokens} tokens; use at most that")
    bos_token_id = loaded.tokenizer.bos_token_id if bos else None
    if bos and bos_token_id is None:
        raise InputError(f"eval.bos=true, but the tokenizer of {artifact} has no BOS token; use eval.bos=false")
    started = time.perf_counter()
    nll, count = negative_log_likelihood(
        loaded.logits,
        token_stream(loaded.tokenizer, content),
        window=seq_len,
        stride=stride or seq_len,
        windows=windows,
        bos_token_id=bos_token_id,
        label=artifact.name,
    )
    mean = nll / count
    return {
        "ppl": math.exp(mean) if mean < 700 else math.inf,
        "consumer": loaded.consumer,
        "protocol": asdict(
            Protocol(
                text=text if text == "builtin" else Path(text).name,
                part=part,
                window=seq_len,
                stride=stride or seq_len,
                bos=bos,
                tokens=count,
            )
        ),
        "compute_dtype": loaded.compute_dtype,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": load_peak,
        "evaluation_peak_rss_bytes": max(peak_rss_bytes(), load_peak),
    }


def container_of(artifact: Path) -> str:
    """Which container an artifact directory is: from its config, or GGUF where it holds such a file and no config.

    Raises:
        InputError: it is none that this project knows a consumer for.
    """
    config_file = artifact / "config.json"
    if not config_file.exists() and any(artifact.glob("*.gguf")):
        return "gguf"
    if not config_file.exists():
        raise InputError(f"{artifact} is no artifact: it has no config.json")
    quantization = read_json(config_file).get("quantization_config")
    name = quantization.get("quant_method", "unknown") if quantization else "safetensors"
    if name not in CONSUMERS:
        raise InputError(f"{artifact} is in the container {name}; known are {', '.join(CONSUMERS)}")
    return str(name)


def _read_text(text: str, part: str, heldout_fraction: float) -> str:
    if text == "builtin" or part != "all":
        source, path = ("builtin", None) if text == "builtin" else ("text", text)
        return load_text(source, part, path=path, heldout_fraction=heldout_fraction, key="eval").text
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"eval.text={text} cannot be read as UTF-8 text ({error}); give a text file or builtin") from error
    if not content.strip():
        raise InputError(f"eval.text={text} is empty; give a text file or builtin")
    return content


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.perplexity", description="Perplexity of an artifact on disk.")
    parser.add_argument("artifact", type=Path, help="artifact directory")
    parser.add_argument("--text", default="builtin", help="text file, or builtin (Python's own documentation topics)")
    parser.add_argument("--part", choices=("all", "train", "heldout"), help="default: heldout of builtin, all of a file")
    parser.add_argument("--heldout-fraction", type=float, default=0.2, help="size of the held-out part")
    parser.add_argument("--windows", type=int, default=16, help="number of windows")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--stride", type=int, help="tokens between windows; default: seq-len")
    parser.add_argument("--bos", action="store_true", help="put BOS before each window")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS)
    options = vars(parser.parse_args(arguments))
    output = options.pop("json")
    options_level = options.pop("log_level")
    setup_logging(options_level)
    quiet_libraries()
    try:
        # GPTQModel greets on standard output, which is for the result alone.
        with stdout_to_stderr(shown=options_level == "debug"):
            result = evaluate_artifact(**options)
        result["ppl"] = result["ppl"] if math.isfinite(result["ppl"]) else None
        if output:
            write_json(output, result)
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
