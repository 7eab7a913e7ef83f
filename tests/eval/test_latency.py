"""Decode speed: what is measured and recorded, in the consumers' own processes; and the arithmetic of rounds."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval import latency
from eval.latency import main, measure, speed_of
from eval.latency_worker import load
from eval.llamacpp_tools import find_tool
from quantize.artifact import read_evaluation
from quantize.errors import InputError

SHORT = ["--prompt", "8", "--tokens", "4", "--rounds", "2"]


def test_two_artifacts_run_in_turn_in_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert main([str(artifact), "--baseline", str(tiny_llama), *SHORT, "--record", "--json", str(tmp_path / "speed.json")]) == 0
    found = read_evaluation(artifact)
    assert found is not None
    speed = found["speed"]
    assert speed == json.loads((tmp_path / "speed.json").read_text())
    assert speed["consumer"].startswith("transformers") and speed["compute_dtype"] == "float16" and speed["rounds"] == 2
    assert 0 < speed["decode_range"][0] <= speed["decode_tokens_per_second"] <= speed["decode_range"][1]
    assert speed["ttft_seconds"] > 0 and speed["threads"] >= 1
    # The same bytes have the same fingerprint.
    assert speed["baseline"]["artifact_fingerprint"] == found["artifact_fingerprint"]
    assert speed["baseline"]["name"] == "tiny-llama" and speed["baseline"]["decode_ratio"] > 0


def test_what_cannot_run_is_bad_input(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), *SHORT]) == 2
    assert "config.json" in capfd.readouterr().err
    with pytest.raises(InputError, match="context of 2048 tokens"):
        load(tiny_llama, "cpu", 2000, 100)
    for options in (["--tokens", "1"], ["--prompt", "0"], ["--rounds", "0"], ["--consumer", "llamacpp"]):
        assert main([str(tiny_llama), *options]) == 2, options


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Artifacts that answer with figures made up: the slow one takes twice as long, and the machine slows down meanwhile."""
    order: list[str] = []

    class Played:
        def __init__(self, artifact: Path) -> None:
            self.name, self.described = artifact.name, dict.fromkeys(("consumer", "compute_dtype", "device", "threads"), "x")

        def round(self) -> dict[str, float]:
            order.append(self.name)
            seconds = (2.0 if self.name == "slow" else 1.0) * 1.1 ** ((len(order) - 1) // 2)
            return {"ttft": seconds, "decode": 1 / seconds}

    @contextlib.contextmanager
    def runner(artifact: Path, **_: Any) -> Iterator[Played]:
        yield Played(artifact)

    monkeypatch.setattr(latency, "_runner", runner)
    monkeypatch.setattr(latency, "fingerprint", lambda path: path.name)
    return order


def test_rounds_alternate_and_the_first_does_not_count(played: list[str]) -> None:
    found = measure([Path("slow"), Path("fast")], rounds=3)
    assert played == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert [len(each["decode"]) for each in found] == [3, 3]


def test_a_ratio_compares_neighbours_in_time(played: list[str]) -> None:
    speed = speed_of(Path("slow"), Path("fast"), rounds=5, prompt=3, tokens=7)
    assert speed["baseline"]["decode_ratio"] == pytest.approx(0.5)
    assert speed["baseline"]["ttft_ratio"] == pytest.approx(2.0)
    assert (speed["prompt"], speed["tokens"], speed["rounds"]) == (3, 7, 5)
    assert speed_of(Path("slow"))["baseline"] is None


@pytest.mark.skipif(find_tool("llama-bench") is None, reason="needs llama.cpp: `make llamacpp`")
def test_llama_cpp_runs_its_files(tiny_gguf: Path) -> None:
    speed = speed_of(tiny_gguf.parent, prompt=8, tokens=4, rounds=1)
    assert speed["consumer"].startswith("llama.cpp") and speed["decode_tokens_per_second"] > 0 and speed["threads"] >= 1


def test_a_worker_that_dies_is_no_bad_input(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        measure([tiny_llama], prompt=8, tokens=4, rounds=1)
    with pytest.raises(InputError, match="below 2"):
        measure([tiny_llama], tokens=1)
