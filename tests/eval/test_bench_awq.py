"""The comparison of AWQs: its rows, the scripts and environments of its peers, and files of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from eval.bench_awq import AWQ, METHODS
from eval.bench_gptq import parse, shown_command
from eval.bench_methods import Setting, interpreter, own_command, peer_command
from quantize.errors import InputError

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def setting(model: Path, tmp_path: Path) -> Setting:
    arguments = ["--model", str(model), "--work-dir", str(tmp_path / "work"), "--autoawq-python", "/some/venv/python"]
    return parse(arguments, AWQ)[0]


def test_every_peer_has_a_script() -> None:
    assert len(BY_NAME) == len(METHODS)
    for method in METHODS:
        if method.package != "quantize":
            assert importlib.util.find_spec(f"eval.peers.{method.package}_{method.algorithm}") is not None


def test_peers_run_in_their_own_environments(setting: Setting, tmp_path: Path) -> None:
    command = peer_command(BY_NAME["autoawq"], setting, tmp_path)
    assert command[:3] == ["/some/venv/python", "-m", "eval.peers.autoawq_awq"]
    assert command[-3:] == ["4", "64", "false"]
    assert interpreter(BY_NAME["llmcompressor"], setting).endswith(".venv-llmcompressor/bin/python")
    assert peer_command(BY_NAME["llmcompressor"], setting, tmp_path)[2] == "eval.peers.llmcompressor_awq"


def test_ours_are_recipes_on_the_same_grid(setting: Setting, tmp_path: Path) -> None:
    command = own_command(BY_NAME["ours-awq+gptq"], setting, tmp_path)
    assert {"recipe=awq", "solver=awq+gptq", "solver.bits=4", "solver.group_size=64", "solver.symmetric=false"} <= set(command)
    assert "solver.bits=16" not in own_command(BY_NAME["fp16"], setting, tmp_path)


def test_files_and_command_are_its_own(model: Path) -> None:
    _, methods, options = parse(["--model", str(model)], AWQ)
    assert (options.work_dir, options.output) == (Path("artifacts/bench-awq"), Path("docs/awq-bench.md"))
    assert [method.name for method in methods] == [method.name for method in METHODS if not method.extra]
    assert AWQ.title == "AWQ side by side"
    shown = shown_command(["--autoawq-python", "/x/python", "--text", "/y/test.raw"], AWQ)
    assert shown == "python -m eval.bench_awq --text test.raw"


def test_an_unknown_method_is_refused_with_those_known(model: Path) -> None:
    with pytest.raises(InputError, match=r"--only magic is unknown; use some of fp16, rtn, ours-awq"):
        parse(["--model", str(model), "--only", "magic"], AWQ)
