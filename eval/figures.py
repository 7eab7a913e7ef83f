"""Finished artifacts with the figures that lie beside them, and which of those figures may stand side by side.

No torch here: whoever only reads figures starts in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.artifact import problems, read_evaluation, read_manifest

_WEIGHTS = (".safetensors", ".gguf")
_INCIDENTAL = ("text", "words")  # of a protocol: a mere name, and what follows from the rest
_UNKNOWN_AT_TIMES = "bytes"  # scored: tells tokenizers apart, and is None where the tokenizer does not tell it
_SHA256 = 64


@dataclass(frozen=True)
class Subject:
    """An artifact as it lies on disk.

    Attributes:
        path: its directory.
        manifest: its ``manifest.json``.
        evaluation: its ``evaluation.json``; None where there is none.
        problems: what is wrong with its files.
    """

    path: Path
    manifest: dict[str, Any]
    evaluation: dict[str, Any] | None
    problems: list[str]

    @property
    def name(self) -> str:
        """The artifact's own name."""
        return str(self.manifest.get("name", self.path.name))

    @property
    def stale(self) -> bool:
        """Whether the figures are those of other bytes."""
        return self.evaluation is not None and self.evaluation.get("artifact_fingerprint") != self.manifest["fingerprint"]

    @property
    def figures(self) -> dict[str, Any]:
        """The figures, where they are those of these bytes."""
        return {} if self.problems or self.stale else self.evaluation or {}

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        files = self.manifest["files"].items()
        return sum(record["bytes"] for name, record in files if name.endswith(_WEIGHTS))


def read_subject(path: Path) -> Subject:
    """Read an artifact and hash its files again.

    Raises:
        InputError: it has no manifest, or a JSON file is damaged.
    """
    manifest = read_manifest(path)
    return Subject(path, manifest, read_evaluation(path), problems(path))


def comparable(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What two perplexities must share to be compared: the protocol, without mere names, and the arithmetic."""
    protocol = {key: value for key, value in evaluation["protocol"].items() if key not in _INCIDENTAL}
    return {**protocol, "compute_dtype": evaluation["compute_dtype"]}


def difference_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what two results of :func:`comparable` differ, such as ``window 1024 and 2048``; empty where they do not."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if None in (one.get(_UNKNOWN_AT_TIMES), other.get(_UNKNOWN_AT_TIMES)):
        keys = [key for key in keys if key != _UNKNOWN_AT_TIMES]
    return ", ".join(f"{key} {_short(one.get(key))} and {_short(other.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == _SHA256 else text
