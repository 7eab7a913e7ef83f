"""What the benches share: this project's command lines, processes with a time limit, and a console wide enough."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

PROJECT = Path(__file__).resolve().parent.parent
_TAIL_BYTES = 1 << 16
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROGRESS = "progress: "


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        returncode: its exit code; None when it was stopped at its limit.
        seconds: wall time.
        last: the last line of progress it printed, or its last line.
    """

    returncode: int | None
    seconds: float
    last: str


def quantize_command(recipe: str, output_dir: Path, overrides: Sequence[str] = ()) -> list[str]:
    """``python -m quantize`` in this interpreter."""
    return [sys.executable, "-m", "quantize", f"recipe={recipe}", f"output_dir={output_dir}", *overrides]


def table_console() -> Console:
    """Standard output; piped output has no width of its own, and the tables' figures need 120 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def run_limited(command: Sequence[str], *, log: Path, limit: float, environment: Mapping[str, str]) -> Outcome:
    """Run a process, its output going to the file ``log``, and stop it with all it started after ``limit`` seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a group of its own, so that workers it started end with it
        )
        try:
            returncode: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(returncode, time.perf_counter() - started, last_progress(log))


def last_progress(log: Path) -> str:
    """The last ``progress:`` line near the end of a log, else its last line; progress bars' carriage returns end lines too."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    lines = [" ".join(_ANSI.sub("", line).split()) for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line]
    marked = [line.removeprefix(_PROGRESS) for line in lines if line.startswith(_PROGRESS)]
    return (marked or lines or ["no output"])[-1]
