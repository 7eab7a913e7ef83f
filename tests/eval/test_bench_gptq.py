"""The comparison of GPTQs: limits, peers that are missing, rows kept and made again, one set of windows, and both tables."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from eval import bench_gptq, bench_methods
from eval.bench_gptq import main, measure, shown_command
from eval.bench_methods import METHODS, Method, Setting, peer_command
from eval.bench_process import last_progress, run_limited
from eval.bench_table import COLUMNS, render_markdown, render_table
from eval.peers.record import PeerJob, progress
from quantize.files import sha256_file

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A setting whose windows file is there, and whose model is never looked at."""
    made = Setting(
        model=tmp_path / "model",
        calibration=None,
        text="builtin",
        num_samples=2,
        seq_len=16,
        windows=2,
        window_tokens=64,
        limit=60,
        work=tmp_path / "work",
        llmcompressor_python=tmp_path / "nowhere" / "python",
    )
    made.windows_file.parent.mkdir(parents=True)
    made.windows_file.write_bytes(b"windows")
    return made


def row(name: str, ppl: float | None = 12.5, **changes: Any) -> dict[str, Any]:
    result = {
        "name": name,
        "version": "1.2.3",
        "bits": 4,
        "group": 64,
        "symmetric": True,
        "status": "done",
        "ppl": ppl,
        "seconds": 1234.56,
        "peak_rss_bytes": 1500 * 2**20,
        "size_bytes": 114_600_000,
        "consumer": "made up 1.0",
        "compute_dtype": "float32",
    }
    return result | changes


def unfinished(name: str, status: str, outcome: str, **changes: Any) -> dict[str, Any]:
    blank = {"name": name, "version": None, "bits": 4, "group": 64, "symmetric": True}
    return blank | {"status": status, "outcome": outcome} | changes


ROWS = [
    row("fp16", 10.0, bits=16, group=None, symmetric=None),
    row("ours", 10.5, symmetric=False),
    row("broken", None),
    unfinished("peer|one", "stopped", "stopped after 60 s", last="layer 3 of 30 quantized"),
    unfinished("peer-two", "missing", "not installed (make peers)"),
]


def test_the_terminal_table_has_every_figure_in_100_columns() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100, color_system=None).print(render_table(ROWS))
    lines = {line.split()[0]: line.split()[1:] for line in stream.getvalue().splitlines() if line.strip()}
    assert max(map(len, stream.getvalue().splitlines())) <= 100
    assert lines["fp16"] == ["1.2.3", "16", "10.000", "+0.00", "%", "1,234.6", "1,500", "114.6"]
    assert lines["ours"] == ["1.2.3", "4", "64", "no", "10.500", "+5.00", "%", "1,234.6", "1,500", "114.6"]
    assert lines["broken"][4] == "diverged"
    assert "stopped after 60 s" in stream.getvalue()


def test_markdown_has_the_rows_the_reasons_and_what_repeats_them() -> None:
    page = render_markdown(
        ROWS, command="python -m eval.bench_gptq", date="2001-02-03", protocol={"window": 1024}, environment={"cpu": "Abacus"}
    )
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [len(COLUMNS) + 1] * (len(ROWS) + 2)
    assert "| ours | 1.2.3 | 4 | 64 | no | 10.500 | +5.00 % | 1,234.6 | 1,500 | 114.6 |" in table
    assert r"| peer\|one |  | 4 | 64 | yes | stopped after 60 s |  |  |  |  |" in table
    assert "| peer-two |  | 4 | 64 | yes | not installed (make peers) |  |  |  |  |" in table
    assert r"- peer\|one: stopped after 60 s; last: layer 3 of 30 quantized" in page
    assert "```sh\npython -m eval.bench_gptq\n```" in page
    assert "- window: 1,024" in page
    assert "- cpu: Abacus" in page
    assert "2001-02-03" in page


