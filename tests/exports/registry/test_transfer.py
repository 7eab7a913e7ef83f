"""Pulling: byte-identical, whole or not at all, and nothing that was tampered with."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports.registry.base import Damaged, Entry, NotFound
from exports.registry.local import LocalRegistry
from exports.registry.names import Reference
from exports.registry.release import Release, assemble, manifest_bytes, parse_release
from exports.registry.transfer import directory_problems, publish, pull, reference_problems
from quantize.artifact import RELEASE, fingerprint, record_evaluation
from quantize.artifact import problems as artifact_problems
from quantize.errors import InputError

MakeRelease = Callable[..., Release]
MakeArtifact = Callable[..., Path]


@pytest.fixture
def published(registry: LocalRegistry, make_release: MakeRelease) -> tuple[Reference, Release]:
    release = make_release(files=2)
    return publish(registry, "tiny", "latest", release)[0], release


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pulled_is_what_was_published(published: tuple[Reference, Release], tmp_path: Path) -> None:
    reference, release = published
    destination = tmp_path / "a" / "b"
    pull(reference, destination)
    contents = _contents(destination)
    assert contents.pop(RELEASE) == release.manifest
    assert contents.pop("README.md") == b"# artifact\n"
    contents.pop("SHA256SUMS")
    assert contents == _contents(tmp_path / "artifact")
    assert directory_problems(destination) == [] and reference_problems(reference, tmp_path) == []
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=destination, check=True)
    pull(reference, destination)  # again: nothing to do
    (destination / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds something else"):
        pull(reference, destination)
    assert list(destination.parent.iterdir()) == [destination]


def test_a_pulled_file_is_its_own_and_may_be_changed(published: tuple[Reference, Release], tmp_path: Path) -> None:
    reference, _ = published
    pull(reference, tmp_path / "first")
    (tmp_path / "first" / "config.json").write_text("changed by its owner")
    pull(reference, tmp_path / "second")
    assert directory_problems(tmp_path / "second") == []


@pytest.mark.parametrize("position", [0, 1500, 2999])
def test_a_flipped_bit_in_a_blob_is_refused_by_name(
    published: tuple[Reference, Release], registry: LocalRegistry, tmp_path: Path, position: int
) -> None:
    reference, release = published
    entry = next(entry for entry in release.entries if entry.name == "model-1.safetensors")
    blob = registry.blob(entry.sha256)
    data = bytearray(blob.read_bytes())
    data[position] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(Damaged, match=r"model-1\.safetensors is damaged"):
        pull(reference, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists() and not list(tmp_path.glob(".pulled*"))
    assert "model-1.safetensors" in reference_problems(reference, tmp_path)[0]


def test_swapped_and_missing_blobs_are_refused_by_name(
    published: tuple[Reference, Release], registry: LocalRegistry, tmp_path: Path
) -> None:
    reference, release = published
    first, second = (registry.blob(e.sha256) for e in release.entries if e.name.startswith("model-"))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    registry.blob(next(e.sha256 for e in release.entries if e.name == "config.json")).unlink()
    with pytest.raises(Damaged) as caught:
        pull(reference, tmp_path / "pulled")
    assert all(name in str(caught.value) for name in ("model-0.safetensors", "model-1.safetensors", "config.json"))
    assert "README.md is" not in str(caught.value)


def _plant(registry: LocalRegistry, release: Release, files: dict[str, bytes], **renamed: str) -> Reference:
    """Put a hand-made release into the registry, as an attacker with write access would."""
    entries = [*release.entries, *(Entry.of_data(name, data, "artifact") for name, data in files.items())]
    registry.push("tiny", entries)
    manifest = manifest_bytes(entries, {})
    for old, new in renamed.items():
        manifest = manifest.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    digest = registry.put("tiny", manifest, entries)
    return registry.reference("tiny", "latest", digest)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/../../x", "README.MD", ".netrc", "release.json", "a\\\\b", "sub/../../x", "CON"]
)
def test_a_list_with_a_hostile_name_is_refused(
    published: tuple[Reference, Release], registry: LocalRegistry, tmp_path: Path, name: str
) -> None:
    reference = _plant(registry, published[1], {"planted": b"x"}, planted=name)
    for attempt in (
        lambda: pull(reference, tmp_path / "deep" / "pulled"),
        lambda: _raise(reference_problems(reference, tmp_path)),
    ):
        with pytest.raises(Damaged, match=r"release\.json"):
            attempt()
    assert not (tmp_path / "deep").exists() and not (tmp_path / "x").exists()


def _raise(problems: list[str]) -> None:
    raise Damaged("; ".join(problems)) if problems else AssertionError("no problem found")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_whatever_it_is_called(
    published: tuple[Reference, Release], registry: LocalRegistry, tmp_path: Path, protocol: int
) -> None:
    reference = _plant(registry, published[1], {"extra.json": pickle.dumps(_Evil(), protocol), "model.pkl": b"harmless"})
    with pytest.raises(Damaged) as caught:
        pull(reference, tmp_path / "pulled")
    assert "extra.json: a pickle by its content" in str(caught.value) and "model.pkl: a pickle by its name" in str(caught.value)
    assert len(reference_problems(reference, tmp_path)) == 2
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("change", ["added", "other sums", "other manifest", "no sums"])
def test_lists_of_hashes_that_differ_are_refused(
    published: tuple[Reference, Release], registry: LocalRegistry, tmp_path: Path, change: str
) -> None:
    """A release.json that was made anew around changed content, beside lists that were not."""
    entries = {entry.name: entry for entry in published[1].entries}
    other = Entry.of_data("config.json", b"{}", "artifact")
    if change == "added":
        entries["new.json"] = Entry.of_data("new.json", b"{}", "report")
    elif change == "other sums":
        entries["config.json"] = other
    elif change == "no sums":
        del entries["SHA256SUMS"]
    else:
        old, sums = entries["config.json"], entries["SHA256SUMS"].data or b""
        entries["config.json"] = other
        entries["SHA256SUMS"] = Entry.of_data("SHA256SUMS", sums.replace(old.sha256.encode(), other.sha256.encode()), "sums")
    registry.push("tiny", list(entries.values()))
    manifest = manifest_bytes(list(entries.values()), {})
    reference = registry.reference("tiny", "latest", registry.put("tiny", manifest, list(entries.values())))
    said = {"added": "new.json: SHA256SUMS and", "no sums": "SHA256SUMS"}.get(change, "config.json: ")
    with pytest.raises(Damaged, match=said):
        pull(reference, tmp_path / "pulled")
    assert said in reference_problems(reference, tmp_path)[0]


def test_every_change_of_a_pulled_directory_is_found(published: tuple[Reference, Release], tmp_path: Path) -> None:
    folder = tmp_path / "pulled"
    pull(published[0], folder)
    data = bytearray((folder / "model-0.safetensors").read_bytes())
    data[7] ^= 16
    (folder / "model-0.safetensors").write_bytes(data)
    (folder / "config.json").unlink()
    (folder / "README.md").write_text("# Another")
    (folder / "extra.py").write_text("print()")
    problems = directory_problems(folder)
    assert len(problems) == 4
    for said in ("model-0.safetensors: changed", "config.json: missing", "README.md: 9 bytes, not", "extra.py: not listed"):
        assert any(problem.startswith(said) for problem in problems), said
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("manifest.json")
    assert "'tokenizer.json': a symbolic link" in directory_problems(folder)[0]
    (folder / RELEASE).unlink()
    with pytest.raises(InputError, match=r"has no release\.json"):
        directory_problems(folder)


def test_a_pull_that_was_killed_leaves_nothing_the_next_one_keeps(published: tuple[Reference, Release], tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover, others = tmp_path / f".pulled.tmp-{dead.pid}", tmp_path / ".pulled.tmp-1"
    for folder in (leftover, others):
        folder.mkdir()
        (folder / "half").write_text("")
    pull(published[0], tmp_path / "pulled")
    assert not leftover.exists() and others.exists()  # process 1 lives


def test_a_release_is_the_same_bytes_every_time(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    extras = {"b.md": ("report", b"b"), "README.md": ("card", b"a")}
    first = assemble(artifact, extras, {"name": "x", "gate": {"passed": True}})
    again = assemble(artifact, dict(reversed(list(extras.items()))), {"gate": {"passed": True}, "name": "x"})
    assert (first.digest, first.manifest) == (again.digest, again.manifest)
    assert first.digest == "sha256:" + hashlib.sha256(first.manifest).hexdigest()
    parsed = parse_release(first.manifest, "here")
    assert [(e.name, e.sha256, e.size, e.role) for e in parsed.entries] == [
        (e.name, e.sha256, e.size, e.role) for e in first.entries
    ]
    assert {entry.role for entry in parsed.entries} == {"artifact", "manifest", "report", "card", "sums"}


def test_signatures_sign_the_sums_and_are_no_part_of_them(make_artifact: MakeArtifact) -> None:
    release = assemble(make_artifact(), {}, {}, sign=lambda sums: {"SHA256SUMS.sig": hashlib.sha256(sums).digest()})
    data = {entry.name: entry.data for entry in release.entries}
    assert data["SHA256SUMS.sig"] == hashlib.sha256(data["SHA256SUMS"] or b"").digest()
    assert b"SHA256SUMS" not in (data["SHA256SUMS"] or b"")


def test_an_artifact_with_a_link_a_pickle_or_a_secret_is_not_released(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact()
    (artifact / "stray.json").write_text("{}")
    with pytest.raises(Damaged, match=r"'stray\.json': not listed"):
        assemble(artifact, {}, {})
    (artifact / "stray.json").unlink()
    weights = (artifact / "model-0.safetensors").read_bytes()
    (artifact / "model-0.safetensors").write_bytes(pickle.dumps(_Evil(), 4))
    with pytest.raises(Damaged, match=r"model-0\.safetensors: a pickle by its content"):
        assemble(artifact, {}, {})
    (artifact / "model-0.safetensors").unlink()
    with pytest.raises(Damaged, match=r"'model-0\.safetensors': missing"):
        assemble(artifact, {}, {})
    (artifact / "model-0.safetensors").write_bytes(weights)
    (artifact / "link.json").symlink_to("config.json")
    with pytest.raises(Damaged, match=r"link\.json"):
        assemble(artifact, {}, {})
    (artifact / "link.json").unlink()
    monkeypatch.setenv("HF_TOKEN", "planted-token-value")
    assemble(artifact, {}, {})
    with pytest.raises(InputError, match=r"^README\.md holds the value of one of the environment's secrets") as caught:
        assemble(artifact, {"README.md": ("card", b"use planted-token-value to log in")}, {})
    assert "planted-token-value" not in str(caught.value)
    with pytest.raises(InputError, match=r"release\.json would hold a secret"):
        assemble(artifact, {}, {"name": "planted-token-value"})
    (artifact / "config.json").write_text('{"note": "planted-token-value"}')
    with pytest.raises(InputError, match=r"^config\.json holds"):
        assemble(artifact, {}, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.update(kind="x"), "not a release's manifest"),
        (lambda value: value.update(schema=2), "schema 2"),
        (lambda value: value.update(files={}), "lists no files"),
        (lambda value: value["files"].update({"x": {"sha256": "00", "bytes": 1, "role": "a"}}), "without a sha256"),
        (lambda value: value["files"].update({"x": {"sha256": "0" * 64, "bytes": -1, "role": "a"}}), "a size in bytes"),
        (lambda value: value["files"].update({"x": {"sha256": "0" * 64, "bytes": True, "role": "a"}}), "a size in bytes"),
        (lambda value: value["files"].update({"x": []}), "without a sha256"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(make_artifact: MakeArtifact, change: Callable[[Any], None], said: str) -> None:
    value = json.loads(assemble(make_artifact(), {}, {}).manifest)
    change(value)
    with pytest.raises(Damaged, match=said):
        parse_release(json.dumps(value).encode(), "here")


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"{", b'{"kind": 1, "kind": 2}', b"[" * 100_000])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(Damaged, match=r"here: release\.json"):
        parse_release(text, "here")


def test_figures_of_other_bytes_are_not_published(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    record_evaluation(artifact, {"ppl": 10.0})
    assert "evaluation" in {entry.role for entry in assemble(artifact, {}, {}).entries}
    (artifact / "evaluation.json").write_text('{"artifact_fingerprint": "0"}')
    with pytest.raises(InputError, match="of other bytes"):
        assemble(artifact, {}, {})


def test_a_pulled_artifact_is_still_an_artifact(registry: LocalRegistry, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    record_evaluation(artifact, {"ppl": 10.0})
    extras = {"README.md": ("card", b"# Tiny"), "report.json": ("report", b"{}")}
    reference, _ = publish(registry, "tiny", "latest", assemble(artifact, extras, {}))
    pull(reference, tmp_path / "pulled")
    assert artifact_problems(tmp_path / "pulled") == []
    assert fingerprint(tmp_path / "pulled") == fingerprint(artifact)
    # It can be published again, with other files beside it.
    again = assemble(tmp_path / "pulled", {"README.md": ("card", b"# Other")}, {})
    assert {entry.name for entry in again.entries} >= {"README.md", "evaluation.json", "manifest.json"}
    assert "report.json" not in {entry.name for entry in again.entries}
    (tmp_path / "pulled" / "stray.py").write_text("")
    assert artifact_problems(tmp_path / "pulled") == ["stray.py: not listed in manifest.json"]


def test_a_release_that_is_not_there(registry: LocalRegistry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no tags"):
        pull(registry.reference("tiny", "latest"), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
