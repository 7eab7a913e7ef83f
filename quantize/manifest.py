"""The manifest: what a run directory holds, how it came about, and which steps are finished.

``manifest.json`` has the resolved recipe, versions, seed, the checkpoint's and the calibration's fingerprints, and one entry
in ``steps`` for each finished step::

    "steps": {"quantize/gptq": {"key": ..., "seconds": ..., "peak_rss_bytes": ..., "result": {...},
                                "files": {"work/quantize/gptq/block-00000.safetensors": {"sha256": ..., "size": ...}}}}

``key`` is a hash of everything the step's outcome depends on: the settings it reads and the results of the steps before it.
A step is finished when its key is the wanted one and its files are unchanged; then it is not run again.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize import __version__
from quantize.errors import InputError, one_line
from quantize.files import read_json, sha256_file, sha256_json, write_json

SCHEMA = 1
FILE_NAME = "manifest.json"
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "gguf", "optimum", "gptqmodel", "numpy")


class Manifest:
    """The manifest of one run directory, kept on disk after every step."""

    def __init__(self, directory: Path) -> None:
        """Read the directory's manifest, or start an empty one.

        Raises:
            InputError: there is one, but it is damaged or of another schema.
        """
        self.directory = directory
        self.data: dict[str, Any] = {"schema": SCHEMA, "steps": {}}
        if (directory / FILE_NAME).exists():
            self.data = _read(directory / FILE_NAME)
        self._verified: set[str] = set()

    def describe(self, **facts: Any) -> None:
        """Set top-level entries (recipe, seed); written with the next step."""
        self.data.update(project={"name": "quantize", "version": __version__}, versions=versions(), **facts)

    def finished(self, step: str, key: str) -> bool:
        """Whether ``step`` was done under ``key`` and its files are still as they were."""
        entry = self.data["steps"].get(step)
        if entry is None or entry["key"] != key:
            return False
        if step not in self._verified:
            if not all(self._unchanged(name, record) for name, record in entry["files"].items()):
                return False
            self._verified.add(step)
        return True

    def discard_changed(self, step: str, key: str) -> None:
        """Remove those files of a step once finished under ``key`` that are no longer as they were.

        A step that goes on from its own files would take them for finished work.
        """
        entry = self.data["steps"].get(step)
        if entry is not None and entry["key"] == key:
            for name, record in entry["files"].items():
                if not self._unchanged(name, record):
                    (self.directory / name).unlink(missing_ok=True)

    def _unchanged(self, name: str, record: dict[str, Any]) -> bool:
        path = self.directory / name
        return path.is_file() and path.stat().st_size == record["size"] and sha256_file(path) == record["sha256"]

    def forget(self, step: str) -> None:
        """Count a step as not finished."""
        self.data["steps"].pop(step, None)

    def result(self, step: str) -> dict[str, Any]:
        """What a finished step reported."""
        result: dict[str, Any] = self.data["steps"][step]["result"]
        return result

    def entry(self, step: str) -> dict[str, Any]:
        """A finished step's whole record."""
        entry: dict[str, Any] = self.data["steps"][step]
        return entry

    @contextlib.contextmanager
    def recording(self, step: str, key: str) -> Iterator[StepRecord]:
        """Run a step inside: time and peak memory are taken, and on success the step is written down as finished."""
        record = StepRecord()
        reset_peak_rss()
        started = time.perf_counter()
        yield record
        self.data["steps"][step] = {
            "key": key,
            "seconds": round(record.earlier_seconds + time.perf_counter() - started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "result": record.result,
            "files": {
                str(path.relative_to(self.directory)): {"sha256": sha256_file(path), "size": path.stat().st_size}
                for path in sorted(record.files)
            },
        }
        self._verified.add(step)
        write_json(self.directory / FILE_NAME, self.data)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except InputError as error:
        raise InputError(f"{path} is damaged ({one_line(error.__cause__ or error)}); delete it to start over") from error
    steps = data.get("steps") if isinstance(data, dict) else None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(steps, dict):
        raise InputError(f"{path} is not a manifest of this version; choose a new output_dir")
    for step, entry in steps.items():
        if not isinstance(entry, dict) or not entry.keys() >= {"key", "seconds", "result", "files"}:
            raise InputError(f"{path} is damaged (its step {step} is incomplete); delete it to start over")
    return data


class StepRecord:
    """Filled by a running step: its result (JSON), its files, and seconds spent on it before an interruption."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}
        self.files: list[Path] = []
        self.earlier_seconds = 0.0


def step_key(*parts: Any) -> str:
    """The key of a step whose outcome depends on ``parts`` (JSON values) and on this project's version."""
    return sha256_json([__version__, *parts])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic or formats an artifact depends on."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak_rss() -> None:
    """Start a new measurement of peak memory where the system allows it (Linux); elsewhere the process's peak stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release_memory() -> None:
    """Give freed memory back to the system. glibc keeps what tensors of a few MB leave behind, and its heap only grows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_bytes() -> int:
    """Peak resident memory in bytes since :func:`reset_peak_rss`; mapped file pages that were touched are included."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
