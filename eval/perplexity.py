"""Perplexity of an artifact as its consumer loads it from disk, and its divergence from the model it was made from.

    python -m eval.perplexity ARTIFACT --text FILE --windows 16 --seq-len 1024
    python -m eval.perplexity ARTIFACT --text wiki.test.raw --protocol gptq --windows -1
    python -m eval.perplexity UNQUANTIZED --text FILE --save-reference reference.npz
    python -m eval.perplexity ARTIFACT --text FILE --reference reference.npz
    python -m eval.perplexity ARTIFACT --tasks builtin

``ppl = exp(sum of -log p / tokens scored)``, ``word_ppl`` and ``byte_ppl`` the same sum over words and bytes of the text that
those tokens stand for, ``bits_per_byte`` that sum in bits over bytes. Which tokens are scored, from which context, is the
protocol's to say: :mod:`eval.protocols`. The divergence is :mod:`eval.divergence`'s, the accuracy on tasks :mod:`eval.tasks`'s.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval import reference as references
from eval.consumers import CONSUMERS
from eval.consumers.base import LoadedArtifact
from eval.divergence import Comparison
from eval.protocols import Plan, plan, window_length
from eval.scoring import chunked, likelihood, score
from quantize.artifact import fingerprint, record_evaluation
from quantize.checks import check_eval
from quantize.config import LOG_LEVELS, PROTOCOLS, EvalConfig
from quantize.errors import InputError
from quantize.files import read_json, write_json
from quantize.logs import quiet_libraries, setup_logging, stdout_to_stderr
from quantize.manifest import peak_rss_bytes, reset_peak_rss


def evaluate_artifact(
    artifact: Path,
    config: EvalConfig | None = None,
    *,
    part: str | None = None,
    heldout_fraction: float = 0.2,
    device: str = "cpu",
    reference: Path | None = None,
    save_reference: Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Load an artifact in its consumer and measure perplexity, memory and, against a reference, divergence.

    Args:
        artifact: its directory.
        config: text and protocol.
        part: ``all``, ``train`` or ``heldout``; None: ``heldout`` of the built-in text, all of a file.
        heldout_fraction: the size of the held-out part.
        device: torch's name of it.
        reference: a file that ``save_reference`` made of another artifact; gives ``divergence``.
        save_reference: where to store what this artifact says.
        cache: a directory where tokenised texts are kept.

    Returns:
        ``ppl``, ``word_ppl``, ``byte_ppl`` and ``bits_per_byte`` (None when the model diverged; the last three also where the
        tokenizer does not tell words), ``consumer``, ``protocol``, ``compute_dtype``, ``seconds``, ``peak_rss_bytes`` (of this
        process while loading, interpreter and libraries included), ``evaluation_peak_rss_bytes``, ``artifact_fingerprint``,
        ``divergence`` (None without a reference) and, where the config names tasks, ``tasks`` and ``task_seconds``.

    Raises:
        InputError: the artifact cannot be loaded, the text is missing or too short, or the reference is not of this protocol.
    """
    config = config or EvalConfig()
    check_eval(config)
    if reference is not None and save_reference is not None:
        raise InputError("--reference and --save-reference are two runs; save one of the unquantized model first")
    opened = references.Reference(reference) if reference is not None else None
    identity = fingerprint(artifact)
    loaded, load_peak = _load(artifact, config, device)
    planned = plan(config, loaded.tokenizer, part=part, heldout_fraction=heldout_fraction, cache=cache)
    described = {
        "name": artifact.name,
        "artifact_fingerprint": identity,
        "protocol": asdict(planned.protocol),
        "tokens_sha256": planned.fingerprint(),
    }
    started = time.perf_counter()
    if save_reference is not None:
        with references.writing(save_reference, config.top_k) as writer:
            nll = score(chunked(loaded), planned.windows, writer, artifact.name)
            writer.finish({**described, "consumer": loaded.consumer, "compute_dtype": loaded.compute_dtype})
        divergence = None
    else:
        nll, divergence = _measure(loaded, planned, opened, described)
    result = {
        **_perplexities(nll, planned),
        "consumer": loaded.consumer,
        "protocol": described["protocol"],
        "compute_dtype": loaded.compute_dtype,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": load_peak,
        "evaluation_peak_rss_bytes": max(peak_rss_bytes(), load_peak),
        "artifact_fingerprint": identity,
        "divergence": divergence,
    }
    return result | (_accuracy(artifact, config, loaded, device) if config.tasks else {})


