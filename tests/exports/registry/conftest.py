"""Small artifacts of random bytes, and registries to publish them to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from exports.registry.local import LocalRegistry, connect
from exports.registry.release import Release, assemble
from quantize.artifact import write_manifest

MakeArtifact = Callable[..., Path]
FACTS = {"name": "tiny-int4"}
DESCRIPTION = {
    "container": "gptq",
    "grid": None,
    "bits": 4,
    "bits_per_weight": 4.5,
    "base": {"name": "tiny", "license": "apache-2.0", "sha256": "0" * 64},
    "recipe": {},
    "versions": {},
}


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """``make_artifact(name="artifact", seed=0, size=3000, files=1)``: a directory laid out like an artifact's.

    The tokenizer is the same whatever the seed; weights and config follow it. ``manifest.json`` lists all of them.
    """

    def make(name: str = "artifact", seed: int = 0, size: int = 3000, files: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(files):
            weights = random.Random(f"{seed} {number}").randbytes(size)
            (folder / f"model-{number}.safetensors").write_bytes(weights)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "padding": "x" * 500}))
        solver = {"name": "gptq", "bits": 4}
        write_manifest(folder, {**DESCRIPTION, "name": name, "solver": solver, "size_bytes": files * size})
        return folder

    return make


@pytest.fixture
def make_release(make_artifact: MakeArtifact) -> Callable[..., Release]:
    """``make_release(name="artifact", seed=0, ...)``: a release of such an artifact, with a card."""

    def make(name: str = "artifact", **options: int) -> Release:
        artifact = make_artifact(name, **options)
        return assemble(artifact, {"README.md": ("card", f"# {name}\n".encode())}, FACTS)

    return make


@pytest.fixture
def registry(tmp_path: Path) -> LocalRegistry:
    """A local registry in a directory that does not exist yet."""
    return connect("local", str(tmp_path / "registry"))
