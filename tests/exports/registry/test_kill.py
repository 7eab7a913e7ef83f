"""A publisher that is killed: the registry shows the old release or the new one, and the next publisher goes on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from exports.registry.local import LocalRegistry, connect
from exports.registry.release import Release, assemble
from exports.registry.transfer import publish, pull
from exports.registry.upkeep import registry_problems

KILLS = 20
_PUBLISHER = """
import itertools, os, signal, sys, threading
from pathlib import Path
from exports.registry.local import connect
from exports.registry.release import assemble
from exports.registry.transfer import publish
release = assemble(Path(sys.argv[2]), {"README.md": ("card", b"# new")}, {"name": "tiny"})
registry = connect("local", sys.argv[1])
last, calls = int(sys.argv[3]), itertools.count(1)
def count(frame, event, function):
    if event in ("c_call", "c_return") and next(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
threading.setprofile(count)
sys.setprofile(count)
publish(registry, "tiny", "latest", release)
sys.setprofile(None)
print(next(calls))
"""


def _publish(registry: LocalRegistry, artifact: Path, last: int = 0) -> int | None:
    """Publish in a process that is killed before or after its ``last``-th call into C, files and threads included.

    Calls, not seconds: a busy machine kills at the same places. The number of calls made, or None where it was killed.
    """
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", _PUBLISHER, registry.location, str(artifact), str(last)]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL)
    return None if done.returncode else int(done.stdout)


def _blobs(registry: LocalRegistry) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (registry.directory / "blobs").rglob("*") if path.is_file()}


def test_killed_at_random_points_it_shows_the_old_release_or_the_new_one(
    tmp_path: Path, make_artifact: Callable[..., Path], make_release: Callable[..., Release]
) -> None:
    old, artifact = make_release("old"), make_artifact("new", seed=1, files=24, size=400_000)
    new = assemble(artifact, {"README.md": ("card", b"# new")}, {"name": "tiny"})
    counted = connect("local", str(tmp_path / "counted"))
    publish(counted, "tiny", "latest", old)
    whole = _publish(counted, artifact)
    assert whole is not None

    registry = connect("local", str(tmp_path / "registry"))
    publish(registry, "tiny", "latest", old)
    rng, shown, interrupted = random.Random(0), set[str](), 0
    for kill in range(KILLS):
        before = _blobs(registry)
        interrupted += _publish(registry, artifact, rng.randrange(1, whole)) is None
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
    assert _publish(registry, artifact) is not None
    assert registry.tags("tiny")["latest"] == new.digest
    assert before.items() <= _blobs(registry).items()
    assert registry_problems(registry) == [] and list((registry.directory / "tmp").iterdir()) == []
