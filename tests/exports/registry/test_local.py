"""The local registry: whole or absent, deduplicated, safe with several publishers, kept in order."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exports.registry import connect as connect_any
from exports.registry import copying
from exports.registry.base import ANY, Conflict, Damaged, Entry, NotFound
from exports.registry.local import LocalRegistry, connect
from exports.registry.release import Release
from exports.registry.transfer import publish
from exports.registry.upkeep import collect_garbage, registry_problems
from quantize.errors import InputError

MakeRelease = Callable[..., Release]


def _blobs(registry: LocalRegistry) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (registry.directory / "blobs").rglob("*") if path.is_file()}


def test_a_release_goes_in_and_is_found_by_tag_and_by_digest(registry: LocalRegistry, make_release: MakeRelease) -> None:
    release = make_release()
    assert registry.names() == [] and registry.tags("tiny") == {}
    reference, sent = publish(registry, "tiny", "v1", release)
    assert sent == release.size and str(reference) == f"local:{registry.directory}//tiny:v1@{release.digest}"
    assert registry.names() == ["tiny"] and registry.tags("tiny") == {"v1": release.digest}
    assert registry.resolve(registry.reference("tiny", "v1")) == release.digest
    assert registry.manifest("tiny", release.digest) == release.manifest
    assert registry_problems(registry) == []
    with pytest.raises(NotFound, match=r"v2 does not exist; its tags: v1"):
        registry.resolve(registry.reference("tiny", "v2"))
    with pytest.raises(NotFound, match="has no tags"):
        registry.resolve(registry.reference("other", "v1"))
    with pytest.raises(NotFound, match="has no release"):
        registry.manifest("tiny", "sha256:" + "0" * 64)


def test_every_file_is_stored_once_and_a_second_publish_writes_only_what_changed(
    registry: LocalRegistry, make_release: MakeRelease
) -> None:
    first = make_release("first", size=100_000)
    publish(registry, "tiny-a", "latest", first)
    before = _blobs(registry)
    assert publish(registry, "tiny-a", "latest", first)[1] == 0
    assert _blobs(registry) == before
    second = make_release("second", seed=1, size=100_000)
    _, sent = publish(registry, "tiny-b", "latest", second)
    shared = sum(entry.size for entry in second.entries if entry.name == "tokenizer.json")
    assert shared and sent == second.size - shared
    after = _blobs(registry)
    assert before.items() <= after.items()
    # One blob a changed file and one for release.json.
    assert len(after) - len(before) == len(second.entries) - 1 + 1


def test_a_file_changed_since_it_was_listed_is_refused_and_nothing_is_published(
    registry: LocalRegistry, make_artifact: Callable[..., Path], make_release: MakeRelease
) -> None:
    release = make_release("artifact")
    file = next(entry.path for entry in release.entries if entry.name == "model-0.safetensors")
    assert file is not None
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match=r"model-0\.safetensors is not the file that was listed"):
        publish(registry, "tiny", "latest", release)
    assert registry.names() == [] and registry.tags("tiny") == {}
    data[1000] ^= 1
    file.write_bytes(data)
    publish(registry, "tiny", "latest", release)
    file.write_bytes(data[:-1])
    with pytest.raises(Damaged, match="not the file that was listed"):  # though the registry has the right one
        publish(registry, "tiny", "latest", release)


def test_blobs_cannot_be_written_to_and_are_copies(registry: LocalRegistry, make_release: MakeRelease) -> None:
    release = make_release()
    publish(registry, "tiny", "latest", release)
    for entry in release.entries:
        blob = registry.blob(entry.sha256)
        assert blob.stat().st_mode & 0o222 == 0 and blob.stat().st_nlink == 1


def test_compare_and_swap_of_tags(registry: LocalRegistry, make_release: MakeRelease) -> None:
    old, new = make_release("old"), make_release("new", seed=1)
    publish(registry, "tiny", "v1", old)
    publish(registry, "tiny", "v2", new)
    with pytest.raises(Conflict, match=f"it says {old.digest}, not nothing as before"):
        registry.set_tag("tiny", "v1", new.digest, None)
    with pytest.raises(Conflict, match="by somebody else"):
        registry.set_tag("tiny", "v1", new.digest, new.digest)
    assert registry.tags("tiny")["v1"] == old.digest
    registry.set_tag("tiny", "v1", old.digest, None)  # says so already
    registry.set_tag("tiny", "v1", new.digest, old.digest)
    registry.set_tag("tiny", "v1", old.digest, ANY)
    registry.remove_tag("tiny", "v1")
    assert registry.tags("tiny") == {"v2": new.digest} and old.digest in registry.releases("tiny")
    with pytest.raises(NotFound, match="does not exist"):
        registry.remove_tag("tiny", "v1")
    with pytest.raises(NotFound, match="publish it first"):
        registry.set_tag("tiny", "v1", "sha256:" + "0" * 64)


def _race(location: str, release: Release, barrier: Barrier, results: multiprocessing.Queue[str]) -> None:
    registry = connect("local", location)

    # Both look at the tag before either moves it: as publishers do whose pushing takes a while.
    push, waits = registry.push, iter([barrier.wait])

    def slow(name: str, entries: object) -> int:
        for wait in waits:  # before the first push only
            wait(60)
        return push(name, entries)  # type: ignore[arg-type]

    registry.push = slow  # type: ignore[method-assign]
    try:
        publish(registry, "tiny", "latest", release)
        results.put(f"won {release.digest}")
    except Conflict as error:
        results.put(f"conflict {error}")


@pytest.mark.parametrize("identical", [False, True])
def test_of_publishers_of_one_tag_at_once_one_wins_whole(
    registry: LocalRegistry, make_release: MakeRelease, identical: bool
) -> None:
    releases = [make_release(f"r{number}", seed=0 if identical else number, size=200_000) for number in range(4)]
    if identical:  # their cards differ by the folders' names
        releases = [releases[0]] * 4
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    barrier = context.Barrier(len(releases))
    workers = [context.Process(target=_race, args=(registry.location, release, barrier, results)) for release in releases]
    for worker in workers:
        worker.start()
    outcomes = sorted(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    won = [outcome for outcome in outcomes if outcome.startswith("won")]
    assert won == [f"won {registry.tags('tiny')['latest']}"] * (4 if identical else 1)
    assert all("was moved by somebody else" in outcome for outcome in outcomes if outcome not in won)
    assert registry_problems(registry) == []


def test_garbage_collection_takes_what_no_release_needs(registry: LocalRegistry, make_release: MakeRelease) -> None:
    old, new = make_release("old"), make_release("new", seed=1)
    publish(registry, "tiny", "latest", old)
    publish(registry, "tiny", "latest", new)
    stray = Entry.of_data("x", b"pushed, and never released", "artifact")
    registry.push("tiny", [stray])
    assert collect_garbage(registry).blobs == 0  # young: a publisher may be about to need it
    assert collect_garbage(registry, grace=0, dry_run=True).blobs == 1
    swept = collect_garbage(registry, grace=0)
    assert (swept.blobs, swept.bytes, swept.releases) == (1, stray.size, 0)
    assert registry.manifest("tiny", old.digest) and registry_problems(registry) == []  # untagged releases stay
    swept = collect_garbage(registry, grace=0, delete_untagged=True)
    assert swept.releases == 1 and registry.releases("tiny") == [new.digest]
    assert set(_blobs(registry)) == {e.sha256 for e in new.entries} | {new.digest.removeprefix("sha256:")}
    assert registry_problems(registry) == []


def test_garbage_collection_spares_a_running_publisher(registry: LocalRegistry, make_release: MakeRelease) -> None:
    release = make_release()
    registry.push("tiny", release.entries)
    for blob in (registry.directory / "blobs").rglob("*/*/*"):
        os.utime(blob, (1, 1))
    # Asking is enough to keep it; what nobody asked for goes.
    assert registry.has("tiny", release.entries[0])
    assert collect_garbage(registry, grace=60).blobs == len(release.entries) - 1
    with pytest.raises(NotFound, match="publish it again"):
        registry.put("tiny", release.manifest, release.entries)
    # Publishing mends that by itself, also when everything vanishes between its push and its put.
    put, times = registry.put, iter([True, False])

    def vanishing(*arguments: object) -> str:
        if next(times):
            collect_garbage(registry, grace=-60)
        return put(*arguments)  # type: ignore[arg-type]

    registry.put = vanishing  # type: ignore[method-assign, assignment]
    publish(registry, "tiny", "latest", release)
    assert registry_problems(registry) == []


def test_garbage_collection_stops_at_a_damaged_manifest(registry: LocalRegistry, make_release: MakeRelease) -> None:
    release = make_release()
    publish(registry, "tiny", "latest", release)
    blob = registry.blob(release.digest)
    blob.chmod(0o644)
    blob.write_bytes(release.manifest.replace(b"sha256", b"sha255", 1))
    before = _blobs(registry)
    with pytest.raises(Damaged, match=r"release\.json of tiny@"):
        collect_garbage(registry, grace=0)
    assert _blobs(registry) == before


def test_verify_names_every_damaged_missing_and_planted_file(registry: LocalRegistry, make_release: MakeRelease) -> None:
    release = make_release(files=2)
    publish(registry, "tiny", "latest", release)
    files = {entry.name: registry.blob(entry.sha256) for entry in release.entries}
    for name in ("config.json", "model-0.safetensors", "model-1.safetensors"):
        files[name].chmod(0o644)
    data = bytearray(files["model-0.safetensors"].read_bytes())
    data[-1] ^= 128
    files["model-0.safetensors"].write_bytes(data)
    files["model-1.safetensors"].unlink()
    files["config.json"].unlink()
    files["config.json"].symlink_to("/etc/hostname")
    (registry.directory / "names" / "tiny" / "_tags" / "stray").write_text("sha256:" + "0" * 64)
    problems = registry_problems(registry)
    assert len(problems) == 4
    for word in ("config.json: ", "model-0.safetensors: ", "model-1.safetensors: ", "tiny:stray says"):
        assert any(word in problem for problem in problems), word
    (registry.directory / "names" / "tiny" / "_tags" / "stray").write_text("nonsense")
    assert any("a tag is damaged" in problem for problem in registry_problems(registry))


def test_what_a_killed_publisher_left_is_removed_and_a_living_ones_is_not(
    registry: LocalRegistry, make_release: MakeRelease
) -> None:
    publish(registry, "tiny", "latest", make_release())
    dead = registry.directory / "tmp" / "dead"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"x" * 1000)
    with registry._session() as living:
        (living / "half").write_bytes(b"x")
        other = connect("local", registry.location)
        publish(other, "tiny", "latest", make_release("next", seed=3))
        assert (living / "half").exists() and not dead.exists()
    assert list((registry.directory / "tmp").iterdir()) == []


def test_places_that_are_no_registry_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "registry.json").write_text('{"schema": 9}')
    for name, said in (("file", "is a file"), ("full", "not empty"), ("newer", "another version")):
        with pytest.raises(InputError, match=said):
            connect("local", str(tmp_path / name))
    with pytest.raises(InputError, match="use local"):
        connect_any("ftp", "x")


def test_a_registry_nobody_may_write_to_says_so(
    registry: LocalRegistry, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make_release()

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(InputError, match=r"cannot write .*permission denied"):
        publish(registry, "tiny", "latest", release)


@settings(max_examples=20)
@given(size=st.integers(0, 40), clone=st.booleans(), kernel=st.booleans())
def test_copies_are_exact_and_hashed_by_every_way_of_copying(
    size: int, clone: bool, kernel: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import hashlib
    import random

    folder = tmp_path_factory.mktemp("copy")
    data = random.Random(size).randbytes(size * 1000 + size % 7)
    (folder / "source").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_PIECE", 4096)
        if not clone:
            patch.setattr(copying, "_clone", lambda reading, writing: False)
        if not kernel:
            patch.delattr(os, "copy_file_range", raising=False)
        assert copying.copy_hashed(folder / "source", folder / "target") == (hashlib.sha256(data).hexdigest(), len(data))
    assert (folder / "target").read_bytes() == data
    with pytest.raises(FileExistsError):
        copying.copy_hashed(folder / "source", folder / "target")
    (folder / "link").symlink_to("source")
    with pytest.raises(OSError):
        copying.copy_hashed(folder / "link", folder / "other")


def test_an_error_of_the_copying_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    monkeypatch.setattr(copying, "_PIECE", 4096)
    monkeypatch.setattr(copying, "_clone", lambda reading, writing: False)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        copying.copy_hashed(tmp_path / "source", tmp_path / "target")
    assert threading.active_count() <= before


def test_a_full_disk_is_told_in_one_line(
    registry: LocalRegistry, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make_release()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exports.registry.local._flush", full)
    with pytest.raises(InputError, match="the disk is full"):
        publish(registry, "tiny", "latest", release)
    monkeypatch.undo()
    publish(registry, "tiny", "latest", release)
    assert json.loads(registry.manifest("tiny", release.digest))["name"] == "tiny-int4"
