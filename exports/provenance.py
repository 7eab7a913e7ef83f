"""Where an artifact came from, in the form that supply-chain tools read: an in-toto statement with SLSA provenance.

The formats are https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1. It says nothing that the artifact's
``manifest.json`` does not say (but this project's version), and has no dates and no machine's names, so that equal artifacts
have equal provenance. It is one of the release's files: SHA256SUMS lists it, and a signature of that covers it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:quantize:artifact:v1"
BUILDER = "urn:quantize:quantize"
PROVENANCE = "provenance.json"


def provenance(manifest: Mapping[str, Any]) -> bytes:
    """The statement about an artifact, from its manifest: canonical JSON, UTF-8.

    Subjects are the artifact's files. Materials (``resolvedDependencies``) are the base checkpoint, by the hash over its files'
    hashes, and the calibration text, where there was one. The recipe, the solver's options and the seed are the parameters;
    the builder's version, that of this project as it publishes, comes with those of the libraries.
    """
    versions = {"quantize": metadata.version("quantize"), **(manifest.get("versions") or {})}
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"name": manifest.get("name"), "recipe": manifest.get("recipe")},
            "internalParameters": {key: manifest.get(key) for key in ("container", "solver", "grid", "quality", "seed")},
            "resolvedDependencies": _materials(manifest),
        },
        "runDetails": {"builder": {"id": BUILDER, "version": {key: str(value) for key, value in versions.items()}}},
    }
    value = {
        "_type": STATEMENT,
        "subject": _subjects(manifest),
        "predicateType": PREDICATE,
        "predicate": predicate,
    }
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def provenance_problems(statement: bytes, manifest: Mapping[str, Any]) -> list[str]:
    """Where a release's provenance is about another artifact than the one beside it; empty: nowhere."""
    try:
        value = json.loads(statement)
        subjects = {each["name"]: each["digest"]["sha256"] for each in value["subject"]}
        kind = (value["_type"], value["predicateType"])
        materials = value["predicate"]["buildDefinition"]["resolvedDependencies"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return [f"{PROVENANCE}: no in-toto statement"]
    if kind != (STATEMENT, PREDICATE):
        return [f"{PROVENANCE}: not SLSA provenance, version 1"]
    problems = []
    if subjects != {each["name"]: each["digest"]["sha256"] for each in _subjects(manifest)}:
        problems.append(f"{PROVENANCE}: its subjects are not the files that manifest.json lists")
    if materials != _materials(manifest):
        problems.append(f"{PROVENANCE}: its materials are not those that manifest.json names")
    return problems


def _subjects(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "digest": {"sha256": record["sha256"]}} for name, record in sorted(manifest["files"].items())]


def _materials(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    base, calibration = manifest.get("base") or {}, manifest.get("calibration") or {}
    found = []
    if base.get("sha256"):
        found.append({"name": f"checkpoint {base.get('name')}", "digest": {"sha256": base["sha256"]}})
    if calibration.get("text_sha256"):
        found.append(
            {"name": f"calibration text {calibration.get('source')}", "digest": {"sha256": calibration["text_sha256"]}}
        )
    return found
