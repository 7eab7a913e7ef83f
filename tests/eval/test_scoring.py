"""Scoring in chunks: the same figures as from all logits at once, whatever stands behind a model's head."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from eval import scoring
from eval.consumers import transformers_model
from eval.consumers.base import LoadedArtifact
from eval.protocols import Window
from eval.scoring import chunked, likelihood, score


def windows(vocabulary: int, *firsts: int) -> list[Window]:
    """Random windows of 40 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [Window(torch.randint(2, vocabulary, (40,), generator=generator), first) for first in firsts]


def loaded(path: Path) -> LoadedArtifact:
    """A checkpoint in its consumer, in float32."""
    return transformers_model.for_evaluation(transformers_model.load(path, "cpu"))


def by_hand(path: Path, shown: list[Window]) -> float:
    """The same sum from a model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for window in shown:
            logits = model(input_ids=window.ids[None]).logits[0, window.first - 1 : -1].double()
            total += torch.nn.functional.cross_entropy(logits, window.ids[window.first :], reduction="sum").item()
    return total


@pytest.mark.parametrize("rows", [1, 16, 10_000])
def test_chunks_give_the_figure_of_all_logits(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(scoring, "rows_in_chunk", lambda _: rows)
    shown = windows(300, 1, 1, 25, 39)
    assert score(chunked(loaded(tiny_llama)), shown) == pytest.approx(by_hand(tiny_llama, shown), rel=1e-6)


@pytest.mark.parametrize("size", [64, 4096, 2**25])
def test_slices_of_the_vocabulary_give_it_too(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 8 * size)
    shown, artifact = windows(300, 1, 1, 25, 39), loaded(tiny_llama)
    assert artifact.head_weight is not None
    asked, head = [], artifact.head

    def counting(hidden: Tensor) -> Tensor:
        asked.append(len(hidden))
        assert head is not None
        return head(hidden)

    found = likelihood(dataclasses.replace(artifact, head=counting), shown)
    assert asked == [8]  # what is tried out, and no row of any window
    assert found == pytest.approx(by_hand(tiny_llama, shown), rel=1e-6)


def test_logits_are_made_for_scored_positions_alone_and_never_for_a_window(tiny_llama: Path) -> None:
    artifact, asked = loaded(tiny_llama), []
    head = artifact.head
    assert head is not None

    def counting(hidden: Tensor) -> Tensor:
        asked.append(len(hidden))
        return head(hidden)

    counted = dataclasses.replace(artifact, head=counting)
    score(chunked(counted), windows(300, 30, 20))
    assert asked == [8, 10, 20]  # what is tried out, and the two windows' scored positions
    assert scoring.rows_in_chunk(49152) * 49152 * 4 <= scoring.CHUNK_BYTES


def test_a_model_that_bounds_its_logits_is_asked_for_them_whole(
    make_checkpoint: Callable[..., Path], tmp_path: Path, tiny_llama: Path
) -> None:
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=1.0,
        max_position_embeddings=256,
    )
    make_checkpoint(tmp_path / "gemma", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path / "gemma" / name)
    shown = windows(300, 1, 12)
    artifact = loaded(tmp_path / "gemma")
    assert artifact.head_weight is not None
    for found in (score(chunked(artifact), shown), likelihood(artifact, shown)):
        assert found == pytest.approx(by_hand(tmp_path / "gemma", shown), rel=1e-6)


def test_a_consumer_without_a_head_is_enough(tiny_llama: Path) -> None:
    artifact = loaded(tiny_llama)
    plain = dataclasses.replace(artifact, head=None, hidden=None)
    shown = windows(300, 1, 7)
    assert likelihood(plain, shown) == pytest.approx(score(chunked(artifact), shown), rel=1e-6)


def test_a_model_that_diverged_scores_nan_or_infinity() -> None:
    def chunks(window: Window) -> Iterator[Tensor]:
        yield torch.full((len(window.ids) - window.first, 5), math.nan)

    assert not math.isfinite(score(chunks, windows(5, 1)))
