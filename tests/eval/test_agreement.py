"""Our perplexities beside those of llama-perplexity and lm-eval on the demo model, and the bench beside a plain loop."""

from __future__ import annotations

import json
import logging
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval import agreement, bench_scoring
from eval.agreement import Row, beside_llamacpp, beside_lm_eval, render
from eval.llamacpp_tools import find_tool
from quantize.demo_model import demo_model

LLAMACPP, LM_EVAL = 0.002, 0.001  # how far our figures may be from theirs


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Undo what the command lines do to logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages in WikiText's manner, with line ends, escapes and special tokens that programs read differently."""
    topics = pydoc_data.topics.topics
    file = tmp_path_factory.mktemp("text") / "prose.raw"
    chosen = ("assignment", "class", "dynamic-features", "exceptions", "imports", "with", "formatstrings")
    pages = [f" = {name} = \n \n {topics[name]} \n" for name in chosen if name in topics]
    # Early, where the first windows meet them.
    oddities = " a quoted \\n escape , a \\x41 , a tab \\t and <|im_start|> spelled out \n"
    pages[0] = " = Oddities = \n" + oddities + pages[0].lstrip(" =")
    file.write_bytes("".join(pages).replace("\n", "\r\n").encode())
    return file


@pytest.mark.slow
@pytest.mark.parametrize("context", [128, 512])
def test_the_figure_is_llama_perplexitys(prose: Path, context: int) -> None:
    if find_tool("llama-perplexity") is None:
        pytest.skip("needs llama.cpp's tools: `make llamacpp`")
    (row,) = beside_llamacpp(demo_model(), prose, context=context, windows=6)
    assert abs(row.difference) < LLAMACPP, row


@pytest.mark.slow
def test_the_figures_are_lm_evals(prose: Path) -> None:
    rows = beside_lm_eval(demo_model(), prose, window=512, number=3)
    assert [row.figure for row in rows] == ["word_ppl", "byte_ppl", "bits_per_byte"]
    assert all(abs(row.difference) < LM_EVAL for row in rows), rows


@pytest.mark.slow
def test_lm_evals_own_task_agrees_on_a_tiny_model(tiny_llama: Path, prose: Path) -> None:
    rows = beside_lm_eval(tiny_llama, prose, window=256, number=1)
    assert all(abs(row.difference) < LM_EVAL for row in rows), rows


def test_the_table_gives_both_figures_and_their_difference() -> None:
    text = render([Row("llamacpp", "ppl", 20.02, 20.0, "llama-perplexity", 4080)])
    assert text.splitlines()[-1] == "| llamacpp | ppl | 20.0200 | 20.0000 | llama-perplexity | +0.1000% | 4,080 |"


def test_a_text_that_is_not_there_is_one_line_and_two(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main([str(tiny_llama), "--text", "nothing.raw"]) == 2
    assert "nothing.raw" in capsys.readouterr().err


def test_the_bench_measures_both_sides_of_one_figure(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_scoring.main([str(tiny_llama), "--windows", "2", "--seq-len", "64", "--rounds", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * 63
    assert found["speedup"] == pytest.approx(found["seconds_plain"] / found["seconds_here"], rel=0.9)
    assert found["memory_growth_here"] >= 0
