"""Artifacts side by side: names, columns that must not mix protocols, differences item by item, and what is written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from eval.compare import main
from eval.report import VariantResult, build_report, write_report
from quantize.artifact import EVALUATION, read_manifest

Say = Callable[..., tuple[int, str, str]]
RIGHT = np.arange(400) % 4 != 0


@pytest.fixture
def run(made: Any, tmp_path: Path) -> Path:
    """A run's folder with an unquantized variant and one of 4 bits, all figures measured."""
    folder = tmp_path / "run"
    fp16, int4 = folder / "variants" / "fp16", folder / "variants" / "int4"
    fingerprint = made.write_artifact(fp16, size=4000, solver="none", container="safetensors")
    made.write_artifact(int4, content=1)
    worse = RIGHT.copy()
    worse[np.flatnonzero(RIGHT)[:40]] = False
    made.record(fp16, **made.measured(9.8), tasks={"builtin": made.task(RIGHT)})
    made.record(int4, **made.measured(10.0, divergence=made.diverged_from(fingerprint)), tasks={"builtin": made.task(worse)})
    return folder


@pytest.fixture
def other(made: Any, tmp_path: Path, run: Path) -> Path:
    """An artifact made elsewhere, measured like those of the run."""
    folder = tmp_path / "elsewhere" / "int4"
    made.write_artifact(folder, size=1500, content=2)
    fingerprint = read_manifest(run / "variants" / "fp16")["fingerprint"]
    made.record(folder, **made.measured(10.5, divergence=made.diverged_from(fingerprint, kld_mean=0.05)))
    return folder


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Say:
    """``compare(argument, ...)``: exit code, standard output, standard error."""

    def say(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return say


def test_runs_and_artifacts_stand_in_one_table(run: Path, other: Path, compare: Say, tmp_path: Path) -> None:
    code, out, _ = compare(run, other, "--json", tmp_path / "all.json", "--markdown", tmp_path / "all.md")
    assert code == 0
    for text in ("fp16", "run/int4", "elsewhere/int4", "9.800", "10.500", "0.0500", "93.0 %", "+2.04 %", "-10.0 p="):
        assert text in out, text
    written = json.loads((tmp_path / "all.json").read_text())
    assert [artifact["name"] for artifact in written["artifacts"]] == ["fp16", "run/int4", "elsewhere/int4"]
    columns = {column["title"]: column["values"] for column in written["columns"]}
    assert columns["ppl"] == {"fp16": 9.8, "run/int4": 10.0, "elsewhere/int4": 10.5}
    assert columns["KLD"] == {"run/int4": 0.02, "elsewhere/int4": 0.05}
    rows = [line for line in (tmp_path / "all.md").read_text().split("\n") if line.startswith("| ")]
    assert len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    assert "text\\_sha256 " + "a" * 64 in (tmp_path / "all.md").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"protocol": {"window": 128}}, "ppl of fp16 and elsewhere/int4 was measured differently (window 64 and 128)"),
        ({"protocol": {"text_sha256": "c" * 64}}, "text_sha256 aaaaaaaaaaaa and cccccccccccc"),
        ({"protocol": {"bytes": 400}}, "bytes 500 and 400"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype float32 and bfloat16"),
    ],
)
def test_other_protocols_are_refused_or_set_apart(
    made: Any, run: Path, other: Path, compare: Say, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    made.record(other, **made.measured(10.5, **changes))
    code, out, err = compare(run, other, "--json", tmp_path / "all.json")
    assert (code, out, err.count("\n")) == (2, "", 1) and told in err
    assert not (tmp_path / "all.json").exists()
    assert compare(run, other, "--by-protocol", "--json", tmp_path / "all.json")[0] == 0
    columns = [column for column in json.loads((tmp_path / "all.json").read_text())["columns"] if column["figure"] == "ppl"]
    assert [set(column["values"]) for column in columns] == [{"fp16", "run/int4"}, {"elsewhere/int4"}]
    assert len({column["title"] for column in columns}) == 2


def test_every_protocol_gets_a_panel(made: Any, run: Path, other: Path, compare: Say, tmp_path: Path) -> None:
    made.record(other, **made.measured(10.5, protocol={"window": 128}))
    assert compare(run, other, "--by-protocol", "--png", tmp_path / "all.png")[0] == 0
    assert imread(tmp_path / "all.png").shape[:2] == (2 * 880, 1360)


def test_divergences_of_other_references_are_refused(made: Any, run: Path, other: Path, compare: Say) -> None:
    made.record(other, **made.measured(10.5, divergence=made.diverged_from("9" * 64)))
    code, _, err = compare(run, other)
    assert code == 2 and "reference artifact_fingerprint" in err


def test_scores_of_other_items_are_refused(made: Any, run: Path, other: Path, compare: Say) -> None:
    figures = json.loads((other / EVALUATION).read_text())
    made.record(other, **{**figures, "tasks": {"builtin": made.task(RIGHT, items="j" * 64)}})
    code, _, err = compare(run, other)
    assert code == 2 and "task builtin" in err and "items" in err


def test_figures_of_other_bytes_are_refused(run: Path, other: Path, compare: Say) -> None:
    figures = json.loads((other / EVALUATION).read_text())
    (other / EVALUATION).write_text(json.dumps({**figures, "artifact_fingerprint": "0" * 64}))
    code, _, err = compare(run, other)
    assert code == 2 and "other bytes" in err


def test_what_is_nothing_is_told(run: Path, compare: Say, tmp_path: Path) -> None:
    for path, told in ((tmp_path / "nowhere", "is no artifact"), (run, "named twice")):
        code, _, err = compare(run, path)
        assert code == 2 and told in err and err.count("\n") == 1
    (tmp_path / "report.json").write_text('{"variants": 3, "protocol": {}}')
    assert compare(tmp_path)[0] == 2
    (run / "variants" / "int4" / EVALUATION).write_text('{"ppl": ')
    assert compare(run)[0] == 2


def test_artifacts_without_figures_have_empty_cells(made: Any, tmp_path: Path, compare: Say) -> None:
    made.write_artifact(tmp_path / "new")
    code, out, _ = compare(tmp_path / "new")
    assert code == 0 and "new" in out and "ppl" not in out
    code, _, err = compare(tmp_path / "new", "--png", tmp_path / "new.png")
    assert code == 2 and "no artifact has one" in err


def test_a_diverged_artifact_is_shown_as_that(made: Any, run: Path, compare: Say, tmp_path: Path) -> None:
    figures = json.loads((run / "variants" / "int4" / EVALUATION).read_text())
    made.record(run / "variants" / "int4", **{**figures, "ppl": None})
    code, out, _ = compare(run, "--png", tmp_path / "all.png")
    assert code == 0 and "diverged" in out
    assert imread(io.BytesIO((tmp_path / "all.png").read_bytes())).shape[:2] == (880, 1360)


def test_a_report_alone_is_enough(made: Any, run: Path, compare: Say, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "solver": "gptq",
        "container": "gptq",
        "bits": 4,
        "bits_per_weight": 4.5,
        "size_bytes": 900,
        "compression": 4.0,
        "peak_rss_bytes": 1,
        "seconds": 1.0,
        "consumer": "transformers 5",
        "path": "variants/old",
        "command": "python",
    }
    results = [
        VariantResult(name="old", ppl=11.0, ppl_ratio=1.1, kld_mean=0.1, top1_agreement=0.8, **common),
        VariantResult(name="broken", ppl=float("inf"), ppl_ratio=None, kld_mean=None, top1_agreement=None, **common),
    ]
    protocol = {**made.measured()["protocol"], "compute dtype": "float32", "size": "files", "divergence": "from fp16"}
    write_report(build_report(results, model={"name": "tiny-llama"}, protocol=protocol, environment={}), tmp_path / "report")
    code, out, _ = compare(tmp_path / "report")
    assert code == 0 and "11.000" in out and "+10.00 %" in out and "diverged" in out
    # Perplexities of one protocol may meet those of artifacts; a divergence whose model is only named may not.
    code, _, err = compare(run, tmp_path / "report")
    assert code == 2 and err.startswith("error: ratio of int4 and old")
    code, out, _ = compare(run, tmp_path / "report", "--by-protocol")
    assert code == 0 and "11.000" in out
