"""Killed runs: whenever the process dies, the same command goes on and ends with the same bytes.

As a program, this file is the victim: it runs the pipeline once for each case in a forked child that kills itself.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BLOCKS = 4
# What each case leaves behind: blocks that are on disk and from which block a new run goes on.
CASES = {
    "inside-block-0": 0,
    "inside-block-2": 2,
    "after-block-0": 0,  # its hidden states are not there yet, so it is made again
    "after-block-1": 1,
    "after-block-2": 2,
    "after-block-3": 4,  # nothing comes after it that would need hidden states
    "inside-hidden-2": 1,
    "after-hidden-1": 1,
    "after-hidden-2": 2,
    "inside-export": 4,
}


def overrides(model: Path, directory: Path) -> list[str]:
    """The command line of every run here."""
    return [
        "recipe=gptq",
        f"model.path={model}",
        f"output_dir={directory}",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
        "calibration.batch_tokens=64",
        "solver.group_size=32",
        "quality=best",
        "stages=[load,calibrate,quantize,export]",
    ]


def run_main(arguments: list[str]) -> int:
    """The command line in this process."""
    from quantize.__main__ import main

    sys.argv = ["quantize", *arguments]
    return main()


def die(*_: Any) -> NoReturn:
    """What the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def sabotage(case: str) -> None:
    """Make this process kill itself at the given point."""
    # As Any: what is replaced in these modules is not all meant for others.
    gptq: Any = import_module("exports.gptq")
    files: Any = import_module("quantize.files")
    quantizer: Any = import_module("quantize.quantizer")
    kind, _, number = case.rpartition("-")
    if kind == "inside-block":
        save_file = files.save_file

        def save_half(tensors: Mapping[str, Any], path: Path, metadata: Any = None) -> None:
            save_file(dict(tensors), path, metadata=metadata)
            if path.name.startswith(f".block-{int(number):05d}"):
                os.truncate(path, path.stat().st_size // 2)
                die()

        files.save_file = save_half
    elif kind == "after-block":
        write = quantizer.BlockFiles.write

        def write_and_die(self: Any, index: int, *parts: Any) -> None:
            write(self, index, *parts)
            if index == int(number):
                die()

        quantizer.BlockFiles.write = write_and_die
    elif kind == "inside-hidden":
        store = quantizer.HiddenStates.store

        def store_and_die(self: Any, directory: Path, batch: int, hidden: Any) -> None:
            store(self, directory, batch, hidden)
            if directory.parent.name.startswith(f".{int(number):05d}"):
                die()

        quantizer.HiddenStates.store = store_and_die
    elif kind == "after-hidden":
        rmtree = quantizer.shutil.rmtree

        def rmtree_half(path: Any, **options: Any) -> None:
            # The states that enter the block just finished are dropped once those of the next one are there.
            if Path(path).parent.name == "hidden" and Path(path).name == f"{int(number) - 1:05d}":
                next(Path(path).rglob("*.safetensors")).unlink()
                die()
            rmtree(path, **options)

        quantizer.shutil.rmtree = rmtree_half
    else:
        write_shards = gptq.write_shards

        def write_and_stop(*arguments: Any) -> None:
            write_shards(*arguments)
            die()

        gptq.write_shards = write_and_stop


def kill_all(model: Path, root: Path) -> None:
    """Run every case once; imports are paid for once, because the children are forks."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantize.pipeline  # noqa: F401

    for case in CASES:
        child = os.fork()
        if child == 0:
            sabotage(case)
            os._exit(run_main(overrides(model, root / case)))
        status = os.waitpid(child, 0)[1]
        print(case, os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)


@pytest.fixture(scope="module")
def killed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one killed run for each case."""
    root = tmp_path_factory.mktemp("killed")
    result = subprocess.run(
        [sys.executable, __file__, str(tiny_llama), str(root)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [f"{case} {int(signal.SIGKILL)}" for case in CASES], result.stderr
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """:func:`run_main` that leaves this process as it was."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return run_main


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what a run makes that nobody interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(logging.getLogger(), "handlers", [])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        assert run_main(overrides(tiny_llama, directory)) == 0
    return made(directory)


def made(directory: Path) -> dict[str, str]:
    """sha256 of every block and artifact file."""
    from quantize.files import files_below, sha256_file

    files = [*files_below(directory / "variants"), *sorted((directory / "work" / "quantize").rglob("*.safetensors"))]
    return {str(file.relative_to(directory)): sha256_file(file) for file in files}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    case: str,
    killed: Path,
    whole: dict[str, str],
    tiny_llama: Path,
    run: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from quantize import quantizer

    directory = killed / case
    assert not (directory / "variants" / "gptq").exists()
    written = []
    write = quantizer.BlockFiles.write

    def counted(self: quantizer.BlockFiles, index: int, *parts: Any) -> None:
        written.append(index)
        write(self, index, *parts)

    monkeypatch.setattr(quantizer.BlockFiles, "write", counted)
    assert run(overrides(tiny_llama, directory)) == 0
    log = capsys.readouterr().err
    assert written == list(range(CASES[case], BLOCKS))
    assert ("going on after block" in log) == (CASES[case] > 0 and case != "inside-export")
    assert made(directory) == whole
    assert not list(directory.rglob("*.tmp-*"))
    assert not (directory / "work" / "quantize" / "gptq" / "hidden").exists()


def test_other_settings_do_not_go_on_from_a_killed_run(
    tiny_llama: Path,
    tmp_path: Path,
    run: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, str],
) -> None:
    from quantize import quantizer

    class Interruption(Exception):
        pass

    write = quantizer.BlockFiles.write

    def write_two(self: quantizer.BlockFiles, index: int, *parts: Any) -> None:
        if index == 2:
            raise Interruption
        write(self, index, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(quantizer.BlockFiles, "write", write_two)
        assert run([*overrides(tiny_llama, tmp_path), "solver.damp_percent=0.1"]) == 1
    assert len(list(tmp_path.rglob("block-*.safetensors"))) == 2
    assert run(overrides(tiny_llama, tmp_path)) == 0
    assert made(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_command_killed_from_outside_goes_on(
    block: int, tiny_llama: Path, tmp_path: Path, run: Callable[[list[str]], int], whole: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "quantize", *overrides(tiny_llama, tmp_path)]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL)
    file = tmp_path / "work" / "quantize" / "gptq" / f"block-{block:05d}.safetensors"
    while not file.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert run(overrides(tiny_llama, tmp_path)) == 0
    assert made(tmp_path) == whole
    assert not list(tmp_path.rglob("*.tmp-*"))


if __name__ == "__main__":
    kill_all(Path(sys.argv[1]), Path(sys.argv[2]))
