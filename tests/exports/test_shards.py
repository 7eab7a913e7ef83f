"""Sharded safetensors directories: what is written comes back, and equal input gives equal bytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from exports.shards import INDEX_FILE, SINGLE_FILE, read_shards, shard_files, write_shards
from exports.stream import SafetensorsWriter

KIB = 1024
KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


def tensors() -> Iterator[tuple[str, Tensor]]:
    """Five tensors of 1 KiB each in four types."""
    generator = torch.Generator().manual_seed(0)
    for i, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.float16)):
        values = torch.randn(KIB // dtype.itemsize // 8, 8, generator=generator)
        yield f"tensor.{4 - i}", (values * 1000).to(dtype)


def test_small_models_are_one_file(tmp_path: Path) -> None:
    write_shards(tmp_path, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]
    assert shard_files(tmp_path) == [tmp_path / SINGLE_FILE]


@pytest.mark.parametrize(("shard_bytes", "shards"), [(5 * KIB, 1), (2 * KIB, 3), (2 * KIB - 1, 5), (1, 5)])
def test_tensors_come_back_from_any_number_of_shards(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    write_shards(tmp_path, tensors(), shard_bytes)
    files = shard_files(tmp_path)
    assert len(files) == shards
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {path.name for path in files}
    found = read_shards(tmp_path)
    assert found.keys() == dict(tensors()).keys()
    for name, tensor in tensors():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_index_is_hugging_faces(tmp_path: Path) -> None:
    write_shards(tmp_path, tensors(), 2 * KIB)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 5 * KIB}
    assert index["weight_map"] == {
        "tensor.4": "model-00001-of-00003.safetensors",
        "tensor.3": "model-00001-of-00003.safetensors",
        "tensor.2": "model-00002-of-00003.safetensors",
        "tensor.1": "model-00002-of-00003.safetensors",
        "tensor.0": "model-00003-of-00003.safetensors",
    }


@pytest.mark.parametrize("shard_bytes", [2 * KIB, 64 * KIB])
def test_equal_input_gives_equal_bytes(tmp_path: Path, shard_bytes: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, tensors(), shard_bytes)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


def test_views_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    write_shards(tmp_path, iter([("turned", matrix.t()), ("empty", torch.zeros(0, 4)), ("scalar", torch.tensor(2.5))]))
    found = read_shards(tmp_path)
    assert torch.equal(found["turned"], matrix.t())
    assert found["empty"].shape == (0, 4)
    assert float(found["scalar"]) == 2.5


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Each full shard is on disk before the tensors after it are asked for."""
    seen: list[int] = []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for item in tensors():
            seen.append(len(list(tmp_path.glob("shard-*.safetensors"))))
            yield item

    write_shards(tmp_path, watched(), 2 * KIB)
    assert seen == [0, 0, 0, 1, 1]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_streamed_file_is_the_packages_own(kinds: list[torch.dtype], random: Random) -> None:
    """Whatever the order tensors come in, whatever their types and shapes: the same bytes as ``save_file`` writes."""
    named = {}
    for number, kind in enumerate(kinds):
        shape = [random.randint(0, 5) for _ in range(random.randint(0, 3))]
        named[random.choice('abĂ"') + str(number)] = (torch.rand(shape) * 100).to(kind)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        with SafetensorsWriter(ours, {"format": "pt"}) as writer:
            for name in random.sample(list(named), len(named)):
                writer.add(name, named[name])
        save_file(named, theirs, metadata={"format": "pt"})
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_failed_stream_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors are named a"), SafetensorsWriter(tmp_path / "file", {}) as writer:
        writer.add("a", torch.ones(2))
        writer.add("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_a_type_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"), SafetensorsWriter(tmp_path / "file", {}) as writer:
        writer.add("a", torch.ones(2, dtype=torch.complex64))