def test_without_the_baseline_there_are_no_ratios() -> None:
    page = render_markdown([row("ours")], command="c", date="d", protocol={}, environment={})
    assert "| ours | 1.2.3 | 4 | 64 | yes | 12.500 |  | 1,234.6 |" in page


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether a condition comes true in time: a killed process needs a turn on a busy machine to be gone."""
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.05)
    return condition()


def test_a_process_that_passes_its_limit_is_stopped_with_its_children(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('progress: layer 2 of 9', child.pid, flush=True)\n"
        "print('chatter', flush=True)\n"
        "time.sleep(60)\n"
    )
    started = time.perf_counter()
    outcome = run_limited([sys.executable, "-c", script], log=tmp_path / "log", limit=2, environment=os.environ)
    assert time.perf_counter() - started < 20
    assert outcome.returncode is None
    assert outcome.seconds >= 2
    said, child = outcome.last.rsplit(" ", 1)
    assert said == "layer 2 of 9"
    # The child is gone, or a zombie that nobody has waited for yet.
    status = Path(f"/proc/{child}/status")
    if Path("/proc/self/status").exists():
        assert eventually(lambda: not status.exists() or "State:\tZ" in status.read_text())


def test_a_process_that_ends_tells_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"]
    outcome = run_limited(command, log=tmp_path / "log", limit=30, environment=os.environ)
    assert (outcome.returncode, outcome.last) == (3, "two")


def test_the_last_line_is_found_behind_progress_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"start\n 10%|#  \r\x1b[32m 20%|## \x1b[0m\r")
    assert last_progress(log) == "20%|##"
    log.write_bytes(b"")
    assert last_progress(log) == "no output"


def test_peers_report_progress_where_it_is_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress("layer 1 of 2")
    (tmp_path / "log").write_text(f"bar 10 %{capsys.readouterr().err}bar 20 %")
    assert last_progress(tmp_path / "log") == "layer 1 of 2"


def fake_peer(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put ``script`` in the place of a peer's."""

    def command(method: Method, setting: Setting, directory: Path) -> list[str]:
        return [sys.executable, "-c", script, str(directory / "artifact"), str(setting.windows_file)]

    monkeypatch.setattr(bench_methods, "peer_command", command)
    monkeypatch.setattr(bench_methods, "version_of", lambda *_: "7.7")
    monkeypatch.setattr(bench_gptq, "version_of", lambda *_: "7.7")


FAKE = """
import json, pathlib, sys
artifact = pathlib.Path(sys.argv[1])
artifact.mkdir()
(artifact / "model.safetensors").write_bytes(pathlib.Path(sys.argv[2]).read_bytes())
costs = {"seconds": 2.5, "peak_rss_bytes": 1048576, "versions": {}, "settings": {"damping": 0.5}}
pathlib.Path(f"{artifact}.json").write_text(json.dumps(costs))
"""


