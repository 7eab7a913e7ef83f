"""Ranks together against one rank: logits, and the bytes between them. Ranks are threads here, with gloo between them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from exports.base import Artifact
from exports.containers import CONTAINERS
from inference import parallel, pipeline
from inference.config import ModelConfig
from inference.context import last_rows
from inference.int4 import Int4Codes
from inference.kv_cache import KVCache
from inference.link import Link
from inference.load import LoadOptions, load
from inference.parallel import load_tensor_parallel
from inference.pipeline import MicroBatch, load_stage
from inference.shards import cut_codes, deal, part_of
from quantize.errors import InputError
from quantize.grids import Grid, quantize_nearest

TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]
SIZES = {"vocab_size": 301, "intermediate_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 64}
HEADS = {
    "whole groups": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "uneven groups": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32},
    "one key head": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
}


def together(ranks: int, work: Callable[[Link], Any]) -> list[Any]:
    """What ``work`` gives on each rank."""
    store = dist.HashStore()

    def run(rank: int) -> Any:
        with torch.inference_mode():
            group: Any = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=30))
            return work(Link(group))

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
        for future in as_completed(futures):
            future.result()  # whoever fails first says why; the others only wait for it
    return [future.result() for future in futures]


@torch.inference_mode()
def alone(path: Path, options: LoadOptions) -> Tensor:
    """One rank's logits of every position, from a prefill and a step."""
    model = load(path, options)
    return both_phases(model, KVCache(model.config, 32))


def both_phases(model: Any, cache: KVCache) -> Tensor:
    """Logits of every position: all but the last token at once, then that."""
    tokens = torch.tensor(TOKENS)
    first = model.forward(tokens[:-1], cache.context([len(TOKENS) - 1]))
    return torch.cat((first, model.forward(tokens[-1:], cache.context([1]))))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Callable[[str], Path]:
    """``dense(heads)``: a tiny float16 model with such heads."""
    made: dict[str, Path] = {}

    def model(heads: str) -> Path:
        if heads not in made:
            path = tmp_path_factory.mktemp("parallel") / "dense"
            made[heads] = make_checkpoint(path, LlamaConfig(**SIZES, **HEADS[heads]))
        return made[heads]

    return model


def check_ranks(path: Path, ranks: int, options: LoadOptions, tolerance: float) -> list[Link]:
    """Every rank has one rank's logits; the links, for what went over them."""

    def rank(link: Link) -> tuple[Link, Tensor, int]:
        model = load_tensor_parallel(path, link, options)
        cache = KVCache(model.config, 32)
        return link, both_phases(model, cache), cache.nbytes()

    wanted = alone(path, options)
    found = together(ranks, rank)
    for _, logits, _ in found:
        torch.testing.assert_close(logits, wanted, atol=tolerance, rtol=0)
    return [link for link, _, _ in found]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_dense_ranks_give_one_ranks_logits_and_send_what_the_formula_says(
    dense: Callable[[str], Path], heads: str, ranks: int
) -> None:
    path = dense(heads)
    config = load(path).config
    links = check_ranks(path, ranks, LoadOptions(), 1e-4)
    summed, gathered = parallel.bytes_per_token(config, ranks)
    for link in links:
        assert link.reduced_bytes == summed * len(TOKENS)
        assert link.gathered_bytes == gathered * len(TOKENS)


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_int8_codes_are_split(dense: Callable[[str], Path], make_int8: Any, tmp_path: Path, activations: str) -> None:
    path = make_int8(dense("uneven groups"), tmp_path / "int8", activations)
    links = check_ranks(path, 3, LoadOptions(), 1e-4)
    config = load(path).config
    scales = 2 * config.num_layers if activations == "dynamic" else 0
    assert links[0].reduced_bytes == parallel.bytes_per_token(config, 3, scales)[0] * len(TOKENS)


@pytest.mark.parametrize("weights", ["artifact", "int4"])
@pytest.mark.parametrize("container", ["gptq", "compressed-tensors"])
def test_int4_codes_are_split(dense: Callable[[str], Path], tmp_path: Path, weights: str, container: str) -> None:
    source, grid = dense("whole groups"), Grid(4, 64, True, 0)
    stored = load_file(source / "model.safetensors")
    layers = {name.removesuffix(".weight"): quantize_nearest(stored.pop(name), grid) for name in [*stored] if "_proj." in name}
    config = json.loads((source / "config.json").read_text())
    artifact = Artifact(config, stored.items(), layers.items(), grid, (), {}, dict.fromkeys(layers, grid), ("lm_head",))
    CONTAINERS[container].write(tmp_path, artifact)
    # The kernel rounds what it multiplies and each rank's output to bfloat16, so the ranks' sum is rounded differently.
    check_ranks(tmp_path, 2, LoadOptions(weights=weights), 1e-4 if weights == "artifact" else 0.1)


