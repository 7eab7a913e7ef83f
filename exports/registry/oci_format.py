"""A release as an OCI artifact: an image manifest (OCI image specification 1.1) with ModelPack's media types (CNCF model-spec).

Every file is one layer, as it is, not archived: its digest is the file's sha256, so it is stored once and read by itself.
``release.json`` is a layer as well, and its digest is the release's. The layers' names are in the annotations of ModelPack
(``org.cncf.model.filepath``) and of ORAS (``org.opencontainers.image.title``), which unpack them under these names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from exports.registry.base import Damaged, Entry
from exports.registry.names import check_digest
from quantize.artifact import RELEASE
from quantize.errors import InputError

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
_PATH = "org.cncf.model.filepath"
_TITLE = "org.opencontainers.image.title"
_WEIGHTS = (".safetensors", ".gguf")


def layer_type(entry: Entry) -> str:
    """ModelPack's media type for a file: weights, what belongs to them (config, tokenizer), or documentation."""
    if entry.role == "artifact":
        return f"application/vnd.cncf.model.weight{'' if entry.name.endswith(_WEIGHTS) else '.config'}.v1.raw"
    return "application/vnd.cncf.model.doc.v1.raw"


def config_bytes(release: bytes, entries: Sequence[Entry]) -> bytes:
    """ModelPack's configuration: what the model is, from the facts of ``release.json``; canonical JSON without dates."""
    facts = json.loads(release)
    artifact, base = facts.get("artifact") or {}, facts.get("base") or {}
    container, license_ = artifact.get("container"), facts.get("license")
    weights = any(entry.name.endswith(".gguf") for entry in entries)
    value: dict[str, Any] = {
        "descriptor": {
            "name": facts.get("name"),
            "title": facts.get("name"),
            "family": base.get("name"),
            "licenses": [license_] if license_ else None,
        },
        "modelfs": {"type": "layers", "diffIds": [descriptor["digest"] for descriptor in _layers(release, entries)]},
        "config": {
            "format": "gguf" if weights else "safetensors",
            "precision": f"int{artifact['bits']}" if isinstance(artifact.get("bits"), int) else None,
            "quantization": artifact.get("solver") or container,
        },
    }
    for part in ("descriptor", "config"):
        value[part] = {key: each for key, each in value[part].items() if each is not None}
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def manifest(release: bytes, entries: Sequence[Entry]) -> tuple[bytes, Entry]:
    """The image manifest of a release, and its configuration as a blob to push. Equal releases have equal bytes."""
    config = Entry.of_data("config", config_bytes(release, entries), "config")
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": f"sha256:{config.sha256}", "size": config.size},
        "layers": _layers(release, entries),
    }
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), config


def release_digest(image: bytes, where: str) -> str:
    """The digest of the release that an image manifest carries.

    Raises:
        Damaged: it carries none; tells ``where``.
    """
    try:
        layers = json.loads(image)["layers"]
        found = [each["digest"] for each in layers if (each.get("annotations") or {}).get(_TITLE) == RELEASE]
        return check_digest(found[0])
    except (ValueError, LookupError, TypeError, AttributeError, InputError) as error:
        raise Damaged(f"{where} is no release of this project: its image manifest has no layer {RELEASE}") from error


def _layers(release: bytes, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    listed = Entry.of_data(RELEASE, release, "manifest")
    return [
        {
            "mediaType": layer_type(entry),
            "digest": f"sha256:{entry.sha256}",
            "size": entry.size,
            "annotations": {_PATH: entry.name, _TITLE: entry.name},
        }
        for entry in [*entries, listed]
    ]
