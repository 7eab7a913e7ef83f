"""The gate inside a run: which variants it holds against which limits, exit code 3 after the report, and what is run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from quantize import pipeline
from quantize.artifact import read_evaluation, read_manifest
from quantize.files import write_json

RunRecipe = Callable[..., Path]
Cli = Callable[..., tuple[int, str, str]]
RECIPE = """# @package _global_
variants:
  fp16: {solver: {name: none}, container: safetensors}
  int8: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}, container: compressed-tensors}
  int4: {solver: {name: rtn}}
"""
KLD = {"int8": 0.001, "int4": 0.3}


def _evaluate(command: Sequence[str], evaluated: list[str]) -> SimpleNamespace:
    artifact, options = Path(command[3]), dict(zip(command[4::2], command[5::2], strict=False))
    evaluated.append(artifact.name)
    protocol = {"name": "windows", "text_sha256": "a", "window": 64, "windows": 2, "tokens": 126, "bytes": 500}
    figures: dict[str, Any] = {"ppl": 10.0, "consumer": "made up", "protocol": protocol, "compute_dtype": "float32"}
    figures |= {"peak_rss_bytes": 7, "divergence": None}
    if "--save-reference" in options:
        write_json(Path(options["--save-reference"]), "stored")
    elif "--reference" in options:
        kld = KLD[artifact.name]
        reference = {"name": "fp16", "artifact_fingerprint": "f", "ppl": 10.0, "top_k": 256, "tokens_sha256": "b"}
        figures["divergence"] = {"kld_mean": kld, "kld_p99": 9 * kld, "top1_agreement": 1 - kld, "tokens": 126}
        figures["divergence"]["reference"] = reference
    write_json(Path(options["--json"]), figures)
    return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture(scope="module")
def evaluated() -> Iterator[list[str]]:
    """Figures made up, for the consumers' imports take many seconds; the variants evaluated."""
    names: list[str] = []
    canned = SimpleNamespace(run=lambda command, **_: _evaluate(command, names), DEVNULL=None, PIPE=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "subprocess", canned)
        yield names


@pytest.fixture(scope="module")
def ungated(
    run_recipe: RunRecipe, small_run: list[str], tmp_path_factory: pytest.TempPathFactory, evaluated: list[str]
) -> Path:
    """A finished run without limits; copy it before going on with it."""
    folder = tmp_path_factory.mktemp("ungated")
    run_recipe(folder, RECIPE, *small_run)
    return folder


@pytest.fixture
def folder(ungated: Path, tmp_path: Path, evaluated: list[str]) -> Path:
    """A folder with a finished run without limits to go on with."""
    copied = shutil.copytree(ungated, tmp_path / "copied")
    evaluated.clear()
    return copied


