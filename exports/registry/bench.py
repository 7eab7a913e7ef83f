"""How long publishing takes, against ``cp -r`` and ``sha256sum`` of the same bytes: in turn, on the same disk, medians."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exports.registry import connect
from exports.registry.names import as_name
from exports.registry.release import assemble
from exports.registry.transfer import publish
from quantize.artifact import MANIFEST
from quantize.errors import InputError


def bench(directory: Path, rounds: int = 5) -> dict[str, Any]:
    """Time both, ``rounds`` times in turn, beside ``directory``; medians in seconds, and their ratio.

    Publishing flushes every file to the disk before a tag speaks of it; ``cp`` does not, and is not asked to. Before every
    timing the disk is given time to write what is left of the one before.

    Raises:
        InputError: no artifacts are there, or ``rounds`` is not positive.
    """
    if rounds < 1:
        raise InputError(f"--rounds {rounds} is too few; use 1 or more")
    artifacts = [path.parent for path in sorted(directory.rglob(MANIFEST))] if directory.is_dir() else []
    if not artifacts:
        raise InputError(f"{directory} holds no artifact (no {MANIFEST}); name one, or a folder of some")
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=directory.resolve().parent, prefix=".bench-") as folder:
        for number in range(rounds + 1):
            copy, registry = Path(folder, "copy"), Path(folder, "registry")
            actions: list[tuple[str, Callable[[], object]]] = [
                ("cp -r and sha256sum", lambda copy=copy: _copy(artifacts, copy)),  # type: ignore[misc]
                ("publish", lambda registry=registry: _publish(artifacts, registry)),  # type: ignore[misc]
            ]
            for name, action in actions if number % 2 else actions[::-1]:
                _time(times, name, action)
            _time(times, "publish, nothing changed", actions[1][1])
            shutil.rmtree(copy)
            shutil.rmtree(registry)
            if number == 0:  # the files come into the page cache
                times.clear()
    result: dict[str, Any] = {name: statistics.median(each) for name, each in times.items()}
    files = [path for artifact in artifacts for path in artifact.rglob("*") if path.is_file()]
    result |= {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "rounds": rounds}
    result["ratio"] = result["publish"] / result["cp -r and sha256sum"]
    return result


def _time(times: dict[str, list[float]], name: str, action: Callable[[], object]) -> None:
    os.sync()
    started = time.perf_counter()
    action()
    times.setdefault(name, []).append(time.perf_counter() - started)


def _copy(artifacts: list[Path], target: Path) -> None:
    target.mkdir()
    for number, artifact in enumerate(artifacts):
        subprocess.run(["cp", "-r", str(artifact), str(target / str(number))], check=True)
    files = sorted(str(path) for path in target.rglob("*") if path.is_file())
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def _publish(artifacts: list[Path], target: Path) -> None:
    registry = connect("local", str(target))
    for artifact in artifacts:
        publish(registry, as_name(artifact.name), "latest", assemble(artifact, {}, {"name": artifact.name}))
