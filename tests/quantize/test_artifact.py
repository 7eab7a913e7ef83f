"""Artifact manifests: what they say, and that nothing can be done to an artifact's files without it being told."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from quantize.artifact import (
    EVALUATION,
    MANIFEST,
    fingerprint,
    is_pickle,
    problems,
    read_evaluation,
    read_manifest,
    record_evaluation,
    write_manifest,
)
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.lineage import portable

DESCRIPTION: dict[str, Any] = {
    "name": "int4",
    "container": "gptq",
    "solver": {"name": "rtn"},
    "bits": 4,
    "bits_per_weight": 4.5,
    "size_bytes": 128,
    "base": {"name": "base", "license": None, "sha256": "0" * 64},
    "recipe": {},
    "versions": {},
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A directory with a weights file, a config and a file in a folder, and its manifest."""
    folder = tmp_path / "artifact"
    (folder / "more").mkdir(parents=True)
    save_file({"weight": torch.arange(16.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}\n")
    (folder / "more" / "vocab.txt").write_text("a\nb\n")
    write_manifest(folder, DESCRIPTION)
    return folder


def test_the_manifest_lists_every_file_and_nothing_is_wrong(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert list(manifest["files"]) == ["config.json", "model.safetensors", "more/vocab.txt"]
    assert manifest["files"]["config.json"]["bytes"] == 3
    assert manifest["fingerprint"] == fingerprint(artifact)
    assert problems(artifact) == []


def test_equal_artifacts_have_equal_manifests(artifact: Path) -> None:
    first = (artifact / MANIFEST).read_bytes()
    os.utime(artifact / "config.json", (0, 0))
    write_manifest(artifact, DESCRIPTION)
    assert (artifact / MANIFEST).read_bytes() == first


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def _list_outside(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../elsewhere"] = {"sha256": "0" * 64, "bytes": 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (_flip, r"model.safetensors: changed \(other bytes of the same number\)"),
    (lambda folder: (folder / "config.json").write_text("{ }\n"), r"config.json: changed \(4 bytes instead of 3\)"),
    (lambda folder: (folder / "more" / "vocab.txt").unlink(), r"more/vocab.txt: missing"),
    (lambda folder: (folder / "extra.json").write_text("{}"), r"extra.json: not listed in manifest.json"),
    (lambda folder: (folder / "more" / MANIFEST).write_text("{}"), r"more/manifest.json: not listed"),
    (_link, r"config.json: a link"),
    (lambda folder: os.mkfifo(folder / "pipe"), r"pipe: neither a file nor a directory"),
    (_list_outside, r"\.\./elsewhere: listed, but leads outside"),
    (lambda folder: (folder / "x.json").write_bytes(pickle.dumps({"a": [1]})), r"x.json: a pickle"),
    (lambda folder: (folder / "weights.bin").write_text("innocent"), r"weights.bin: a pickle"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_every_change_is_told(artifact: Path, change: Callable[[Path], object], told: str) -> None:
    change(artifact)
    assert any(re.match(told, line) for line in problems(artifact)), problems(artifact)


def test_a_manifest_whose_hashes_were_changed_with_the_file_is_told(artifact: Path) -> None:
    before = read_manifest(artifact)
    (artifact / "config.json").write_text("{ }\n")
    write_manifest(artifact, DESCRIPTION)
    forged = read_manifest(artifact) | {"fingerprint": before["fingerprint"]}
    (artifact / MANIFEST).write_text(json.dumps(forged))
    assert problems(artifact) == ["manifest.json: its fingerprint is not that of the files it lists"]


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.binary(max_size=64), min_size=1, max_size=4))
def test_the_fingerprint_is_that_of_names_and_bytes(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for name, data in files.items():
        (first / name).write_bytes(data)
    for name, data in reversed(files.items()):
        (second / name).write_bytes(data)
    assert fingerprint(first) == fingerprint(second)
    name = min(files)
    (second / name).write_bytes(files[name] + b"x")
    assert fingerprint(first) != fingerprint(second)
    (second / name).write_bytes(files[name])
    (second / name).rename(second / f"{name}.moved")
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_known_by_their_content(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "weights").write_bytes(pickle.dumps({"weights": [1.0, 2.0]}, protocol))
    assert is_pickle(tmp_path / "weights")
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([], protocol))
    (tmp_path / "archive").write_bytes(saved.getvalue())
    assert is_pickle(tmp_path / "archive")


@given(st.integers(0, 1500))
def test_no_safetensors_file_is_taken_for_a_pickle(tmp_path_factory: pytest.TempPathFactory, padding: int) -> None:
    # The header's length is the file's first bytes: some lengths look like the start of a pickle.
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(save({"w": torch.zeros(1)}, {"note": "x" * padding}))
    assert not is_pickle(path)


def test_no_safetensors_header_of_any_length_is_taken_for_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (0x0280, 0x280280, 0x5D0480, 0x950480):
        header = b"{" + b" " * (length - 2) + b"}"
        path.write_bytes(length.to_bytes(8, "little") + header)
        assert not is_pickle(path), hex(length)


def test_a_pickle_or_a_link_gets_no_manifest(artifact: Path) -> None:
    (artifact / "model.safetensors").write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="is a pickle"):
        write_manifest(artifact, DESCRIPTION)
    _link(artifact)
    with pytest.raises(InputError, match="is a link"):
        fingerprint(artifact)


def test_a_description_must_be_whole(artifact: Path) -> None:
    with pytest.raises(ValueError, match="lacks base, versions"):
        write_manifest(artifact, {key: value for key, value in DESCRIPTION.items() if key not in ("base", "versions")})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no manifest.json; export the artifact again"),
        ("{", "is damaged"),
        ("[]", "no JSON object but list"),
        ('{"schema": 1, "steps": {}}', "is a run's, not an artifact's"),
        ('{"schema": 2}', "is of schema 2"),
        ('{"schema": 1, "files": {"a": 1}, "fingerprint": ""}', "are malformed"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=words):
        read_manifest(tmp_path)


def test_figures_are_added_and_those_of_other_bytes_dropped(artifact: Path) -> None:
    assert read_evaluation(artifact) is None
    record_evaluation(artifact, {"ppl": 12.5})
    both = record_evaluation(artifact, {"speed": {"decode": 3.0}})
    assert both == {
        "ppl": 12.5,
        "divergence": None,
        "tasks": {},
        "speed": {"decode": 3.0},
        "artifact_fingerprint": fingerprint(artifact),
    }
    assert read_evaluation(artifact) == both
    assert problems(artifact) == []
    _flip(artifact)
    assert record_evaluation(artifact, {"ppl": 13.0})["speed"] is None


def test_a_damaged_record_is_written_anew(artifact: Path) -> None:
    (artifact / EVALUATION).write_text("{")
    with pytest.raises(InputError, match=r"evaluation.json is damaged"):
        read_evaluation(artifact)
    assert record_evaluation(artifact, {"ppl": 1.0})["ppl"] == 1.0


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", {}, "apache-2.0"),
        ("# Model without a head\n", {"license": "mit"}, "mit"),
        ("---\nlicense: [broken\n---\n", {}, None),
        ("---\nlicense: 3\n---\n", {}, None),
        (None, {}, None),
    ],
)
def test_the_licence_is_the_one_the_checkpoint_names(
    tiny_llama: Path, tmp_path: Path, card: str | None, config: dict[str, Any], expected: str | None
) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((tiny_llama / "config.json").read_text()), **config}))
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert open_checkpoint(str(tmp_path)).license() == expected


def test_paths_lose_their_folders_and_hub_ids_stay(tmp_path: Path) -> None:
    assert portable(str(tmp_path / "model")) == "model"
    assert portable("meta-llama/Llama-2-7b-hf@main") == "meta-llama/Llama-2-7b-hf@main"
