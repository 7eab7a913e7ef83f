"""The gate: every limit in both directions, what was not measured, changed bytes, exit codes and the files it writes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.figures import Subject, read_subject
from eval.gate import GATE_FAILED, main
from eval.gate_checks import FAILED, MINIMA, NOT_MEASURED, PASSED, Check, Verdict, judge
from eval.gate_output import as_json, from_json, render_junit, render_markdown
from quantize.artifact import EVALUATION, MANIFEST
from quantize.errors import InputError
from quantize.limits import GateConfig, check_limits, read_limits, set_limits

EVERYTHING = [
    "ppl_ratio=1.1",
    "kld_mean=0.05",
    "kld_p99=0.5",
    "top1_agreement=0.9",
    "task_drop.builtin=0.02",
    "size_bytes=2000",
    "size_ratio=0.5",
    "peak_rss_bytes=1000000000",
    "peak_rss_ratio=1.2",
    "decode_ratio=0.8",
]
RIGHT = np.arange(400) % 4 != 0


@pytest.fixture
def baseline(made: Any, tmp_path: Path) -> Path:
    """An unquantized artifact with all figures but a divergence."""
    folder = tmp_path / "fp16"
    made.write_artifact(folder, size=4000, solver="none", container="safetensors")
    made.record(folder, **made.measured(9.8), divergence=None, tasks={"builtin": made.task(RIGHT)})
    return folder


@pytest.fixture
def artifact(made: Any, tmp_path: Path, baseline: Path) -> Path:
    """A quantized one that is within all limits of ``EVERYTHING``."""
    folder = tmp_path / "int4"
    made.write_artifact(folder, content=1)
    fingerprint = read_subject(baseline).manifest["fingerprint"]
    speed = {
        "decode_tokens_per_second": 9.0,
        "baseline": {
            "name": "fp16",
            "artifact_fingerprint": fingerprint,
            "decode_tokens_per_second": 10.0,
            "decode_ratio": 0.9,
        },
    }
    figures = made.measured(10.0, divergence=made.diverged_from(fingerprint), speed=speed)
    made.record(folder, **figures, tasks={"builtin": made.task(RIGHT)})
    return folder


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gate(capsys: pytest.CaptureFixture[str]) -> Say:
    """``gate(argument, ...)``: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_within_all_limits_it_passes(artifact: Path, baseline: Path, gate: Say) -> None:
    code, out, err = gate(artifact, "--baseline", baseline, "--limits", *EVERYTHING)
    assert code == 0, out
    assert "int4: gate passed (12 checks)" in err
    for name in ("files", "figures", *GateConfig.__dataclass_fields__):
        assert name in out


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("ppl_ratio=1.02", 10.0 / 9.8),
        ("kld_mean=0.019", 0.02),
        ("kld_p99=0.19", 0.2),
        ("top1_agreement=0.94", 0.93),
        ("size_bytes=999", 1000),
        ("size_ratio=0.24", 0.25),
        ("peak_rss_bytes=499999999", 500_000_000),
        ("peak_rss_ratio=0.99", 1.0),
        ("decode_ratio=0.91", 0.9),
    ],
)
def test_each_limit_alone_fails_it(artifact: Path, baseline: Path, gate: Say, tmp_path: Path, limit: str, value: float) -> None:
    code, _, err = gate(artifact, "--baseline", baseline, "--limits", *EVERYTHING, limit, "--json", tmp_path / "gate.json")
    assert code == GATE_FAILED == 3
    written = json.loads((tmp_path / "gate.json").read_text())
    failed = [check for check in written["artifacts"][0]["checks"] if check["outcome"] != PASSED]
    assert [check["name"] for check in failed] == [limit.split("=")[0]]
    assert failed[0]["value"] == pytest.approx(value) and failed[0]["outcome"] == FAILED
    assert not written["passed"] and limit.split("=")[0] in err


