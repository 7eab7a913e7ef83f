"""Accuracy of an artifact on lm-eval's tasks, in the program that runs it.

    python -m eval.tasks ARTIFACT --tasks builtin,piqa --task-dir DIR [--limit N] [--reference FILE] [--json FILE]

``transformers`` runs every artifact; ``llamacpp`` runs GGUF files (llama-server) and is their default where it is built;
``vllm`` runs what vLLM runs, in its own environment. With the figures of another artifact as reference, such as the FP16
baseline's, each task says whether the difference is more than noise, and how many answers changed either way. docs/tasks.md has
the whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.consumers import CONSUMERS
from eval.consumers.base import LoadedArtifact
from eval.consumers.gguf_model import gguf_file
from eval.consumers.transformers_model import TransformersArtifact
from eval.llamacpp_tools import PACKAGE, VERSION, directory, find_tool, home
from eval.perplexity import container_of
from eval.tasks_scores import sentence, with_differences
from eval.tasks_vllm import run_in_vllm
from quantize.artifact import fingerprint, read_evaluation, record_evaluation
from quantize.config import LOG_LEVELS
from quantize.errors import InputError
from quantize.files import read_json, write_json
from quantize.logs import quiet_libraries, setup_logging, stdout_to_stderr

CHOICES = ("auto", "transformers", "llamacpp", "vllm")
log = logging.getLogger("eval")


def evaluate_tasks(
    artifact: Path,
    names: Sequence[str],
    *,
    task_dirs: Sequence[Path] = (),
    limit: int | None = None,
    consumer: str = "auto",
    device: str = "cpu",
    loaded: LoadedArtifact | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks on an artifact; each name's entry (:mod:`eval.tasks_scores`).

    Args:
        artifact: the artifact's directory.
        names: tasks, groups and tags of tasks.
        task_dirs: folders of task YAML files besides the built-in ones and lm-eval's.
        limit: items of each task; None for all.
        consumer: one of :data:`CHOICES`.
        device: of transformers.
        loaded: the artifact as transformers loaded it for evaluation already; None: it is loaded where it is needed.

    Raises:
        InputError: lm-eval is not installed, the consumer does not run this artifact, or a task cannot be run.
    """
    if limit is not None and limit < 1:
        raise InputError(f"eval.task_limit={limit} leaves no items; use null for all, or 1 and more")
    runner = consumer_of(artifact, consumer)
    try:
        import lm_eval  # noqa: F401

        from eval.tasks_run import run_tasks
    except ImportError as error:
        raise InputError(f"tasks need the lm-eval package ({error}); install quantize again with its dependencies") from error
    options: dict[str, Any] = {"task_dirs": task_dirs, "limit": limit}
    if runner == "vllm":
        return run_in_vllm(artifact, names, **options)
    if runner == "llamacpp":
        from eval.tasks_llamacpp import server_lm

        with server_lm(gguf_file(artifact)) as lm:
            return run_tasks(lm, names, consumer=f"llama.cpp {_llamacpp_version(lm.build)}", **options)
    from eval.tasks_transformers import ArtifactLM

    if loaded is None:
        entry = CONSUMERS[container_of(artifact)]
        loaded = entry.for_evaluation(entry.load(artifact, device))
    assert isinstance(loaded, TransformersArtifact)
    return run_tasks(ArtifactLM(loaded), names, consumer=loaded.consumer, **options)


def _llamacpp_version(build: str) -> str:
    """What names the llama.cpp that answered: built from the pinned package it does not know its own build number."""
    return f"of {PACKAGE} {VERSION}" if directory() == home() / "bin" else build


def consumer_of(artifact: Path, consumer: str = "auto") -> str:
    """The program that answers for an artifact: llama.cpp for GGUF files where it is built, else transformers.

    Raises:
        InputError: the one that is named does not run such an artifact.
    """
    if consumer not in CHOICES:
        raise InputError(f"consumer {consumer} is unknown; use {', '.join(CHOICES)}")
    is_gguf = container_of(artifact) == "gguf"
    if consumer == "llamacpp" and not is_gguf:
        raise InputError(f"{artifact} is no GGUF file, which is all that llama.cpp runs; use --consumer transformers")
    if consumer != "auto":
        return consumer
    if not is_gguf:
        return "transformers"
    if find_tool("llama-server") is not None:
        return "llamacpp"
    log.warning("llama.cpp is not built (`make llamacpp`): transformers reads the GGUF file and answers the tasks")
    return "transformers"


def read_reference(path: Path) -> dict[str, Any]:
    """The entries in a file that this command wrote, or in an artifact's ``evaluation.json``.

    Raises:
        InputError: it has none.
    """
    found = read_json(path)
    tasks = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(
            f"{path} has no figures of tasks; make it with `python -m eval.tasks ARTIFACT --tasks builtin --json FILE`"
        )
    return tasks


def _result(options: argparse.Namespace) -> dict[str, Any]:
    reference = read_reference(options.reference) if options.reference else None
    names = [name.strip() for name in options.tasks.split(",")]
    started = time.perf_counter()
    tasks = evaluate_tasks(
        options.artifact,
        names,
        task_dirs=options.task_dir,
        limit=options.limit,
        consumer=options.consumer,
        device=options.device,
    )
    if reference is not None:
        tasks = with_differences(tasks, reference)
    return {
        "artifact": options.artifact.resolve().name,
        "artifact_fingerprint": fingerprint(options.artifact),
        "tasks": tasks,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _record(artifact: Path, result: dict[str, Any]) -> None:
    """Add tasks to those in ``evaluation.json``, where they are of the same bytes."""
    earlier, current = read_evaluation(artifact) or {}, result["artifact_fingerprint"]
    kept = earlier.get("tasks", {}) if earlier.get("artifact_fingerprint") == current else {}
    record_evaluation(artifact, {"tasks": {**kept, **result["tasks"]}}, known=current)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.tasks", description="Accuracy of an artifact on lm-eval's tasks.")
    parser.add_argument("artifact", type=Path, help="artifact directory")
    parser.add_argument("--tasks", default="builtin", help="names with commas between; default: builtin, which is offline")
    parser.add_argument("--task-dir", type=Path, action="append", default=[], help="folder of task YAML files; may be repeated")
    parser.add_argument("--limit", type=int, help="items of each task, the first ones; default: all")
    parser.add_argument("--reference", type=Path, help="file of --json, or evaluation.json, of the artifact to compare with")
    parser.add_argument("--consumer", choices=CHOICES, default="auto", help="default: llama.cpp for GGUF, else transformers")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--record", action="store_true", help="add the figures to the artifact's evaluation.json")
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS)
    options = parser.parse_args(arguments)
    setup_logging(options.log_level)
    quiet_libraries()
    try:
        # lm-eval and GPTQModel print on standard output, which is for the result alone.
        with stdout_to_stderr(shown=options.log_level == "debug"):
            result = _result(options)
        if options.json:
            write_json(options.json, result)
        if options.record:
            _record(options.artifact, result)
    except InputError as error:
        log.error("%s", error)
        return 2
    for name, found in result["tasks"].items():
        log.info("%s", sentence(name, found))
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
