"""Divergence: against exact sums on small vocabularies, against itself, and that nothing unlike is ever compared."""

from __future__ import annotations

import json
import logging
import math
import pydoc_data.topics
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval import perplexity
from eval.divergence import Comparison, kl_divergence
from eval.perplexity import evaluate_artifact
from eval.protocols import Window
from eval.reference import Reference, partition, writing
from eval.scoring import score
from quantize.config import EvalConfig
from quantize.errors import InputError

META: dict[str, Any] = {"protocol": {"name": "windows"}, "tokens_sha256": "0" * 64, "artifact_fingerprint": "f", "name": "base"}


def logits_like(generator: torch.Generator, shape: tuple[int, int], spread: float) -> tuple[Tensor, Tensor]:
    """Two sets of logits, the second a disturbed copy of the first."""
    first = torch.randn(shape, generator=generator) * 3
    return first, first + spread * torch.randn(shape, generator=generator)


def exact(first: Tensor, second: Tensor) -> Tensor:
    """The divergence over the whole vocabulary."""
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def bounded(first: Tensor, second: Tensor, k: int) -> Tensor:
    """The divergence with all but the ``k`` likeliest as one."""
    targets = torch.zeros(len(first), dtype=torch.int64)
    ids = first.topk(k).indices
    return kl_divergence(partition(first.clone(), ids, targets), partition(second.clone(), ids, targets))


@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 60), spread=st.floats(0, 3), data=st.data())
def test_it_is_a_lower_bound_that_rises_to_the_exact_divergence(
    seed: int, vocabulary: int, spread: float, data: st.DataObject
) -> None:
    first, second = logits_like(torch.Generator().manual_seed(seed), (5, vocabulary), spread)
    full = exact(first, second)
    smaller, larger = sorted(data.draw(st.lists(st.integers(1, vocabulary), min_size=2, max_size=2)))
    low, high = bounded(first, second, smaller), bounded(first, second, larger)
    assert (low >= 0).all()
    assert (low <= high + 1e-5).all()
    assert (high <= full + 1e-5).all()
    torch.testing.assert_close(bounded(first, second, vocabulary), full, rtol=1e-4, atol=1e-5)