def test_a_loss_counts_where_it_is_beyond_noise(made: Any, artifact: Path, baseline: Path, gate: Say) -> None:
    arguments = (artifact, "--baseline", baseline, "--limits")
    few, many = RIGHT.copy(), RIGHT.copy()
    few[np.flatnonzero(RIGHT)[:2]] = False
    many[np.flatnonzero(RIGHT)[:40]] = False
    figures = json.loads((artifact / EVALUATION).read_text())
    made.record(artifact, **{**figures, "tasks": {"builtin": made.task(few)}})
    assert gate(*arguments, "task_drop.builtin=0")[0] == 0  # half a point of 400 items is noise
    made.record(artifact, **{**figures, "tasks": {"builtin": made.task(many)}})
    code, _, err = gate(*arguments, "task_drop.builtin=0.02")
    assert (code, "task_drop.builtin 10 % (at most 2 %)" in err) == (3, True), err
    assert gate(*arguments, "task_drop.builtin=0.11")[0] == 0


def test_tasks_of_other_items_are_bad_input(made: Any, artifact: Path, baseline: Path, gate: Say) -> None:
    figures = json.loads((artifact / EVALUATION).read_text())
    made.record(artifact, **{**figures, "tasks": {"builtin": made.task(RIGHT, items="j" * 64)}})
    code, _, err = gate(artifact, "--baseline", baseline, "--limits", "task_drop.builtin=0.02")
    assert code == 2 and "other items" in err


def test_without_a_baseline_the_divergences_own_is_taken(artifact: Path, gate: Say) -> None:
    assert gate(artifact, "--limits", "ppl_ratio=1.021", "kld_mean=0.02", "decode_ratio=0.9")[0] == 0
    assert gate(artifact, "--limits", "ppl_ratio=1.020")[0] == 3
    code, out, _ = gate(artifact, "--limits", "size_ratio=0.5")
    assert code == 3 and NOT_MEASURED in out and "--baseline" in out


def test_what_was_not_measured_fails_and_says_how(made: Any, tmp_path: Path, gate: Say) -> None:
    made.write_artifact(tmp_path / "int4")
    for limit in EVERYTHING:
        code, out, _ = gate(tmp_path / "int4", "--limits", limit)
        if limit.startswith("size_bytes"):
            assert code == 0
            continue
        assert code == 3 and NOT_MEASURED in out, limit
        assert "python -m eval." in out or "--baseline" in out, limit


def test_a_diverged_model_fails_every_limit_of_its_predictions(made: Any, artifact: Path, gate: Say) -> None:
    figures = json.loads((artifact / EVALUATION).read_text())
    lost = {**figures["divergence"], "kld_mean": None, "kld_p99": None}
    made.record(artifact, **{**figures, "ppl": None, "divergence": lost})
    for limit in ("ppl_ratio=1e9", "kld_mean=1e9", "kld_p99=1e9"):
        code, out, _ = gate(artifact, "--limits", limit)
        assert code == 3 and "diverged" in out


def test_a_divergence_from_itself_is_none(made: Any, artifact: Path, gate: Say) -> None:
    figures = json.loads((artifact / EVALUATION).read_text())
    itself = {**figures["divergence"], "reference": {"artifact_fingerprint": figures["artifact_fingerprint"]}}
    made.record(artifact, **{**figures, "divergence": itself})
    code, out, _ = gate(artifact, "--limits", "kld_mean=0.05")
    assert code == 3 and "own predictions" in out


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[500] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _add(folder: Path) -> None:
    (folder / "extra.json").write_text("{}")


