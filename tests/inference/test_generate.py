"""Generating until a stop, and the two command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference import bench
from inference import generate as command
from inference.engine import Engine
from inference.generate import generate
from inference.load import load
from inference.sampling import Sampling
from quantize.errors import InputError


def test_a_seed_decides_the_text(tiny_llama: Path) -> None:
    engine = Engine(load(tiny_llama), 64)
    texts = [tuple(generate(engine, [3, 4], 20, Sampling(1.5, 0, seed), stop=())) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 20


def test_a_stop_token_is_the_last(tiny_llama: Path) -> None:
    engine = Engine(load(tiny_llama), 64)
    free = list(generate(engine, [3, 4], 20, Sampling(1.5, 0, 1), stop=()))
    stop = free[5]
    assert list(generate(engine, [3, 4], 20, Sampling(1.5, 0, 1), stop=[stop])) == free[: free.index(stop) + 1]
    assert list(generate(engine, [3, 4], 0)) == []
    assert engine.model.config.stop_tokens == (1,)


def test_stop_tokens_of_the_generation_config_come_first(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_llama / name)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(tmp_path).config.stop_tokens == (7, 9)


def test_text_that_does_not_fit_is_refused_before_it_starts(tiny_llama: Path) -> None:
    engine = Engine(load(tiny_llama), 8)
    assert len(list(generate(engine, [1, 2, 3], 6, stop=()))) == 6
    with pytest.raises(InputError, match="max_new_tokens=7 after a prompt of 3 does not fit into max_tokens=8; use at most 6"):
        next(generate(engine, [1, 2, 3], 7))


def test_the_command_prints_the_text(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_llama), "import this", "--tokens", "12", "--temperature", "1", "--seed", "4"]
    assert command.main(arguments) == 0
    first = capsys.readouterr().out
    assert len(first.strip()) > 3
    assert command.main(arguments) == 0
    assert capsys.readouterr().out == first
    word = first.split()[1]
    assert command.main([*arguments, "--stop", word]) == 0
    assert capsys.readouterr().out == first[: first.index(word)] + "\n"
    assert command.main([*arguments, "--top-p", "2"]) == 2
    assert "top_p=2.0" in capsys.readouterr().err
    assert command.main([str(tmp_path), "x"]) == 2
    assert "it has no config.json" in capsys.readouterr().err


def test_the_bench_reports_every_artifact(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    sizes = ["--prompt", "8", "--tokens", "3", "--rounds", "2", "--json", str(target)]
    assert bench.main([str(tiny_llama), f"{tiny_llama},dense=stored,head=int8", *sizes]) == 0
    written = json.loads(target.read_text())
    assert written["protocol"]["prompt"] == 8
    first, second = written["artifacts"]
    assert first["decode_rate_ratio"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    assert first["weight_bytes"] == load(tiny_llama).nbytes() > second["weight_bytes"]
    for entry in (first, second):
        assert 0 < entry["ttft"]["least"] <= entry["ttft"]["median"] <= entry["ttft"]["greatest"]
        assert entry["prefill_rate"]["greatest"] == pytest.approx(8 / entry["ttft"]["least"])
        assert entry["decode_rate"]["least"] == pytest.approx(1 / entry["tpot"]["greatest"])
    assert "decode tok/s" in capsys.readouterr().out


def test_ratios_compare_rounds_with_each_other(tiny_llama: Path) -> None:
    engine = Engine(load(tiny_llama), 8)
    slow = [bench.Round(1.0, 1.0, 8.0, rate) for rate in (10.0, 1.0)]
    fast = [bench.Round(1.0, 1.0, 8.0, rate) for rate in (20.0, 3.0)]
    ratio = bench.report(["a", "b"], [engine, engine], [slow, fast])[1]["decode_rate_ratio"]
    assert ratio == {"median": 2.5, "least": 2.0, "greatest": 3.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no directory"),
        (["{model},layout=x"], "'layout' is no option; use dense="),
        (["{model},dense=thin"], "dense='thin' is not an option"),
        (["{model}", "--rounds", "0"], "--rounds=0 measures nothing; use 1 or more"),
        (["{model}", "--prompt", "4000"], "outside the model's context"),
    ],
)
def test_the_bench_refuses_bad_arguments(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench.main([argument.format(model=tiny_llama) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
