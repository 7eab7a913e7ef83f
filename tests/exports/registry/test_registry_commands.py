"""``python -m exports.registry``: list, tags, verify, gc, untag, bench."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports.registry.__main__ import main
from exports.registry.local import LocalRegistry
from exports.registry.release import Release
from exports.registry.transfer import publish

MakeRelease = Callable[..., Release]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``run("list", ..., code=0)``: standard output; of ``--json`` the value."""

    def run(*arguments: str, code: int = 0) -> Any:
        assert main(list(arguments)) == code
        captured = capsys.readouterr()
        if code == 2:
            return captured.err
        return json.loads(captured.out) if "--json" in arguments else captured.out

    return run


def test_list_tags_and_untag(registry: LocalRegistry, make_release: MakeRelease, run: Callable[..., Any]) -> None:
    old, new = make_release("old"), make_release("new", seed=1)
    publish(registry, "demo/tiny", "v1", old)
    publish(registry, "demo/tiny", "latest", new)
    assert run("list", registry.location, "--json") == {"demo/tiny": {"latest": new.digest, "v1": old.digest}}
    assert run("list", f"local:{registry.location}") == "demo/tiny: latest, v1\n"
    rows = run("tags", registry.location, "demo/tiny", "--json")
    assert [(row["tag"], row["digest"], row["bytes"]) for row in rows] == [
        ("latest", new.digest, new.size),
        ("v1", old.digest, old.size),
    ]
    run("untag", f"local:{registry.location}//demo/tiny:v1")
    assert run("list", registry.location) == "demo/tiny: latest\n"
    assert "does not exist" in run("untag", f"local:{registry.location}//demo/tiny:v1", code=2)
    assert "leave the digest out" in run("untag", f"local:{registry.location}//demo/tiny:v1@{old.digest}", code=2)
    assert "no tags of demo" in run("tags", registry.location, "demo", code=2)


def test_verify_and_gc(registry: LocalRegistry, make_release: MakeRelease, run: Callable[..., Any]) -> None:
    publish(registry, "tiny", "latest", make_release("old"))
    publish(registry, "tiny", "latest", make_release("new", seed=1))
    assert run("verify", registry.location, "--json") == []
    for path in [*registry.directory.rglob("*")]:
        if path.is_file():
            os.utime(path, (1, 1))
    assert run("gc", registry.location, "--json", "--dry-run", "--delete-untagged")["releases"] == 1
    assert run("gc", registry.location, "--json") == {"blobs": 0, "bytes": 0, "releases": 0}
    assert "1 releases" in run("gc", registry.location, "--delete-untagged")
    assert len(registry.releases("tiny")) == 1
    assert "is negative" in run("gc", registry.location, "--grace", "-1", code=2)
    blob = next(path for path in (registry.directory / "blobs").rglob("*/*/*") if path.stat().st_size == 3000)
    blob.unlink()
    assert "model-0.safetensors" in run("verify", registry.location, code=3)


def test_places_that_are_no_registry_are_named(tmp_path: Path, run: Callable[..., Any]) -> None:
    for command in ("list", "verify", "gc"):
        assert f"{tmp_path / 'none'} is no registry" in run(command, str(tmp_path / "none"), code=2)


def test_the_bench_measures_both_and_leaves_nothing(
    make_artifact: Callable[..., Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    artifact = make_artifact(size=100_000)
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    result = run("bench", str(artifact), "--rounds", "2", "--json")
    assert result["files"] == 4 and result["bytes"] > 100_000
    assert result["ratio"] == result["publish"] / result["cp -r and sha256sum"] > 0
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    assert list(tmp_path.iterdir()) == [artifact]
    (tmp_path / "empty").mkdir()
    assert "holds no artifact" in run("bench", str(tmp_path / "empty"), code=2)