def test_biases_of_summed_layers_are_added_once(tmp_path: Path, make_checkpoint: Any) -> None:
    config = LlamaConfig(**SIZES, **HEADS["whole groups"], attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    check_ranks(make_checkpoint(tmp_path / "biases", config), 2, LoadOptions(), 1e-4)


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from([1, 16]))
def test_everything_is_dealt_once(total: int, ranks: int, unit: int) -> None:
    parts = deal(total * unit, ranks, unit)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(total * unit))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= unit and sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_every_query_head_meets_its_key_head(group: int, kv_heads: int, data: st.DataObject) -> None:
    heads = group * kv_heads
    ranks = data.draw(st.integers(1, heads))
    config = shape(heads, kv_heads)
    parts = [part_of(config, rank, ranks) for rank in range(ranks)]
    assert [query for part in parts for query in part.queries] == list(range(heads))
    for part in parts:
        local = len(part.queries) // len(part.keys)
        assert local * len(part.keys) == len(part.queries)
        assert [part.keys[index // local] for index in range(len(part.queries))] == [query // group for query in part.queries]
    if kv_heads >= ranks:  # no key head is stored twice
        assert sum(len(part.keys) for part in parts) == kv_heads


def shape(heads: int, kv_heads: int) -> ModelConfig:
    """A config with so many heads."""
    return ModelConfig(1, 8, 64, 10, 4, heads, kv_heads, 1e-5, False, False, {}, 8, ())


@given(st.sampled_from([32, 64, 128]), st.integers(0, 8), st.integers(1, 8), st.booleans(), st.booleans())
def test_a_cut_of_codes_is_the_cut_of_the_weight(size: int, start: int, count: int, shuffled: bool, by_rows: bool) -> None:
    generator = torch.Generator().manual_seed(start)
    codes = torch.randint(16, (128, 512), generator=generator, dtype=torch.uint8)
    scales = torch.rand(128, 512 // size, generator=generator)
    order = torch.randperm(512, generator=generator) if shuffled else None
    whole = Int4Codes(codes, scales, -8 * scales, order)
    rows = torch.arange(16 * (start % 4), 16 * (start % 4 + 2)) if by_rows else None
    columns = None if by_rows else slice(32 * start, 32 * (start + count))
    cut = cut_codes(whole, rows, columns)
    weight = whole.dequantize()[rows if rows is not None else slice(None), columns or slice(None)]
    assert torch.equal(cut.dequantize() if isinstance(cut, Int4Codes) else cut, weight)
    assert isinstance(cut, Int4Codes) == (by_rows or not shuffled)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pipeline_gives_one_ranks_logits(dense: Callable[[str], Path], ranks: int) -> None:
    path = dense("uneven groups")
    whole = load(path)
    prompts = [TOKENS[:5], TOKENS[3:4], TOKENS[4:11]]

    def steps(forward: Callable[[list[list[int]]], list[Tensor]]) -> Tensor:
        """A prefill of three sequences and two steps with the likeliest tokens."""
        found, tokens = [], prompts
        for _ in range(3):
            logits = forward(tokens)
            found.append(torch.stack(logits))
            tokens = [[int(row.argmax())] for row in logits]
        return torch.cat(found)

    def one_rank() -> Tensor:
        cache = KVCache(whole.config, 32, slots=3)

        def forward(tokens: list[list[int]]) -> list[Tensor]:
            counts = [len(part) for part in tokens]
            packed = torch.tensor([token for part in tokens for token in part])
            return list(whole.forward(packed, cache.context(counts), last_rows(counts)))

        with torch.inference_mode():
            return steps(forward)

    def rank(link: Link) -> tuple[Tensor, int]:
        stage = load_stage(path, link)
        cache = KVCache(stage.model.config, 32, slots=3)

        def forward(tokens: list[list[int]]) -> list[Tensor]:
            micro = [
                MicroBatch(torch.tensor(part), cache.context([len(part)], [slot]), torch.tensor([len(part) - 1]))
                for slot, part in enumerate(tokens)
            ]
            logits = stage.forward(micro)
            both = torch.cat(logits) if logits is not None else torch.empty(3, whole.config.vocab_size)
            return list(stage.share(both))

        return steps(forward), link.sent_bytes

    wanted = one_rank()
    found = together(ranks, rank)
    hidden_bytes = pipeline.bytes_per_token(whole.config) * (sum(map(len, prompts)) + 2 * len(prompts))
    for index, (logits, sent) in enumerate(found):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
        assert sent == (hidden_bytes if index < ranks - 1 else wanted.numel() * 4)


def test_what_cannot_be_split_is_refused(dense: Callable[[str], Path], make_int8: Any, tmp_path: Path) -> None:
    path = dense("one key head")
    one = together(1, lambda link: link)[0]
    with pytest.raises(InputError, match="weights=int8 rounds on load"):
        load_tensor_parallel(path, one, LoadOptions(weights="int8"))
    with pytest.raises(InputError, match="ranks=5 cannot share 4 query heads; use 1 to 4"):
        together(5, lambda link: load_tensor_parallel(path, link))
    with pytest.raises(InputError, match="ranks=5 cannot share 4 blocks; use 1 to 4"):
        together(5, lambda link: load_stage(path, link))
    grouped = make_int8(path, tmp_path / "grouped", "none", 64)
    with pytest.raises(InputError, match="cut groups of 64"):
        together(4, lambda link: load_tensor_parallel(grouped, link))
    assert_whole = check_ranks(make_int8(dense("whole groups"), tmp_path / "fitting", "none", 64), 2, LoadOptions(), 1e-4)
    assert len(assert_whole) == 2


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_agree_too(dense: Callable[[str], Path], tmp_path: Path, ranks: int) -> None:
    """The same between processes, started as a user would."""
    command = [sys.executable, "-m", "inference.parallel_check", str(dense("whole groups")), "--store", str(tmp_path / "store")]
    started = [
        subprocess.Popen([*command, "--ranks", str(ranks), "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    report = json.loads(outputs[0])
    assert report["tensor"]["largest_difference"] < 1e-4 and report["pipeline"]["largest_difference"] < 1e-4
    assert report["tensor"]["bytes_per_token"] == report["tensor"]["formula"]
    assert report["pipeline"]["bytes_per_token"] == report["pipeline"]["formula"]