def _remove(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("change", [_flip, _add, _remove])
def test_a_changed_file_fails_it(artifact: Path, gate: Say, change: Callable[[Path], None]) -> None:
    change(artifact)
    code, out, err = gate(artifact, "--limits", "kld_mean=1000", "size_bytes=1000000")
    assert code == 3 and "files failed" in err
    assert out.count(NOT_MEASURED) == 2  # no figure of other bytes passes


def test_figures_of_other_bytes_fail_it(artifact: Path, gate: Say) -> None:
    figures = json.loads((artifact / EVALUATION).read_text())
    (artifact / EVALUATION).write_text(json.dumps({**figures, "artifact_fingerprint": "0" * 64}))
    code, _, err = gate(artifact, "--limits", "kld_mean=1000")
    assert code == 3 and "figures failed" in err and "kld_mean not measured" in err


@pytest.mark.parametrize(
    ("protocol", "compute_dtype", "told"),
    [
        ({"window": 128}, "float32", "window 64 and 128"),
        ({"text_sha256": "c" * 64}, "float32", "text_sha256 aaaaaaaaaaaa and cccccccccccc"),
        ({}, "bfloat16", "compute_dtype float32 and bfloat16"),
    ],
)
def test_other_protocols_are_bad_input(
    made: Any, artifact: Path, baseline: Path, gate: Say, protocol: dict[str, Any], compute_dtype: str, told: str
) -> None:
    made.record(baseline, **made.measured(9.8, protocol=protocol, compute_dtype=compute_dtype))
    code, _, err = gate(artifact, "--baseline", baseline, "--limits", "ppl_ratio=1.1")
    assert code == 2 and told in err and err.count("\n") == 1


def test_the_same_text_under_another_name_is_the_same_protocol(made: Any, artifact: Path, baseline: Path, gate: Say) -> None:
    made.record(baseline, **made.measured(9.8, protocol={"text": "copy.txt", "words": None, "bytes": None}))
    assert gate(artifact, "--baseline", baseline, "--limits", "ppl_ratio=1.1")[0] == 0


def test_a_changed_baseline_is_bad_input(artifact: Path, baseline: Path, gate: Say) -> None:
    _flip(baseline)
    code, _, err = gate(artifact, "--baseline", baseline, "--limits", "size_ratio=0.5")
    assert code == 2 and "baseline" in err and "model.safetensors: changed" in err


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (["kld=0.05"], "known are ppl_ratio, kld_mean"),
        (["kld_mean=much"], "kld_mean"),
        (["kld_mean=-1"], "gate.kld_mean=-1.0 cannot be a limit, which is 0 and more; use 0.05"),
        (["kld_mean=.nan"], "cannot be a limit"),
        (["top1_agreement=93"], "which is 0 to 1; use 0.9"),
        (["task_drop.builtin=2"], "gate.task_drop.builtin=2.0 cannot be a limit"),
        (["size_bytes=1.5"], "size_bytes"),
        (["nothing.yaml"], "is no file and no preset"),
    ],
)
def test_bad_limits_are_told(artifact: Path, gate: Say, limits: list[str], told: str) -> None:
    code, _, err = gate(artifact, "--limits", *limits)
    assert code == 2 and told in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["- 1\n", "kld_mean: [\n", "\xff", "5"])
def test_a_file_of_limits_that_is_none_is_told(artifact: Path, gate: Say, tmp_path: Path, text: str) -> None:
    (tmp_path / "limits.yaml").write_bytes(text.encode("latin-1"))
    code, _, err = gate(artifact, "--limits", tmp_path / "limits.yaml")
    assert code == 2 and "limits.yaml" in err and err.count("\n") == 1


