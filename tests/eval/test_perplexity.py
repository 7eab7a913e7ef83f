"""Perplexity: which tokens are scored, how often, from which context, and that the figure is everybody's figure."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import pydoc_data.topics
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import perplexity
from eval.perplexity import evaluate_artifact
from eval.protocols import Window, sliding_windows
from eval.scoring import score
from eval.streams import Stream
from quantize.config import EvalConfig
from quantize.errors import InputError

VOCABULARY = 320
BOS = VOCABULARY - 1


def previous_token_logits(seen: list[list[int]] | None = None) -> Callable[[Tensor], Tensor]:
    """A model that tells its context: the logit of token ``t`` after token ``p`` is ``sin(p * 31 + t)``."""

    def logits(ids: Tensor) -> Tensor:
        assert ids.dtype == torch.int64
        assert ids.shape[0] == 1
        if seen is not None:
            seen.append(ids[0].tolist())
        return torch.sin(ids[..., None] * 31.0 + torch.arange(VOCABULARY))

    return logits


def negative_log_likelihood(
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    window: int,
    stride: int,
    windows: int | None = None,
    bos_token_id: int | None = None,
) -> tuple[float, int]:
    """Sum of ``-log p`` over the scored tokens, and their number, as ``protocol=windows`` has it."""
    planned = sliding_windows(Stream(tokens), window, stride, limit=windows, bos=bos_token_id)

    def chunks(shown: Window) -> Iterator[Tensor]:
        yield from torch.split(logits(shown.ids[None, :-1])[0, shown.first - 1 :], 128)

    return score(chunks, planned), sum(len(each.ids) - each.first for each in planned)


def cost(previous: int, token: int) -> float:
    """``-log p`` of a token under :func:`previous_token_logits`."""
    scores = torch.sin(previous * 31.0 + torch.arange(VOCABULARY))
    return float(torch.logsumexp(scores, 0) - scores[token])


def scored_by_brute_force(length: int, window: int, stride: int, limit: int | None, bos: bool) -> list[tuple[int, int]]:
    """``(position, start of the window that scores it)`` of every scored token, found token by token."""
    scored: dict[int, int] = {}
    start, used = 0, 0
    while start + window <= length and (limit is None or used < limit):
        for position in range(start, start + window):
            if position not in scored and (bos or position > start):
                scored[position] = start
        start += stride
        used += 1
    return list(scored.items())


@st.composite
def protocols(draw: st.DrawFn) -> tuple[int, int, int, int | None, bool]:
    """Length, window, stride, limit on windows, BOS; the text has room for all windows."""
    window = draw(st.integers(2, 40))
    stride = draw(st.integers(1, window))
    length = draw(st.integers(window, 300))
    room = (length - window) // stride + 1
    return length, window, stride, draw(st.none() | st.integers(1, room)), draw(st.booleans())


@given(protocols())
def test_every_token_is_scored_once_by_the_first_window_that_can(protocol: tuple[int, int, int, int | None, bool]) -> None:
    length, window, stride, limit, bos = protocol
    tokens = torch.arange(length)  # every token is its own position
    total, count = negative_log_likelihood(
        previous_token_logits(), tokens, window=window, stride=stride, windows=limit, bos_token_id=BOS if bos else None
    )
    expected = scored_by_brute_force(length, window, stride, limit, bos)
    assert count == len(expected)
    costs = (cost(BOS if position == start else position - 1, position) for position, start in expected)
    assert total == pytest.approx(math.fsum(costs), rel=1e-5)


@given(protocols())
def test_windows_are_full_and_stride_apart(protocol: tuple[int, int, int, int | None, bool]) -> None:
    length, window, stride, limit, _ = protocol
    found = sliding_windows(Stream(torch.arange(length)), window, stride, limit=limit)
    starts = [int(each.ids[0]) for each in found]
    assert all(len(each.ids) == window for each in found)
    assert starts[0] == 0
    assert all(b - a == stride for a, b in itertools.pairwise(starts))
    assert starts[-1] + window <= length
    if limit is None:
        assert starts[-1] + stride + window > length
    else:
        assert len(starts) == limit


@pytest.mark.parametrize("window", [127, 128, 129, 300, 513])
def test_long_windows_are_scored_whole(window: int) -> None:
    tokens = torch.arange(2 * window) % VOCABULARY
    total, count = negative_log_likelihood(previous_token_logits(), tokens, window=window, stride=window)
    ids = tokens.view(2, window)
    expected = torch.nn.functional.cross_entropy(
        previous_token_logits()(ids[:1])[0, :-1], ids[0, 1:], reduction="sum"
    ) + torch.nn.functional.cross_entropy(previous_token_logits()(ids[1:])[0, :-1], ids[1, 1:], reduction="sum")
    assert count == 2 * (window - 1)
    assert total == pytest.approx(float(expected), rel=1e-6)


def test_windows_as_long_as_the_stride_do_not_overlap() -> None:
    seen: list[list[int]] = []
    _, count = negative_log_likelihood(previous_token_logits(seen), torch.arange(35), window=10, stride=10)
    # The last token of a window is only asked for.
    assert seen == [list(range(start, start + 9)) for start in (0, 10, 20)]
    assert count == 3 * 9


def test_bos_stands_before_each_window_and_its_first_token_counts() -> None:
    seen: list[list[int]] = []
    _, count = negative_log_likelihood(
        previous_token_logits(seen), torch.arange(20), window=10, stride=10, windows=2, bos_token_id=BOS
    )
    assert seen == [[BOS, *range(9)], [BOS, *range(10, 19)]]
    assert count == 20


@given(vocabulary=st.integers(2, 5000), window=st.integers(2, 200), bos=st.booleans())
def test_a_model_that_knows_nothing_has_the_vocabulary_for_perplexity(vocabulary: int, window: int, bos: bool) -> None:
    tokens = torch.randint(vocabulary, (2 * window,), generator=torch.Generator().manual_seed(0))
    total, count = negative_log_likelihood(
        lambda ids: torch.zeros(1, ids.shape[1], vocabulary),
        tokens,
        window=window,
        stride=window,
        bos_token_id=0 if bos else None,
    )
    assert math.exp(total / count) == pytest.approx(vocabulary, rel=1e-5)


@pytest.mark.parametrize(("length", "windows", "room"), [(0, None, 0), (9, None, 0), (9, 1, 0), (25, 3, 2)])
def test_a_text_that_is_too_short_is_refused_with_what_would_fit(length: int, windows: int | None, room: int) -> None:
    with pytest.raises(InputError, match=rf"{length} tokens, room for {room} windows of eval.seq_len=10; use eval.windows="):
        negative_log_likelihood(previous_token_logits(), torch.arange(length), window=10, stride=10, windows=windows)


# On a real model.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(pydoc_data.topics.topics["assignment"])
    return file


def plain_perplexity(model_path: Path, text: str, window: int, windows: int) -> float:
    """What anybody would write: transformers' own loss, window by window."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[: window * windows].view(windows, window)
    with torch.no_grad():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in tokens]
    return math.exp(sum(losses) / len(losses))


