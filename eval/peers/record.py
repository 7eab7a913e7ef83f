"""What the peers' scripts share: their arguments, and the record of time and memory they leave. Standard library only."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass
class PeerJob:
    """One quantization by a peer.

    Attributes:
        model: the checkpoint's directory.
        windows: safetensors file whose tensor ``windows``, int64 ``[samples, tokens]``, is the calibration set.
        out: the artifact's directory; the record is ``OUT.json`` beside it.
        bits: of a weight.
        group: weights that share a scale.
        symmetric: without zero points.
        settings: choices of the peer's that decide its result, for the table's notes.
    """

    model: Path
    windows: Path
    out: Path
    bits: int
    group: int
    symmetric: bool
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_command_line(cls, arguments: list[str] | None = None) -> PeerJob:
        """Read ``MODEL WINDOWS OUT BITS GROUP SYMMETRIC``."""
        parser = argparse.ArgumentParser()
        for name in ("model", "windows", "out"):
            parser.add_argument(name, type=Path)
        for name in ("bits", "group"):
            parser.add_argument(name, type=int)
        parser.add_argument("symmetric", choices=("true", "false"))
        options = vars(parser.parse_args(arguments))
        return cls(**options | {"symmetric": options["symmetric"] == "true"})

    def record(self, started: float, packages: tuple[str, ...]) -> None:
        """Write ``OUT.json``: seconds since ``started`` (``time.perf_counter``), peak memory, versions, settings."""
        entry = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": {name: metadata.version(name) for name in packages},
            "settings": self.settings,
        }
        Path(f"{self.out}.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def progress(text: str) -> None:
    """Say how far the work is, for the report of a run that had to be stopped."""
    print(f"\nprogress: {text}", file=sys.stderr, flush=True)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes.

    ``VmHWM`` first: ``ru_maxrss`` also counts what the parent held when it started this process.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
