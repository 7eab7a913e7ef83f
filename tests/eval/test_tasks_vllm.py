"""Tasks in vLLM's environment: what is started there, what its model is given, and what comes back."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from eval.peers import vllm_tasks
from eval.tasks import evaluate_tasks
from eval.tasks_vllm import VARIABLE, arguments_for, run_in_vllm
from quantize.errors import InputError

FOUND = {"builtin": {"metric": "acc", "value": 0.5}}


@pytest.fixture
def make_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``make_python(script)``: a shell script as the interpreter of vLLM's environment."""

    def make(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv(VARIABLE, str(program))

    return make


def test_it_is_started_with_what_was_asked_for(tiny_llama: Path, make_python: Any, tmp_path: Path) -> None:
    make_python(f"""printf '%s\\n' "$@" > "{tmp_path}/seen"; echo "$PYTHONPATH" >> "{tmp_path}/seen"; echo noise
echo '{json.dumps(FOUND)}' > "$4" """)
    found = evaluate_tasks(tiny_llama, ["builtin", "piqa"], task_dirs=[tmp_path], limit=7, consumer="vllm")
    assert found == FOUND
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen[:3] == ["-m", "eval.peers.vllm_tasks", str(tiny_llama)]
    assert seen[4:10] == ["--tasks", "builtin,piqa", "--task-dir", str(tmp_path), "--limit", "7"]
    assert Path(seen[10].split(":")[0], "eval", "peers", "vllm_tasks.py").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [("echo 'no such quantization' >&2; exit 1", "no such quantization"), ("exit 0", "it said nothing")],
)
def test_its_failure_is_told(tiny_llama: Path, make_python: Any, script: str, message: str) -> None:
    make_python(script)
    with pytest.raises(InputError, match=message):
        run_in_vllm(tiny_llama, ["builtin"])


def test_an_environment_that_is_not_there_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere does not exist; run `make vllm`"):
        run_in_vllm(tiny_llama, ["builtin"])


def test_lm_evals_vllm_model_is_given_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Fake(LM):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__()
            given.update(options)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-float(len(request.args[1])), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    version = metadata.version
    monkeypatch.setattr("lm_eval.api.registry.get_model", {"vllm": Fake}.__getitem__)
    monkeypatch.setattr(vllm_tasks.metadata, "version", lambda name: "0.32.0" if name == "vllm" else version(name))
    out = tmp_path / "tasks.json"
    arguments = arguments_for(tmp_path / "artifact", ["builtin"], [], 4, out)
    assert vllm_tasks.main(arguments[2:]) == 0
    assert given.pop("pretrained") == str(tmp_path / "artifact")
    assert given == {"dtype": "auto", "max_model_len": 2048, "enforce_eager": True, "batch_size": "auto", "seed": 0}
    found = json.loads(out.read_text())["builtin"]
    assert found["consumer"] == "vllm 0.32.0" and found["samples"] == 8
    assert vllm_tasks.main(["artifact", str(out), "--tasks", "builtin", "--task-dir", str(tmp_path / "nowhere")]) == 2


def test_lm_evals_model_takes_these_options() -> None:
    import ast
    import importlib.util

    spec = importlib.util.find_spec("lm_eval.models")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "vllm_causallms.py").read_text(encoding="utf-8")
    model = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    start = next(node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = {argument.arg for argument in start.args.args}
    # enforce_eager goes through to vLLM itself.
    assert {"pretrained", "dtype", "max_model_len", "batch_size", "seed"} <= names and start.args.kwarg is not None