def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make up perplexities; returns the artifacts that were to be measured."""
    seen: list[Path] = []

    def evaluate(method: Method, setting: Setting, artifact: Path) -> dict[str, Any]:
        seen.append(artifact)
        return {"ppl": 11.0, "consumer": "made up", "protocol": {}, "compute_dtype": "float32"}

    monkeypatch.setattr(bench_gptq, "evaluate", evaluate)
    return seen


def test_a_peer_that_sleeps_is_reported_as_stopped(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peer(monkeypatch, "import time; print('progress: layer 4 of 30', flush=True); time.sleep(60)")
    seen = no_evaluation(monkeypatch)
    quick = Setting(**{**setting.__dict__, "limit": 2})
    stopped = measure(BY_NAME["gptqmodel"], quick, "key", fresh=False)
    assert (stopped["status"], stopped["outcome"], stopped["last"]) == ("stopped", "stopped after 2 s", "layer 4 of 30")
    assert "ppl" not in stopped
    assert seen == []
    # Kept under the same limit or a shorter one; more time is another try.
    assert measure(BY_NAME["gptqmodel"], quick, "key", fresh=False) == stopped
    fake_peer(monkeypatch, FAKE)
    assert measure(BY_NAME["gptqmodel"], setting, "key", fresh=False)["status"] == "done"


def test_a_peer_that_fails_says_why_and_is_tried_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    no_evaluation(monkeypatch)
    fake_peer(monkeypatch, "raise SystemExit('no such kernel')")
    failed = measure(BY_NAME["gptqmodel"], setting, "key", fresh=False)
    assert (failed["status"], failed["outcome"], failed["last"]) == ("failed", "failed (exit code 1)", "no such kernel")
    fake_peer(monkeypatch, FAKE)
    assert measure(BY_NAME["gptqmodel"], setting, "key", fresh=False)["status"] == "done"


def test_finished_rows_are_reused_under_the_same_key_only(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peer(monkeypatch, FAKE)
    seen = no_evaluation(monkeypatch)
    method = BY_NAME["gptqmodel"]
    first = measure(method, setting, "key", fresh=False)
    assert first["ppl"] == 11.0
    assert (first["seconds"], first["peak_rss_bytes"], first["size_bytes"]) == (2.5, 2**20, len(b"windows"))
    assert json.loads((setting.work / "results" / "gptqmodel.json").read_text()) == first
    assert measure(method, setting, "key", fresh=False) == first
    assert len(seen) == 1
    measure(method, setting, "another key", fresh=False)
    assert len(seen) == 2
    measure(method, setting, "another key", fresh=True)
    assert len(seen) == 3


def test_a_missing_peer_is_a_row(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = measure(BY_NAME["llmcompressor"], setting, "key", fresh=False)
    assert (missing["status"], missing["outcome"], missing["version"]) == ("missing", "not installed (make peers)", None)
    assert not (setting.work / "results" / "llmcompressor.json").exists()
    monkeypatch.setattr(bench_methods, "version_of", lambda *_: "0.14")
    monkeypatch.setattr(bench_methods, "package_version", lambda *_: None)
    assert "compressed-tensors" in measure(BY_NAME["llmcompressor"], setting, "key", fresh=False)["outcome"]


def test_every_peer_gets_the_one_windows_file_and_its_grid(setting: Setting, tmp_path: Path) -> None:
    for name in ("llmcompressor", "gptqmodel", "gptqmodel-float32"):
        method = BY_NAME[name]
        command = peer_command(method, setting, tmp_path / "run")
        job = PeerJob.from_command_line(command[3:9])
        assert (Path(bench_gptq.PROJECT) / f"{command[2].replace('.', '/')}.py").exists()
        assert job.windows == setting.windows_file
        assert (job.model, job.out) == (setting.model, tmp_path / "run" / "artifact")
        assert (job.bits, job.group, job.symmetric) == (4, 64, True)
        assert command[9:] == list(method.settings)


def test_one_text_for_both_is_held_out_from_calibration(setting: Setting, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert "--part" not in setting.evaluation()
    other = Setting(**{**setting.__dict__, "text": str(text)})
    assert "--part" not in other.evaluation()
    same = Setting(**{**setting.__dict__, "text": str(text), "calibration": text})
    assert same.evaluation()[-2:] == ["--part", "heldout"]


def test_the_command_that_is_shown_names_no_folder_of_this_machine() -> None:
    given = ["--text", "/home/me/test.raw", "--calibration=/data/valid.txt", "--work-dir", "/tmp/w", "--fresh", "--limit", "9"]
    given += ["--llmcompressor-python=/opt/python"]
    assert shown_command(given) == "python -m eval.bench_gptq --text test.raw --calibration=valid.txt --limit 9"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "rtn,awq"], "--only awq is unknown; use some of fp16, rtn"),
        (["--text", "no-such-file"], "no-such-file does not exist"),
        (["--model", "no-such-folder"], "no checkpoint directory"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_ours_on_a_tiny_model_from_end_to_end(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_llama), "--num-samples", "4", "--seq-len", "32", "--windows", "2"]
    arguments += ["--window-tokens", "64", "--only", "fp16,rtn,ours-fast,ours-best-3bit,llmcompressor"]
    arguments += ["--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "page.md")]
    arguments += ["--llmcompressor-python", str(tmp_path / "nowhere")]
    assert main(arguments) == 0
    first = capsys.readouterr()
    rows = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "work" / "results").glob("*.json")}
    assert set(rows) == {"fp16", "rtn", "ours-fast", "ours-best-3bit"}
    windows = tmp_path / "work" / "windows" / "work" / "calibration" / "windows.safetensors"
    assert load_file(windows)["windows"].shape == (4, 32)
    for name in ("ours-fast", "ours-best-3bit"):
        assert sha256_file(tmp_path / "work" / "runs" / name / "work" / "calibration" / windows.name) == sha256_file(windows)
        assert rows[name]["ppl"] != rows["fp16"]["ppl"]
        assert rows[name]["seconds"] > 0
    assert rows["ours-best-3bit"]["size_bytes"] < rows["ours-fast"]["size_bytes"] < rows["fp16"]["size_bytes"]
    page = (tmp_path / "page.md").read_text()
    assert f"| {rows['ours-fast']['ppl']:.3f} |" in page
    assert "not installed (make peers)" in page
    assert str(tmp_path) not in page
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.err.count("kept from an earlier run") == 4
    assert again.out == first.out
