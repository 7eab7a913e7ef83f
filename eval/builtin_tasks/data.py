"""The items of the built-in tasks, for lm-eval: read from beside this file, wherever it is installed, and cached nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def grammar(**_: Any) -> dict[str, datasets.Dataset]:
    """Minimal pairs: ``context``, two ``choices`` and ``answer``, the grammatical one's index; ``kind`` says what differs."""
    return _read("grammar.jsonl")


def cloze(**_: Any) -> dict[str, datasets.Dataset]:
    """Sentences to complete: ``context``, four ``choices`` and ``answer``, the sensible one's index; ``kind``."""
    return _read("cloze.jsonl")


def _read(name: str) -> dict[str, datasets.Dataset]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
