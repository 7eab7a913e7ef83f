"""The publish stage: what a finished run puts into a registry, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports import minisign, verify
from exports.registry.local import connect
from exports.registry.names import parse_reference
from exports.registry.transfer import directory_problems, publish, pull, read_release
from exports.registry.upkeep import registry_problems
from exports.releasing import build_release
from quantize import pipeline
from quantize.config import EvalConfig
from quantize.files import write_json
from quantize.keys import StepKeys
from quantize.manifest import StepRecord

RECIPE = """# @package _global_
variants:
  fp16: {solver: {name: none}, container: safetensors}
  INT8: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}, container: compressed-tensors}
"""
Go = Callable[..., list[str]]


@pytest.fixture
def go(
    tmp_path: Path,
    small_run: list[str],
    run_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Go:
    """``go("key=value", ..., recipe=RECIPE, code=0)``: run and publish into ``tmp_path / "registry"``; the references printed.

    What evaluation would measure is made up: it takes a process for each variant, and is not what these tests are about.
    """

    def evaluate(self: Any, name: str, key: str, record: StepRecord) -> None:
        protocol = {"text": "t.txt", "windows": 2}
        record.result = {
            "ppl": 300.0,
            "consumer": "x",
            "compute_dtype": "float32",
            "protocol": protocol,
            "peak_rss_bytes": 2**20,
        }
        record.files = [self.run.work("evaluate", f"{name}.json")]
        write_json(record.files[0], record.result)

    monkeypatch.setattr(pipeline._Pipeline, "_evaluate", evaluate)
    monkeypatch.setattr("eval.report.render_chart", lambda report: b"\x89PNG, drawn elsewhere")

    def run(*arguments: str, recipe: str = RECIPE, code: int = 0) -> list[str]:
        settings = ["publish=local", f"publish.location={tmp_path / 'registry'}", "publish.name=tiny"]
        run_recipe(tmp_path, recipe, *small_run, "eval.divergence=false", *settings, *arguments, code=code)
        printed = capsys.readouterr()
        lines = printed.out.splitlines() if code == 0 else printed.err.splitlines()
        return [line.removeprefix("published: ") for line in lines if line.startswith(("published: ", "error: "))]

    return run


def test_a_run_ends_in_the_registry_and_what_is_pulled_is_its_artifact(go: Go, tmp_path: Path) -> None:
    references = go()
    registry = connect("local", str(tmp_path / "registry"))
    assert [reference.partition("@")[0] for reference in references] == [
        f"local:{tmp_path / 'registry'}//tiny-fp16:latest",
        f"local:{tmp_path / 'registry'}//tiny-int8:latest",
    ]
    assert registry_problems(registry) == []
    for reference, variant in zip(references, ("fp16", "INT8"), strict=True):
        release = pull(parse_reference(reference), tmp_path / variant)
        assert directory_problems(tmp_path / variant) == []
        artifact = tmp_path / "run" / "variants" / variant
        for path in artifact.rglob("*"):
            assert (tmp_path / variant / path.relative_to(artifact)).read_bytes() == path.read_bytes()
        assert {entry.role for entry in release.entries} == {
            *("artifact", "manifest", "evaluation", "recipe", "report", "card", "sums", "provenance")
        }
        assert release.facts["name"] == f"tiny-{variant.lower()}" and release.facts["gate"] is None
    assert "publish" not in json.loads((tmp_path / "run" / "manifest.json").read_text())["recipe"]


def test_again_nothing_is_written_and_of_one_changed_variant_only_that(go: Go, tmp_path: Path) -> None:
    first = go()
    blobs = {path: path.stat().st_ino for path in (tmp_path / "registry" / "blobs").rglob("*/*/*")}
    mark = (tmp_path / "run" / "manifest.json").stat().st_mtime_ns
    assert go() == first
    assert {path: path.stat().st_ino for path in (tmp_path / "registry" / "blobs").rglob("*/*/*")} == blobs
    assert (tmp_path / "run" / "manifest.json").stat().st_mtime_ns == mark
    second = go(recipe=RECIPE.replace("group_size: -1", "group_size: 32"))
    assert second[0] == first[0] and second[1] != first[1]
    new = {path.name for path in (tmp_path / "registry" / "blobs").rglob("*/*/*")} - {path.name for path in blobs}
    release = read_release(parse_reference(second[1]))[2]
    assert new <= {entry.sha256 for entry in release.entries} | {release.digest.removeprefix("sha256:")}
    assert not any(entry.sha256 in new for entry in release.entries if entry.name == "tokenizer.json")


def test_a_registry_that_was_lost_is_filled_again_and_a_newer_release_is_left_alone(go: Go, tmp_path: Path) -> None:
    first = go()
    (tmp_path / "registry").rename(tmp_path / "lost")
    assert go() == first
    registry = connect("local", str(tmp_path / "registry"))
    registry.remove_tag("tiny-fp16", "latest")
    assert go() == first and registry.tags("tiny-fp16")
    newer = build_release(tmp_path / "run" / "variants" / "INT8", "tiny-int8", gate={"passed": True})
    publish(registry, "tiny-int8", "latest", newer)
    assert go() == first and registry.tags("tiny-int8") == {"latest": newer.digest}


def test_what_failed_its_gate_is_published_by_force_only(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"passed": False, "checks": [{"name": "kld_mean"}]}
    monkeypatch.setattr(StepKeys, "gate_result", lambda self, name: failed if name == "INT8" else None)
    registry = connect("local", str(tmp_path / "registry"))
    assert [parse_reference(each).name for each in go()] == ["tiny-fp16"]
    assert connect("local", registry.location).names() == ["tiny-fp16"]
    _, second = go("publish.force=true")
    release = read_release(parse_reference(second))[2]
    assert release.facts["forced"] is True and release.facts["gate"] == {"passed": False}
    assert "gate.json" in {entry.name for entry in release.entries}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("publish.registry=ftp", "publish.registry=ftp is unknown; use local"),
        ("publish.location=null", "needs publish.location"),
        ("publish.registry=oci", "HOST or HOST:PORT"),
        ("publish.registry=mlflow", "http://HOST:PORT"),
        ("publish.registry=hub", "hub has no location"),
        ("publish.name=Tiny/../x", "not allowed"),
        ("publish.tag=.x", "the tag '.x' is not allowed"),
        ("publish.sign_key=/nowhere/key", "publish.sign_key: /nowhere/key is no minisign secret key"),
    ],
)
def test_a_publish_that_cannot_be_is_refused_before_anything_runs(go: Go, tmp_path: Path, argument: str, said: str) -> None:
    (error,) = go(argument, code=2)
    assert said in error
    assert not (tmp_path / "run" / "manifest.json").exists() and not (tmp_path / "registry").exists()


def test_what_the_stage_signs_is_verified_and_a_new_key_signs_again(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINISIGN_PASSWORD", raising=False)
    for name, password in (("first", None), ("second", "planted-pass-word")):
        minisign.generate(tmp_path / name, password)
    (tmp_path / "key").write_bytes((tmp_path / "first").read_bytes())
    first = go(f"publish.sign_key={tmp_path / 'key'}")
    assert [verify.main([each, "--public-key", str(tmp_path / "first.pub")]) for each in first] == [0, 0]
    assert verify.main([first[0], "--public-key", str(tmp_path / "second.pub")]) == 3
    assert go(f"publish.sign_key={tmp_path / 'key'}") == first
    (tmp_path / "key").write_bytes((tmp_path / "second").read_bytes())
    (error,) = go(f"publish.sign_key={tmp_path / 'key'}", code=2)
    assert "publish.sign_key: " in error and "set MINISIGN_PASSWORD" in error
    monkeypatch.setenv("MINISIGN_PASSWORD", "planted-pass-word")
    second = go(f"publish.sign_key={tmp_path / 'key'}")
    assert [verify.main([each, "--public-key", str(tmp_path / "second.pub")]) for each in second] == [0, 0]
    for file in (tmp_path / "registry").rglob("*"):
        assert file.is_dir() or b"planted-pass-word" not in file.read_bytes()


def test_two_variants_of_one_name_are_refused(go: Go) -> None:
    (error,) = go(recipe=RECIPE + "  int8: {solver: {name: none}, container: safetensors}\n", code=2)
    assert "would be published under one name, int8" in error


def test_without_a_registry_nothing_is_published(go: Go, tmp_path: Path) -> None:
    assert go("publish=none", "publish.location=null") == []
    assert not (tmp_path / "registry").exists()


def test_publishing_alone_needs_the_report(go: Go) -> None:
    (error,) = go("stages=[publish]", code=2)
    assert "no finished load" in error
    go("stages=[load,quantize,export,evaluate]")
    (error,) = go("stages=[publish]", code=2)
    assert "no finished report" in error
    go("stages=[report]")
    assert len(go("stages=[publish]")) == 2


def test_a_planted_secret_comes_out_nowhere(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the publish settings, as part of a path, and so in references, messages, the recipe and the run's manifest."""
    secret = "planted-Secret-0123"
    monkeypatch.setenv("HF_TOKEN", secret)
    place = tmp_path / secret
    (reference, _) = go(f"publish.location={place}")
    assert reference.startswith(f"local:{tmp_path}/***//tiny-fp16")
    written = [path for folder in ("run", secret) for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [str(path) for path in written if secret.encode() in path.read_bytes()] == []
    (place / "registry.json").write_text("{}")
    (error,) = go(f"publish.location={place}", code=2)
    assert "***" in error and secret not in error


@pytest.mark.slow
def test_a_pulled_artifact_is_measured_as_the_one_that_was_published(
    tmp_path: Path, small_run: list[str], run_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from eval.perplexity import evaluate_artifact

    run_recipe(tmp_path, RECIPE, *small_run, "publish=local", f"publish.location={tmp_path / 'registry'}")
    references = [line for line in capsys.readouterr().out.splitlines() if line.startswith("published: ")]
    text = next(argument for argument in small_run if argument.startswith("eval.text=")).removeprefix("eval.text=")
    for line in references:
        reference = parse_reference(line.removeprefix("published: "))
        pull(reference, tmp_path / reference.name)
        measured = json.loads((tmp_path / reference.name / "evaluation.json").read_text())
        again = evaluate_artifact(tmp_path / reference.name, EvalConfig(text=text, windows=2, seq_len=64))
        # The same bytes; another process may sum with another number of threads.
        assert again["ppl"] == pytest.approx(measured["ppl"], rel=1e-5)
        assert directory_problems(tmp_path / reference.name) == []
