"""Tasks in vLLM: lm-eval's own ``vllm`` model, in the environment that has vLLM (``make vllm``), as a process."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.files import read_json

VARIABLE = "QUANTIZE_VLLM"
_PROJECT = Path(__file__).resolve().parent.parent


def python() -> Path:
    """The interpreter of vLLM's environment: ``$QUANTIZE_VLLM``, or that of ``make vllm``.

    Raises:
        InputError: it is not there.
    """
    given = os.environ.get(VARIABLE)
    found = Path(given).expanduser() if given else _PROJECT / ".venv-vllm" / "bin" / "python"
    if not found.is_file():
        raise InputError(f"{found} does not exist; run `make vllm`, or set {VARIABLE} to a Python that has vLLM and lm-eval")
    return found


def arguments_for(artifact: Path, names: Sequence[str], task_dirs: Sequence[Path], limit: int | None, out: Path) -> list[str]:
    """The command line of :mod:`eval.peers.vllm_tasks`, without the interpreter."""
    arguments = ["-m", "eval.peers.vllm_tasks", str(artifact.absolute()), str(out), "--tasks", ",".join(names)]
    for folder in task_dirs:
        arguments += ["--task-dir", str(folder)]
    return arguments if limit is None else [*arguments, "--limit", str(limit)]


def run_in_vllm(
    artifact: Path, names: Sequence[str], *, task_dirs: Sequence[Path] = (), limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run tasks on an artifact in vLLM; each name's entry (:mod:`eval.tasks_scores`).

    Raises:
        InputError: there is no vLLM, it does not run the artifact, or a task cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-tasks-") as folder:
        out = Path(folder, "tasks.json")
        command = [str(python()), *arguments_for(artifact, names, task_dirs, limit, out)]
        path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH", "")]))
        result = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if result.returncode or not out.exists():
            lines = [" ".join(line.split()) for line in result.stderr.splitlines() if line.strip()]
            raise InputError(f"vLLM does not run the tasks on {artifact}: {lines[-1] if lines else 'it said nothing'}")
        found: dict[str, dict[str, Any]] = read_json(out)
    return found