def test_a_failed_gate_is_told_after_the_report(
    run_recipe: RunRecipe, small_run: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_recipe(folder, RECIPE, *small_run, "gate.kld_mean=0.05", code=3)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "error: int4: gate failed: kld_mean 0.3 (at most 0.05)"
    verdicts = json.loads((run / "gate.json").read_text())
    assert [(each["artifact"], each["passed"]) for each in verdicts["artifacts"]] == [("int8", True), ("int4", False)]
    assert [each["path"] for each in verdicts["artifacts"]] == ["variants/int8", "variants/int4"]
    assert len(ElementTree.parse(run / "gate.xml").getroot().findall("testsuite/testcase/failure")) == 1
    report = json.loads((run / "report.json").read_text())
    assert [row["gate"] for row in report["variants"]] == [None, "passed", "failed: kld_mean"]
    assert "| failed: kld\\_mean |" in (run / "report.md").read_text() and "failed: kld_mean" in captured.out
    steps = json.loads((run / "manifest.json").read_text())["steps"]
    assert steps["gate/int4"]["result"]["passed"] is False and "gate/fp16" not in steps


def test_a_finished_run_fails_again_and_does_nothing(
    run_recipe: RunRecipe, small_run: list[str], folder: Path, evaluated: list[str]
) -> None:
    arguments = (folder, RECIPE, *small_run)
    run = run_recipe(*arguments, "gate.kld_mean=0.05", code=3)
    written = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    run_recipe(*arguments, "gate.kld_mean=0.05", code=3)
    assert written == {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    # Another limit changes no artifact and no figure.
    manifests = {name: read_manifest(run / "variants" / name) for name in KLD}
    assert "gate" not in manifests["int4"]["recipe"]["variants"]["int4"]
    run_recipe(*arguments, "gate.kld_mean=0.05", "variants.int4.gate.kld_mean=0.5")
    assert evaluated == []
    assert manifests == {name: read_manifest(run / "variants" / name) for name in KLD}
    assert [row["gate"] for row in json.loads((run / "report.json").read_text())["variants"]] == [None, "passed", "passed"]
    run_recipe(*arguments)
    assert not (run / "gate.json").exists()
    assert [row["gate"] for row in json.loads((run / "report.json").read_text())["variants"]] == [None, None, None]


def test_figures_that_others_record_are_seen(run_recipe: RunRecipe, small_run: list[str], folder: Path) -> None:
    run = run_recipe(folder, RECIPE, *small_run, "gate.kld_p99=5")
    file = run / "variants" / "int4" / "evaluation.json"
    write_json(file, {**json.loads(file.read_text()), "artifact_fingerprint": "0" * 64})
    run_recipe(folder, RECIPE, *small_run, "gate.kld_p99=5", "stages=[gate]", code=3)
    run_recipe(folder, RECIPE, *small_run, "gate.kld_p99=5")  # the evaluate stage mends it


def test_speed_is_measured_where_it_is_limited(
    run_recipe: RunRecipe, small_run: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def speed(artifact: Path, baseline: Path | None, device: str) -> dict[str, Any]:
        assert baseline is not None and device == "cpu"
        asked.append((artifact.name, baseline.name))
        against = {"name": baseline.name, "artifact_fingerprint": read_manifest(baseline)["fingerprint"]}
        against |= {"decode_tokens_per_second": 10.0, "decode_ratio": 0.9}
        return {"decode_tokens_per_second": 9.0, "baseline": against}

    monkeypatch.setattr(pipeline, "speed_of", speed)
    arguments = (folder, RECIPE, *small_run, "gate.decode_ratio=0.8")
    run = run_recipe(*arguments)
    figures = read_evaluation(run / "variants" / "int8")
    assert figures is not None and figures["speed"]["decode_tokens_per_second"] == 9.0
    run_recipe(*arguments)
    assert asked == [("int8", "fp16"), ("int4", "fp16")]
    run_recipe(*arguments, "variants.int4.gate.decode_ratio=0.95", code=3)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["gate.kld_mean=-1"], "gate.kld_mean=-1.0 cannot be a limit, which is 0 and more; use 0.05, or null for none"),
        (["variants.int4.gate.top1_agreement=93"], "variants.int4.gate.top1_agreement=93.0 cannot be a limit"),
        (["gate.kld=1"], "gate"),
        (["gate.kld_mean=1", "~variants.fp16"], "compares with an unquantized variant, and the recipe has none"),
        (["gate.kld_mean=1", "eval.divergence=false"], "is measured with eval.divergence=true; it is false"),
        (["+gate.task_drop.piqa=0.01", "eval.tasks=[]"], "task_drop.piqa: eval.tasks=[] lacks it"),
    ],
)
def test_limits_that_cannot_be_are_refused_at_once(
    run_recipe: RunRecipe,
    small_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    told: str,
) -> None:
    run = run_recipe(tmp_path, RECIPE, *small_run, *settings, code=2)
    assert told in capsys.readouterr().err and not run.exists()


def test_what_failed_its_gate_is_not_published(run_recipe: RunRecipe, small_run: list[str], folder: Path) -> None:
    registry = ["publish=local", f"publish.location={folder / 'registry'}"]
    arguments = (folder, RECIPE, *small_run, *registry, "gate.kld_mean=0.05")
    run = run_recipe(*arguments, code=3)
    steps = json.loads((run / "manifest.json").read_text())["steps"]
    assert "publish/int8" in steps and "publish/fp16" in steps and "publish/int4" not in steps
