"""Perplexity against position: what is scored, the scalings' own models, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference import long_context
from inference.kv_cache import KVCache
from inference.load import LoadOptions, load
from inference.score import losses, perplexity


@given(st.lists(st.integers(2, 40), min_size=1, max_size=5, unique=True), st.integers(0, 999))
def test_stretches_are_disjoint_and_leave_nothing_out(lengths: list[int], seed: int) -> None:
    lengths = sorted(lengths)
    scores = torch.rand(lengths[-1] - 1, generator=torch.Generator().manual_seed(seed))
    found = long_context.between(scores, lengths)
    sizes = [end - start for start, end in zip([1, *lengths], lengths, strict=False)]
    total = sum(math.log(value) * size for value, size in zip(found, sizes, strict=True))
    assert total == pytest.approx(float(scores.double().sum()))
    assert found[0] == pytest.approx(math.exp(float(scores[: lengths[0] - 1].double().mean())))


@pytest.fixture(scope="module")
def command(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command's arguments on a tiny model whose config says that its context is 24 tokens."""
    folder = tmp_path_factory.mktemp("long")
    model = folder / "model"
    model.mkdir()
    for file in tiny_llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    text = folder / "text.txt"
    text.write_text("the function returns its argument unless it is None\n" * 20)
    return [str(model), "--text", str(text), "--window", "16", "--chunk", "7"]


def test_the_command_scores_all_scalings_on_the_same_tokens(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("png", "json", "markdown")}
    arguments = [*command, "--lengths", "48", "12", "24", *(part for name in files for part in (f"--{name}", str(files[name])))]
    assert long_context.main(arguments) == 0
    found = json.loads(files["json"].read_text())
    assert (found["protocol"]["trained"], found["protocol"]["factor"]) == (24, 2)
    curves = {each["scaling"]: each for each in found["curves"]}
    assert list(curves) == list(long_context.SCALINGS)
    assert all(each["lengths"] == [12, 24, 48] for each in curves.values())
    model = load(Path(command[0]), LoadOptions(max_tokens=48))
    ids = long_context.text_ids(Path(command[0]), Path(command[2]), 48)
    plain = losses(model, ids, KVCache(model.config, 48), 48)
    assert curves["none"]["perplexities"] == pytest.approx(long_context.between(plain, [12, 24, 48]), rel=1e-4)
    assert perplexity(model, ids[:12], KVCache(model.config, 48)) == pytest.approx(curves["none"]["perplexities"][0], rel=1e-4)
    first = {name: each["perplexities"][0] for name, each in curves.items()}
    # Within the window and the trained context these leave the model as it is; linear and YaRN change it everywhere.
    for name in ("dynamic", "window", "window+sinks"):
        assert first[name] == pytest.approx(first["none"], rel=1e-4)
    last = {name: round(each["perplexities"][-1], 3) for name, each in curves.items()}
    assert len(set(last.values())) == len(last)
    assert curves["window"]["cache_bytes"] == curves["window+sinks"]["cache_bytes"] == curves["none"]["cache_bytes"] / 3
    table = files["markdown"].read_text()
    assert "| 24-48 (beyond) |" in table and "| 12-24 |" in table and table in capsys.readouterr().out
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lengths", "1"], "--lengths 1 scores no token"),
        (["--lengths", "9", "--chunk", "0"], "--chunk 0 makes no progress"),
        (["--lengths", "9", "--sinks", "16"], "--sinks 16 leaves no window of --window 16; use 0 to 15"),
        (["--lengths", "9", "--factor", "0.5"], "--factor 0.5 is below 1"),
        (["--lengths", "100000"], "fewer than --lengths 100000"),
        (["--lengths", "9", "--text", "/none"], "/none is missing"),
    ],
)
def test_what_measures_nothing_is_refused(
    command: list[str], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert long_context.main([*command, *changes]) == 2
    assert message in capsys.readouterr().err