def _accuracy(artifact: Path, config: EvalConfig, loaded: LoadedArtifact, device: str) -> dict[str, Any]:
    from eval.tasks import evaluate_tasks  # imports this module, and lm-eval takes long to import

    started = time.perf_counter()
    folders = [Path(config.task_dir)] if config.task_dir else []
    found = evaluate_tasks(artifact, config.tasks, task_dirs=folders, limit=config.task_limit, device=device, loaded=loaded)
    return {"tasks": found, "task_seconds": round(time.perf_counter() - started, 3)}


def _load(artifact: Path, config: EvalConfig, device: str) -> tuple[LoadedArtifact, int]:
    """The artifact ready for evaluation, and the peak of memory while it was loaded."""
    consumer = CONSUMERS[container_of(artifact)]
    reset_peak_rss()
    loaded = consumer.load(artifact, device)
    load_peak = peak_rss_bytes()
    length = window_length(config)
    if length + config.bos > loaded.max_tokens:
        raise InputError(f"eval.seq_len={length} exceeds the model's context of {loaded.max_tokens} tokens; use at most that")
    return consumer.for_evaluation(loaded), load_peak


def _measure(
    loaded: LoadedArtifact, planned: Plan, opened: references.Reference | None, described: dict[str, Any]
) -> tuple[float, dict[str, Any] | None]:
    """Sum of ``-log p``, and the divergence where there is a reference."""
    if opened is None:
        return likelihood(loaded, planned.windows, described["name"]), None
    opened.check(described)
    watcher = Comparison(opened)
    nll = score(chunked(loaded), planned.windows, watcher, described["name"])
    opened.close()
    return nll, watcher.result()


def _perplexities(nll: float, planned: Plan) -> dict[str, float | None]:
    protocol = planned.protocol
    return {
        "ppl": _exp(nll, protocol.tokens),
        "word_ppl": _exp(nll, protocol.words),
        "byte_ppl": _exp(nll, protocol.bytes),
        "bits_per_byte": nll / protocol.bytes / math.log(2) if protocol.bytes and math.isfinite(nll) else None,
    }


def _exp(nll: float, count: int | None) -> float | None:
    """``exp(nll / count)``; None where that is no finite number."""
    if not count or not math.isfinite(nll) or nll / count > 700:
        return None
    return math.exp(nll / count)


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


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    options = vars(_parser().parse_args(arguments))
    output, level, record = options.pop("json"), options.pop("log_level"), options.pop("record")
    config = EvalConfig(
        **{key: options.pop(key) for key in ("text", "windows", "seq_len", "stride", "bos", "protocol", "top_k")},
        tasks=[name for name in options.pop("tasks").split(",") if name],
        task_dir=options.pop("task_dir"),
        task_limit=options.pop("task_limit"),
    )
    artifact = options.pop("artifact")
    setup_logging(level)
    quiet_libraries()
    try:
        # GPTQModel greets on standard output, which is for the result alone.
        with stdout_to_stderr(shown=level == "debug"):
            result = evaluate_artifact(artifact, config, **options)
        if output:
            write_json(output, result)
        if record:
            record_evaluation(artifact, result, known=result["artifact_fingerprint"])
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    print(json.dumps(result, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.perplexity", description="Perplexity of an artifact on disk.")
    parser.add_argument("artifact", type=Path, help="artifact directory")
    parser.add_argument("--text", default="builtin", help="text file, or builtin (Python's own documentation topics)")
    parser.add_argument("--protocol", default="windows", choices=PROTOCOLS, help="which tokens are scored, from which context")
    parser.add_argument("--part", choices=("all", "train", "heldout"), help="default: heldout of builtin, all of a file")
    parser.add_argument("--heldout-fraction", type=float, default=0.2, help="size of the held-out part")
    parser.add_argument("--windows", type=int, default=16, help="number of windows (wikitext: of pages); -1: all of the text")
    parser.add_argument("--seq-len", type=int, help="tokens in a window; default: the protocol's own")
    parser.add_argument("--stride", type=int, help="tokens between windows; default: the protocol's own")
    parser.add_argument("--bos", action="store_true", help="put BOS before each window (windows, strided)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--save-reference", type=Path, metavar="FILE", help="store what this artifact predicts")
    parser.add_argument("--top-k", type=int, default=256, help="likeliest tokens stored for each position, one by one")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="measure the divergence from what was stored")
    parser.add_argument("--tasks", default="", help="tasks whose accuracy is measured too, with commas between")
    parser.add_argument("--task-dir", metavar="DIR", help="folder of task YAML files")
    parser.add_argument("--task-limit", type=int, metavar="N", help="items of each task; default: all")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep tokenised texts here")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--record", action="store_true", help="write the result to the artifact's evaluation.json")
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
