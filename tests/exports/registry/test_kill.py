"""A publisher that is killed: the registry shows the old release or the new one, and the next publisher goes on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from exports.registry.local import LocalRegistry, connect
from exports.registry.release import Release, assemble
from exports.registry.transfer import publish, pull
from exports.registry.upkeep import registry_problems

KILLS = 20
_PUBLISHER = """
import sys
from pathlib import Path
from exports.registry.local import connect
from exports.registry.release import assemble
from exports.registry.transfer import publish
release = assemble(Path(sys.argv[2]), {"README.md": ("card", b"# new")}, {"name": "tiny"})
registry = connect("local", sys.argv[1])
print("ready", flush=True)
publish(registry, "tiny", "latest", release)
"""


def _start(registry: LocalRegistry, artifact: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", _PUBLISHER, registry.location, str(artifact)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def _blobs(registry: LocalRegistry) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (registry.directory / "blobs").rglob("*") if path.is_file()}


def test_killed_at_random_points_it_shows_the_old_release_or_the_new_one(
    tmp_path: Path, make_artifact: Callable[..., Path], make_release: Callable[..., Release]
) -> None:
    old, artifact = make_release("old"), make_artifact("new", seed=1, files=24, size=400_000)
    new = assemble(artifact, {"README.md": ("card", b"# new")}, {"name": "tiny"})
    timed = connect("local", str(tmp_path / "timed"))
    publish(timed, "tiny", "latest", old)
    process = _start(timed, artifact)
    started = time.perf_counter()
    assert process.wait(60) == 0
    whole = time.perf_counter() - started

    registry = connect("local", str(tmp_path / "registry"))
    publish(registry, "tiny", "latest", old)
    rng, shown, interrupted = random.Random(0), set[str](), 0
    for kill in range(KILLS):
        before = _blobs(registry)
        process = _start(registry, artifact)
        time.sleep(rng.random() * whole)
        process.kill()
        interrupted += process.wait(60) == -signal.SIGKILL
        process.stdout and process.stdout.close()
        after = _blobs(registry)
        assert before.items() <= after.items(), "a finished file was written again"
        digest = registry.tags("tiny")["latest"]
        shown.add(digest)
        assert digest in (old.digest, new.digest)
        assert registry_problems(registry) == []
        pull(registry.reference("tiny", "latest"), tmp_path / f"pulled-{kill}")
        if digest == new.digest:  # begin anew, so that every kill has something to interrupt
            registry = connect("local", str(tmp_path / f"registry-{kill}"))
            publish(registry, "tiny", "latest", old)
    assert interrupted >= KILLS // 2 and old.digest in shown

    before = _blobs(registry)
    assert _start(registry, artifact).wait(60) == 0
    assert registry.tags("tiny")["latest"] == new.digest
    assert before.items() <= _blobs(registry).items()
    assert registry_problems(registry) == [] and list((registry.directory / "tmp").iterdir()) == []