def test_the_figure_is_that_of_a_plain_loop_over_transformers(tiny_llama: Path, text: Path) -> None:
    result = evaluate_artifact(tiny_llama, EvalConfig(str(text), windows=4, seq_len=200))
    assert result["ppl"] == pytest.approx(plain_perplexity(tiny_llama, text.read_text(), 200, 4), rel=1e-5)
    assert result["protocol"] == {
        "name": "windows",
        "text": "text.txt",
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "part": "all",
        "window": 200,
        "stride": 200,
        "bos": False,
        "windows": 4,
        "tokens": 4 * 199,
        "words": result["protocol"]["words"],
        "bytes": result["protocol"]["bytes"],
    }
    tokens, size = 4 * 199, result["protocol"]["bytes"]
    assert result["byte_ppl"] == pytest.approx(result["ppl"] ** (tokens / size), rel=1e-9)
    assert result["word_ppl"] == pytest.approx(result["ppl"] ** (tokens / result["protocol"]["words"]), rel=1e-9)
    assert result["bits_per_byte"] == pytest.approx(math.log2(result["byte_ppl"]), rel=1e-9)
    assert result["divergence"] is None
    assert result["compute_dtype"] == "float32"
    assert result["consumer"].startswith("transformers ")
    assert 0 < result["peak_rss_bytes"] <= result["evaluation_peak_rss_bytes"]


