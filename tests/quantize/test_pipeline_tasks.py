"""Tasks in a run: every variant's accuracy, compared with the baseline's; in the report and beside the artifact; run once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.tasks_scores import unpack_scores
from quantize import pipeline
from quantize.artifact import read_evaluation
from quantize.errors import InputError

RunRecipe = Callable[..., Path]
RECIPE = """
# @package _global_
quality: fast
eval:
  task_limit: 8
variants:
  int4: {solver: {name: rtn}}
  fp16: {solver: {name: none}, container: safetensors}
"""


def report_of(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((run / "report.json").read_text())["variants"]}


@pytest.fixture(scope="module")
def finished(small_run: list[str], run_recipe: RunRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run's directory, and its settings."""
    settings = [*small_run, "eval.tasks=[builtin]"]
    return run_recipe(tmp_path_factory.mktemp("tasks"), RECIPE, *settings), settings


def test_accuracy_is_in_the_report_and_beside_the_artifact(finished: tuple[Path, list[str]]) -> None:
    run, _ = finished
    rows = report_of(run)
    for name, row in rows.items():
        found = row["tasks"]["builtin"]
        assert (found["metric"], found["samples"]) == ("acc", 16)
        beside = read_evaluation(run / "variants" / name)
        assert beside is not None
        full = beside["tasks"]["builtin"]
        assert {key: full.get(key) for key in found} == found
        assert len(unpack_scores(full["metrics"]["acc"]["scores"])) == 16
        assert "--tasks builtin --task-limit 8" in row["command"]
    assert rows["fp16"]["tasks"]["builtin"]["difference"] is None
    difference = rows["int4"]["tasks"]["builtin"]["difference"]
    assert difference["reference"] == rows["fp16"]["tasks"]["builtin"]["value"]
    expected = rows["int4"]["tasks"]["builtin"]["value"] - difference["reference"]
    assert difference["difference"] == pytest.approx(expected)
    assert (difference["flips_won"] - difference["flips_lost"]) / 16 == pytest.approx(expected)
    page = (run / "report.md").read_text()
    assert "builtin (acc %)" in page and "lm-eval" in page


def test_other_tasks_are_run_anew_and_the_same_are_not(
    finished: tuple[Path, list[str]], run_recipe: RunRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = finished
    steps: list[str] = []

    def asked(self: Any, name: str, key: str, record: Any) -> None:
        steps.append(name)
        raise InputError("asked")

    monkeypatch.setattr(pipeline._Pipeline, "_evaluate", asked)
    run_recipe(run.parent, RECIPE, *settings)
    assert steps == []
    run_recipe(run.parent, RECIPE, *settings, "eval.task_limit=5", code=2)
    assert steps == ["fp16"]  # the baseline first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.tasks=[builtin,builtin]", "there twice"),
        ("eval.task_limit=0", "eval.task_limit=0"),
        ("eval.task_dir=nowhere", "eval.task_dir=nowhere is no folder"),
    ],
)
def test_impossible_tasks_are_refused_before_anything_runs(
    override: str, message: str, small_run: list[str], cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, errors = cli("recipe=fp16", *small_run, "eval.tasks=[builtin]", override, f"output_dir={tmp_path / 'run'}")
    assert code == 2 and message in errors
    assert not (tmp_path / "run" / "variants").exists()


def test_an_unknown_task_is_refused_before_anything_runs(
    small_run: list[str], cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # Without lm-eval's own tasks: thousands of files that take long to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: TaskManager(None, include_path, False))
    code, _, errors = cli("recipe=fp16", *small_run, "eval.tasks=[bultin]", f"output_dir={tmp_path / 'run'}")
    assert code == 2 and "bultin is unknown" in errors and "do you mean builtin" in errors
    assert not (tmp_path / "run" / "variants").exists()


def test_the_demo_runs_the_built_in_tasks(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, _ = cli("recipe=demo", "--cfg", "job")
    assert code == 0 and yaml.safe_load(printed)["eval"]["tasks"] == ["builtin"]
