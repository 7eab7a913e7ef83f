"""What a person sees while it runs: log lines, progress bars with time left, and quiet libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from exports.registry.secrets import RedactingFilter

T = TypeVar("T")
console = Console(stderr=True)
_NOISY = (
    "gguf",
    "lm_eval",
    "torchao",
    "torch",
    "transformers",
    "datasets",
    "httpx",
    "httpcore",
    "urllib3",
    "filelock",
    "matplotlib",
    "accelerate",
    "bitsandbytes",
)


def setup_logging(level: str) -> None:
    """Log to standard error at ``level``, without secrets: with colour on a terminal, plain lines elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(RedactingFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def quiet_libraries() -> None:
    """Keep other packages' progress bars, banners and advice off the screen; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("torch.utils._pytree", "torchao._C"):
        logging.getLogger(name).setLevel(logging.ERROR)


def progress(items: Sequence[T] | Iterable[T], label: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar (done of total, time used, time left) on a terminal, silently elsewhere.

    Args:
        items: what to iterate over.
        label: shown before the bar.
        total: number of items including those done before; its length where ``items`` has one.
        done: items finished earlier (a resumed run).
    """
    if not console.is_terminal or logging.getLogger().getEffectiveLevel() > logging.INFO:
        yield from items
        return
    if total is None and isinstance(items, Sequence):
        total = len(items) + done
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)


@contextlib.contextmanager
def stdout_to_stderr(shown: bool) -> Iterator[None]:
    """Keep what libraries print on standard output off it: sent to standard error if ``shown``, else dropped."""
    sys.stdout.flush()
    saved = os.dup(1)
    target = os.dup(2) if shown else os.open(os.devnull, os.O_WRONLY)
    os.dup2(target, 1)
    os.close(target)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