def test_probabilities_of_a_partition_sum_to_one() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 20
    ids = logits.topk(10).indices
    parts = partition(logits.clone(), ids, ids[:, 0])
    torch.testing.assert_close(
        parts.logp.double().exp().sum(-1) + parts.rest.double().exp(), torch.ones(4).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(parts.true, logits.log_softmax(-1).gather(1, ids[:, :1])[:, 0])


def compare(first: list[Tensor], second: list[Tensor], shown: list[Window], file: Path, k: int) -> dict[str, Any]:
    """Store the first logits as a reference, and compare the second with it."""

    def chunks(logits: list[Tensor]) -> Any:
        remaining = iter(logits)

        def give(_: Window) -> Iterator[Tensor]:
            yield from torch.split(next(remaining).clone(), 7)

        return give

    with writing(file, k) as writer:
        score(chunks(first), shown, writer)
        writer.finish(META)
    watcher = Comparison(Reference(file))
    score(chunks(second), shown, watcher)
    return watcher.result()


@given(seed=st.integers(0, 2**31), k=st.integers(1, 40))
def test_all_figures_are_those_of_exact_sums(tmp_path_factory: pytest.TempPathFactory, seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shown = [Window(torch.randint(40, (24,), generator=generator), first) for first in (1, 12)]
    pairs = [logits_like(generator, (len(w.ids) - w.first, 40), 1.0) for w in shown]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = compare(first, second, shown, tmp_path_factory.mktemp("reference") / "r.npz", k)
    targets = torch.cat([w.ids[w.first :] for w in shown])
    one, other = torch.cat(first), torch.cat(second)
    kld = bounded(one, other, k).numpy()
    was, now = one.argmax(-1), other.argmax(-1)
    assert found["tokens"] == 23 + 12
    assert found["kld_mean"] == pytest.approx(kld.mean(), rel=1e-4, abs=1e-6)
    assert found["kld_median"] == pytest.approx(np.median(kld), rel=1e-4, abs=1e-6)
    assert found["kld_p99"] == pytest.approx(np.percentile(kld, 99), rel=1e-4, abs=1e-6)
    assert found["kld_max"] == pytest.approx(kld.max(), rel=1e-4, abs=1e-6)
    assert found["top1_agreement"] == pytest.approx(float((was == now).float().mean()))
    assert found["flips_lost"] == int(((was == targets) & (now != targets)).sum())
    assert found["flips_won"] == int(((was != targets) & (now == targets)).sum())
    base = torch.nn.functional.cross_entropy(one.double(), targets)
    assert found["reference"]["ppl"] == pytest.approx(float(base.exp()), rel=1e-5)
    assert sum(part["tokens"] for part in found["per_position"]) == 35
    mean = sum(part["kld_mean"] * part["tokens"] for part in found["per_position"]) / 35
    assert mean == pytest.approx(found["kld_mean"], rel=1e-9)


def test_positions_are_told_apart(tmp_path: Path) -> None:
    first = torch.randn(15, 30, generator=torch.Generator().manual_seed(3))
    second = first.clone()
    second[8:] = -second[8:]  # the second half of the window
    found = compare([first], [second], [Window(torch.zeros(16, dtype=torch.int64), 1)], tmp_path / "r.npz", 5)
    near = [part for part in found["per_position"] if part["to"] <= 0.5]
    far = [part for part in found["per_position"] if part["from"] >= 0.625]
    assert all(part["kld_mean"] < 1e-9 and part["top1_agreement"] == 1.0 for part in near)
    assert all(part["kld_mean"] > 0.1 and part["top1_agreement"] == 0.0 for part in far)


def test_a_model_that_diverged_has_no_divergence(tmp_path: Path) -> None:
    first = torch.randn(15, 30)
    found = compare(
        [first], [torch.full_like(first, math.nan)], [Window(torch.zeros(16, dtype=torch.int64), 1)], tmp_path / "r.npz", 5
    )
    assert found["kld_mean"] is found["kld_median"] is found["kld_max"] is None
    json.dumps(found, allow_nan=False)


# On a real model, by the command line.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(pydoc_data.topics.topics["assignment"])
    return file


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Undo what the command line does to logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


OPTIONS = ["--windows", "3", "--seq-len", "48", "--top-k", "20"]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny model says of the text."""
    file = tmp_path_factory.mktemp("reference") / "reference.npz"
    evaluate_artifact(tiny_llama, EvalConfig(str(text), 3, 48, top_k=20), save_reference=file)
    return file


@pytest.fixture(scope="module")
def disturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one layer's weights a tenth larger."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("disturbed") / "model")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_does_not_diverge_from_itself(tiny_llama: Path, text: Path, reference: Path) -> None:
    found = evaluate_artifact(tiny_llama, EvalConfig(str(text), 3, 48), reference=reference)
    divergence = found["divergence"]
    assert divergence["kld_max"] < 1e-9
    assert divergence["top1_agreement"] == 1.0
    assert divergence["flips_lost"] == divergence["flips_won"] == 0
    assert divergence["reference"]["ppl"] == pytest.approx(found["ppl"], rel=1e-6)
    assert divergence["reference"]["artifact_fingerprint"] == found["artifact_fingerprint"]


def test_saving_measures_the_same_perplexity_and_gives_the_same_bytes(
    tiny_llama: Path, text: Path, reference: Path, tmp_path: Path
) -> None:
    config = EvalConfig(str(text), 3, 48, top_k=20)
    saved = evaluate_artifact(tiny_llama, config, save_reference=tmp_path / "again.npz")
    assert saved["ppl"] == pytest.approx(evaluate_artifact(tiny_llama, config)["ppl"], rel=1e-6)
    assert (tmp_path / "again.npz").read_bytes() == reference.read_bytes()
    with np.load(reference, allow_pickle=False) as stored:
        assert stored["0/ids"].dtype == np.uint16
        assert stored["2/logp"].shape == (47, 20)


def test_a_disturbed_layer_shows(
    disturbed: Path, text: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(disturbed), "--text", str(text), *OPTIONS, "--reference", str(reference), "--record"]
    assert perplexity.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["divergence"]["kld_mean"] > 1e-6
    assert printed["divergence"]["top1_agreement"] < 1.0
    assert json.loads((disturbed / "evaluation.json").read_text())["divergence"] == printed["divergence"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": 2}, r"was made with windows=3, not 2"),
        ({"seq_len": 47}, r"was made with window=48, not 47"),
        ({"protocol": "strided"}, r"was made with name='windows', not 'strided'"),
        ({"bos": True}, r"was made with bos=False, not True"),
    ],
)
def test_another_protocol_is_not_compared(
    tiny_llama: Path, text: Path, reference: Path, change: dict[str, Any], words: str
) -> None:
    config = EvalConfig(**{"text": str(text), "windows": 3, "seq_len": 48, **change})
    with pytest.raises(InputError, match=words):
        evaluate_artifact(tiny_llama, config, reference=reference)


def test_another_text_or_tokenizer_is_not_compared(tiny_llama: Path, text: Path, reference: Path, tmp_path: Path) -> None:
    changed = tmp_path / text.name
    changed.write_text(text.read_text() + "more")
    with pytest.raises(InputError, match="was made with text_sha256="):
        evaluate_artifact(tiny_llama, EvalConfig(str(changed), 3, 48), reference=reference)
    other = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"the tokenizers differ|was made with tokens"):
        evaluate_artifact(other, EvalConfig(str(text), 3, 48), reference=reference)


@pytest.mark.parametrize("kind", ["missing", "text", "short", "inside"])
def test_a_damaged_reference_is_refused(tiny_llama: Path, text: Path, reference: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "reference.npz"
    if kind == "text":
        file.write_text("no archive")
    elif kind == "short":
        file.write_bytes(reference.read_bytes()[:-200])
    elif kind == "inside":
        data = bytearray(reference.read_bytes())
        data[300:400] = bytes(100)
        file.write_bytes(data)
    with pytest.raises(InputError, match=r"reference\.npz (does not exist|is no whole reference|is damaged)"):
        evaluate_artifact(tiny_llama, EvalConfig(str(text), 3, 48), reference=file)