def test_more_context_is_another_figure_over_more_tokens(tiny_llama: Path, text: Path) -> None:
    result = evaluate_artifact(tiny_llama, EvalConfig(str(text), windows=7, seq_len=64, stride=32, bos=True))
    assert result["protocol"]["tokens"] == 64 + 6 * 32
    assert math.isfinite(result["ppl"])


def test_a_diverged_model_has_no_perplexity(tiny_llama: Path, text: Path, tmp_path: Path) -> None:

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert evaluate_artifact(broken, EvalConfig(str(text), windows=1, seq_len=16))["ppl"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windows": 0}, "eval.windows=0 is below 1"),
        ({"seq_len": 1}, "eval.seq_len=1 is below 2"),
        ({"stride": 0}, "eval.stride=0 is not in 1..eval.seq_len=16"),
        ({"stride": 17}, "eval.stride=17 is not in 1..eval.seq_len=16"),
        ({"seq_len": 2049}, "eval.seq_len=2049 exceeds the model's context of 2048 tokens"),
        ({"seq_len": 2048, "bos": True}, "eval.seq_len=2048 exceeds the model's context"),
        ({"text": "nothing.txt"}, "eval.text=nothing.txt cannot be read"),
        ({"windows": 10_000}, "room for"),
    ],
)
def test_an_impossible_protocol_is_refused(tiny_llama: Path, text: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_artifact(tiny_llama, EvalConfig(**{"text": str(text), "windows": 1, "seq_len": 16, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\xfa"])
def test_a_text_without_text_is_refused(tiny_llama: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"eval.text=.*text.txt (is empty|cannot be read as UTF-8)"):
        evaluate_artifact(tiny_llama, EvalConfig(str(tmp_path / "text.txt"), windows=1, seq_len=16))


# The command line of its own.


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Undo what the command line does to logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_command_prints_and_writes_the_result(
    tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", str(text), "--windows", "2", "--seq-len", "32", "--json", str(tmp_path / "result.json")]
    assert perplexity.main([str(tiny_llama), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert printed["ppl"] == pytest.approx(plain_perplexity(tiny_llama, text.read_text(), 32, 2), rel=1e-5)


def damaged(source: Path, target: Path, kind: str) -> Path:
    """A copy of a model directory with something wrong."""
    shutil.copytree(source, target)
    if kind == "truncated":
        (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    elif kind == "config":
        (target / "config.json").write_text("{")
    elif kind == "no config":
        (target / "config.json").unlink()
    elif kind == "container":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "unheard-of"}}))
    elif kind == "tensor":
        tensors = load_file(target / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["truncated", "config", "no config", "container", "tensor"])
def test_a_damaged_artifact_is_one_line_and_two(
    tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    artifact = damaged(tiny_llama, tmp_path / "artifact", kind)
    assert perplexity.main([str(artifact), "--text", str(text), "--windows", "1", "--seq-len", "16"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("ERROR: ")
    assert str(artifact) in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def test_a_result_that_cannot_be_written_is_one_line_too(
    tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below" / "result.json"
    arguments = ["--text", str(text), "--windows", "1", "--seq-len", "16", "--json", str(place)]
    assert perplexity.main([str(tiny_llama), *arguments]) == 2
    assert f"ERROR: cannot write {place}" in capsys.readouterr().err
