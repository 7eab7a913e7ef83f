"""The command line: exit codes, one-line errors, the manual page, the resolved recipe."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from quantize.__main__ import main

PROJECT = Path(__file__).resolve().parents[2]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    """``cli("key=value", ...)`` in an empty working directory: exit code, standard output, standard error."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
        try:
            code = main()
        except SystemExit as end:  # how Hydra's --help ends
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def patch_pipeline(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    """Let ``run_pipeline`` raise ``error``, or do nothing."""

    def run_pipeline(config: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("quantize.pipeline.run_pipeline", run_pipeline)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nokey=1"], ["nokey", "allowed here", "solver", "output_dir"]),
        (["solver.bitz=3"], ["solver.bitz", "allowed here", "bits", "group_size"]),
        (["variants.fp16.kontainer=gptq"], ["variants.fp16.kontainer", "allowed here", "container"]),
        (["solver.bits=abc"], ["solver.bits", "abc", "Integer"]),
        (["calibration.chat_template=perhaps"], ["calibration.chat_template", "perhaps", "bool"]),
        (["solver.damp_percent=much"], ["solver.damp_percent", "much", "Float"]),
        (["recipe=nope"], ["recipe/nope", "demo", "gptq_7b"]),
        (["calibration=nope"], ["calibration/nope", "builtin", "wikitext2"]),
        (["solver.bits="], ["solver.bits"]),
        (["solver.bits"], ["solver.bits"]),
        (["solver.bits=5"], ["solver.bits=5", "2, 3, 4, 8"]),
        (["quality=superb"], ["quality=superb", "fast, balanced, best"]),
        (["eval.stride=${nothing.here}"], ["nothing"]),
    ],
)
def test_a_bad_recipe_is_told_in_one_line_before_anything_is_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    patch_pipeline(monkeypatch, AssertionError("the pipeline was started"))
    code, out, err = cli(f"output_dir={tmp_path / 'run'}", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "run").exists()


def test_a_bad_key_costs_no_import_of_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['quantize', 'nokey=1', 'output_dir=run']\n"
        "from quantize.__main__ import main\n"
        "code = main()\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_success_is_zero_and_silent_on_errors(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_pipeline(monkeypatch, None)
    assert cli("output_dir=run") == (0, "", "")


def test_a_failure_is_forgotten_by_the_next_call(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_pipeline(monkeypatch, RuntimeError("once"))
    assert cli("output_dir=run")[0] == 1
    patch_pipeline(monkeypatch, None)
    assert cli("output_dir=run")[0] == 0


def test_a_defect_is_one_and_says_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_pipeline(monkeypatch, RuntimeError("two\nlines"))
    code, _, err = cli("output_dir=run")
    assert code == 1
    assert err == "error: defect: RuntimeError: two lines; please report it (debug=true shows where)\n"


def test_debug_shows_the_traceback_and_keeps_the_last_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_pipeline(monkeypatch, RuntimeError("boom"))
    code, _, err = cli("output_dir=run", "debug=true")
    assert code == 1
    assert "Traceback" in err
    assert "RuntimeError: boom" in err
    assert err.splitlines()[-1].startswith("error: defect: RuntimeError: boom")


def test_an_interruption_is_130_and_promises_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_pipeline(monkeypatch, KeyboardInterrupt())
    code, _, err = cli("output_dir=run")
    assert code == 130
    assert err.startswith("error: interrupted; the same command goes on")


def test_an_interruption_ends_a_multirun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run_pipeline(config: object) -> None:
        started.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("quantize.pipeline.run_pipeline", run_pipeline)
    assert cli("--multirun", "solver.bits=3,4")[0] == 130
    assert len(started) == 1


def test_help_is_the_manual_page(cli: Cli) -> None:
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    for heading in ("NAME", "SYNOPSIS", "RECIPES", "OPTIONS", "FILES", "EXIT STATUS", "EXAMPLES"):
        assert heading in out.splitlines()
    for recipe in (PROJECT / "recipes" / "recipe").glob("*.yaml"):
        assert f"          {recipe.stem} " in out or f"    {recipe.stem} " in out
    assert "hydra" not in out.lower()


def parsed(text: str) -> Any:
    """A printed recipe."""
    return OmegaConf.create(text)


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"], ["--cfg", "job", "--resolve"]])
def test_cfg_job_prints_the_resolved_recipe(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    code, out, _ = cli("recipe=gptq", "solver.bits=3", *arguments)
    assert code == 0
    assert "${" not in out
    printed = parsed(out)
    assert printed["variants"]["gptq"]["solver"]["bits"] == 3
    assert printed["output_dir"] == "artifacts/gptq"
    assert list(tmp_path.iterdir()) == []


def test_recipes_of_ones_own_are_found_with_config_dir(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "special.yaml").write_text(
        "# @package _global_\nsolver: {bits: 3}\nvariants:\n  small: {solver: {group_size: 32}}\n"
    )
    code, out, _ = cli("--config-dir", str(tmp_path / "mine"), "recipe=special", "--cfg", "job")
    assert code == 0
    solver = parsed(out)["variants"]["small"]["solver"]
    assert (solver["bits"], solver["group_size"]) == (3, 32)