def test_limits_come_from_files_and_later_ones_count(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("gate:\n  kld_mean: 0.1\n  task_drop: {builtin: 0.02}\n")
    (tmp_path / "b.yaml").write_text("ppl_ratio: 1.2\nkld_mean: null\n")
    limits = read_limits([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "task_drop.piqa=0.03"])
    assert set_limits(limits) == {"ppl_ratio": 1.2, "task_drop": {"builtin": 0.02, "piqa": 0.03}}


@pytest.mark.parametrize("name", [MANIFEST, EVALUATION])
def test_damaged_json_is_bad_input(artifact: Path, gate: Say, name: str) -> None:
    (artifact / name).write_text('{"schema": 1, "files"')
    code, _, err = gate(artifact, "--limits", "kld_mean=0.05")
    assert code == 2 and name in err and err.count("\n") == 1


@pytest.mark.parametrize("figures", [{"divergence": {"kld_mean": "a lot", "tokens": 5}}, {"divergence": [1]}, {"ppl": "x"}])
def test_malformed_figures_are_bad_input(made: Any, artifact: Path, gate: Say, figures: dict[str, Any]) -> None:
    made.record(artifact, **{**json.loads((artifact / EVALUATION).read_text()), **figures})
    code, _, err = gate(artifact, "--limits", "kld_mean=0.05", "ppl_ratio=1.1")
    assert code == 2 and EVALUATION in err and err.count("\n") == 1


@given(value=st.floats(0, 1), limit=st.floats(0, 1), name=st.sampled_from(["kld_mean", "kld_p99", "top1_agreement"]))
def test_limits_are_inclusive_and_directed(value: float, limit: float, name: str) -> None:
    subject = Subject(Path("a"), {"name": "a", "files": {}, "fingerprint": "f"}, _evaluation(name, value), [])
    check = judge(subject, read_limits([f"{name}={limit!r}"])).checks[-1]
    assert (check.value, check.limit) == (value, limit)
    assert (check.outcome == PASSED) == (value >= limit if name in MINIMA else value <= limit)


@given(values=st.lists(st.floats(0, 3), min_size=2, max_size=2), limit=st.floats(0, 3))
def test_a_laxer_limit_never_fails_what_a_stricter_one_passed(values: list[float], limit: float) -> None:
    subjects = [Subject(Path("a"), {"files": {}, "fingerprint": "f"}, _evaluation("kld_mean", value), []) for value in values]
    better, worse = sorted(subjects, key=lambda each: each.figures["divergence"]["kld_mean"])
    for laxer in (limit, limit + 0.5):
        assert judge(better, GateConfig(kld_mean=laxer)).passed or not judge(worse, GateConfig(kld_mean=laxer)).passed
    assert not judge(worse, GateConfig(kld_mean=limit)).passed or judge(worse, GateConfig(kld_mean=limit + 0.5)).passed


def _evaluation(name: str, value: float) -> dict[str, Any]:
    return {"artifact_fingerprint": "f", "divergence": {name: value, "tokens": 1, "reference": {"name": "fp16"}}}


@given(number=st.floats(allow_nan=True, allow_infinity=True))
def test_only_numbers_in_range_are_limits(number: float) -> None:
    for name in ("kld_mean", "top1_agreement"):
        fits = math.isfinite(number) and 0 <= number <= (1 if name == "top1_agreement" else math.inf)
        try:
            check_limits("gate", GateConfig(**cast(dict[str, Any], {name: number})))
        except InputError:
            assert not fits
        else:
            assert fits


CHECKS = st.builds(
    Check,
    st.text(max_size=20),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([PASSED, FAILED, NOT_MEASURED]),
    st.text(),
)
VERDICTS = st.builds(
    Verdict, st.text(max_size=20), st.text(), st.text(), st.none() | st.text(), st.lists(CHECKS, max_size=4).map(tuple)
)


@given(verdicts=st.lists(VERDICTS, max_size=3))
def test_what_is_written_can_be_read(verdicts: list[Verdict]) -> None:
    parsed = ElementTree.fromstring(render_junit(verdicts).encode())
    assert parsed.tag == "testsuites"
    cases, failures = parsed.findall("testsuite/testcase"), parsed.findall("testsuite/testcase/failure")
    assert len(cases) == int(parsed.attrib["tests"]) == sum(len(verdict.checks) for verdict in verdicts)
    assert len(failures) == int(parsed.attrib["failures"]) == sum(len(verdict.failed) for verdict in verdicts)
    for suite, verdict in zip(parsed.findall("testsuite"), verdicts, strict=True):
        assert int(suite.attrib["tests"]) == len(verdict.checks) and int(suite.attrib["failures"]) == len(verdict.failed)
    rows = [line for line in render_markdown(verdicts).split("\n") if line.startswith("| ")]
    assert len(rows) == sum(2 + len(verdict.checks) for verdict in verdicts)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert from_json(json.loads(json.dumps(as_json(verdicts)))) == verdicts


def test_it_writes_what_it_is_asked_for(artifact: Path, gate: Say, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("junit", "markdown", "json")}
    options = [item for name, file in files.items() for item in (f"--{name}", str(file))]
    assert gate(artifact, "--limits", "kld_mean=0.01", *options)[0] == 3
    root = ElementTree.parse(files["junit"]).getroot()
    assert [case.attrib["name"] for case in root.iter("testcase")] == ["files", "figures", "kld_mean"]
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None and failure.attrib["message"] == "kld_mean: 0.02, at most 0.01"
    assert "| kld\\_mean | 0.02 | at most 0.01 | ❌ failed |" in files["markdown"].read_text()
    assert json.loads(files["json"].read_text())["passed"] is False


def test_the_command_starts_without_torch() -> None:
    found = subprocess.run([sys.executable, "-c", "import sys, eval.gate; print('torch' in sys.modules)"], capture_output=True)
    assert found.stdout.strip() == b"False", found.stderr
