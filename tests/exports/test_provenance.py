"""Provenance: an in-toto statement that says what the manifest says, and one that does not is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exports.provenance import PROVENANCE, provenance, provenance_problems
from exports.registry.local import connect
from exports.registry.release import assemble
from exports.registry.transfer import directory_problems, publish, pull, reference_problems
from exports.releasing import build_release
from quantize.artifact import read_manifest, write_manifest

ABOUT: dict[str, Any] = {
    "name": "tiny",
    "container": "gptq",
    "solver": {"name": "gptq", "bits": 4},
    "grid": None,
    "bits": 4,
    "bits_per_weight": 4.5,
    "size_bytes": 64,
    "base": {"name": "base", "license": "apache-2.0", "sha256": "1" * 64},
    "recipe": {"model": {"path": "base"}},
    "calibration": {"source": "builtin", "text_sha256": "2" * 64},
    "seed": 0,
    "versions": {"quantize": "0.1.0", "torch": "2"},
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(64))
    (folder / "config.json").write_text("{}")
    write_manifest(folder, ABOUT)
    return folder


def test_it_names_the_files_the_checkpoint_the_text_and_the_builder(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    statement = json.loads(provenance(manifest))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert subjects == {name: record["sha256"] for name, record in manifest["files"].items()} and len(subjects) == 2
    build = statement["predicate"]["buildDefinition"]
    assert [each["digest"]["sha256"] for each in build["resolvedDependencies"]] == ["1" * 64, "2" * 64]
    assert build["externalParameters"]["recipe"] == ABOUT["recipe"] and build["internalParameters"]["seed"] == 0
    assert statement["predicate"]["runDetails"]["builder"]["version"]["quantize"] == "0.1.0"
    assert provenance(manifest) == provenance(json.loads(json.dumps(manifest)))


def test_without_calibration_there_is_one_material(artifact: Path) -> None:
    statement = json.loads(provenance({**read_manifest(artifact), "calibration": None}))
    assert len(statement["predicate"]["buildDefinition"]["resolvedDependencies"]) == 1


def test_a_release_has_it_and_one_of_another_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    registry = connect("local", str(tmp_path / "registry"))
    reference, release = (
        publish(registry, "tiny", "latest", build_release(artifact, "tiny"))[0],
        build_release(artifact, "tiny"),
    )
    assert {entry.name: entry.role for entry in release.entries}[PROVENANCE] == "provenance"
    pull(reference, tmp_path / "pulled")
    assert directory_problems(tmp_path / "pulled") == [] and reference_problems(reference, tmp_path) == []
    manifest = read_manifest(artifact)
    for change, said in (
        ({**manifest, "files": {"x": {"sha256": "3" * 64, "bytes": 1}}}, "subjects"),
        ({**manifest, "base": {"name": "other", "sha256": "4" * 64}}, "materials"),
    ):
        planted = assemble(artifact, {PROVENANCE: ("provenance", provenance(change))}, {})
        reference, _ = publish(registry, "tiny", said, planted)
        assert f"its {said} are not" in reference_problems(reference, tmp_path)[0]


@pytest.mark.parametrize("statement", [b"", b"[]", b"{}", b'{"subject": [{}]}', b"\xff"])
def test_what_is_no_statement_is_told(statement: bytes, artifact: Path) -> None:
    assert "no in-toto statement" in provenance_problems(statement, read_manifest(artifact))[0]
