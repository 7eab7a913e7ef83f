"""The manifest: what counts as finished, what is written down, and what of a damaged one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantize.errors import InputError
from quantize.manifest import Manifest, peak_rss_bytes, reset_peak_rss, step_key, versions


def finish(directory: Path, step: str = "quantize/a", key: str = "k") -> list[Path]:
    """Record a step with two files."""
    files = [directory / "work" / name for name in ("one", "two")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"content of {file.name}")
    with Manifest(directory).recording(step, key) as record:
        record.files = files
        record.result = {"answer": 42}
    return files


def test_a_recorded_step_is_finished_for_its_key_alone(tmp_path: Path) -> None:
    finish(tmp_path)
    manifest = Manifest(tmp_path)
    assert manifest.finished("quantize/a", "k")
    assert not manifest.finished("quantize/a", "another")
    assert not manifest.finished("quantize/b", "k")
    assert manifest.result("quantize/a") == {"answer": 42}


def test_what_is_recorded(tmp_path: Path) -> None:
    finish(tmp_path)
    data = json.loads((tmp_path / "manifest.json").read_text())
    entry = data["steps"]["quantize/a"]
    assert set(entry) == {"key", "seconds", "peak_rss_bytes", "result", "files"}
    assert entry["peak_rss_bytes"] > 10 * 2**20
    assert list(entry["files"]) == ["work/one", "work/two"]
    assert entry["files"]["work/one"]["size"] == len("content of one")
    assert len(entry["files"]["work/one"]["sha256"]) == 64


@pytest.mark.parametrize("damage", ["content of ONE", "content of one and more", None])
def test_a_changed_file_makes_its_step_unfinished(tmp_path: Path, damage: str | None) -> None:
    first, _ = finish(tmp_path)
    if damage is None:
        first.unlink()
    else:
        first.write_text(damage)
    assert not Manifest(tmp_path).finished("quantize/a", "k")


def test_changed_files_of_a_step_are_discarded_and_the_rest_kept(tmp_path: Path) -> None:
    first, second = finish(tmp_path)
    first.write_text("content of ONE")
    Manifest(tmp_path).discard_changed("quantize/a", "another key")
    Manifest(tmp_path).discard_changed("quantize/b", "k")
    assert first.exists()
    Manifest(tmp_path).discard_changed("quantize/a", "k")
    assert not first.exists()
    assert second.exists()


def test_a_failed_step_leaves_no_trace(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    with pytest.raises(RuntimeError), manifest.recording("load", "k"):
        raise RuntimeError
    assert not manifest.finished("load", "k")
    assert not (tmp_path / "manifest.json").exists()


def test_time_spent_before_an_interruption_counts(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    with manifest.recording("load", "k") as record:
        record.earlier_seconds = 100.0
    assert 100 <= manifest.entry("load")["seconds"] < 101


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        "null",
        '{"schema": 0, "steps": {}}',
        '{"schema": 1}',
        '{"schema": 1, "steps": []}',
        '{"schema": 1, "steps": {"load": null}}',
        '{"schema": 1, "steps": {"load": {"key": "k"}}}',
        "\udcff",
    ],
)
def test_a_damaged_manifest_is_refused_with_a_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json .*(delete it|new output_dir)"):
        Manifest(tmp_path)


def test_step_keys_depend_on_every_part() -> None:
    keys = {step_key("load", [1]), step_key("load", [2]), step_key("calibrate", [1]), step_key("load", [1], None)}
    assert len(keys) == 4
    assert step_key("load", {"a": 1, "b": 2}) == step_key("load", {"b": 2, "a": 1})


def test_versions_name_what_artifacts_depend_on() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "platform", "transformers", "safetensors", "tokenizers"} <= found.keys()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be reset on Linux alone")
def test_peak_memory_is_of_the_step_and_not_of_the_process() -> None:
    before = peak_rss_bytes()
    block = torch.ones(32 * 2**20)  # 128 MiB
    during = peak_rss_bytes()
    del block
    reset_peak_rss()
    assert during >= before
    assert peak_rss_bytes() <= during - 100 * 2**20
