"""GGUF files as gguf-py writes them, and what of them is in memory when."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import InputError
from quantize.gguf_header import TENSOR_KINDS
from quantize.gguf_reader import GgufReader

FLOATS32 = st.floats(width=32, allow_nan=False)
VALUES: dict[Type, st.SearchStrategy[Any]] = {
    Type.UINT8: st.integers(0, 2**8 - 1),
    Type.INT8: st.integers(-(2**7), 2**7 - 1),
    Type.UINT16: st.integers(0, 2**16 - 1),
    Type.INT16: st.integers(-(2**15), 2**15 - 1),
    Type.UINT32: st.integers(0, 2**32 - 1),
    Type.INT32: st.integers(-(2**31), 2**31 - 1),
    Type.FLOAT32: FLOATS32,
    Type.BOOL: st.booleans(),
    Type.STRING: st.text(max_size=40),
    Type.UINT64: st.integers(0, 2**64 - 1),
    Type.INT64: st.integers(-(2**63), 2**63 - 1),
    Type.FLOAT64: st.floats(allow_nan=False),
}
# Nested arrays as gguf-py types them: Python's numbers become INT32 and FLOAT32.
INNER = st.one_of(*(st.lists(VALUES[kind], min_size=1, max_size=4) for kind in (Type.INT32, Type.FLOAT32, Type.STRING)))
NESTED = st.one_of(
    st.lists(INNER, min_size=1, max_size=4), st.lists(st.lists(INNER, min_size=1, max_size=3), min_size=1, max_size=3)
)
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: key not in ("general.architecture", "general.alignment"))
SCALARS = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), st.none(), VALUES[kind]))
ARRAYS = st.sampled_from(sorted(VALUES)).flatmap(
    lambda kind: st.tuples(st.just(Type.ARRAY), st.just(kind), st.lists(VALUES[kind], min_size=1, max_size=50))
)
ENTRIES = st.dictionaries(KEYS, st.one_of(SCALARS, ARRAYS, st.tuples(st.just(Type.ARRAY), st.none(), NESTED)), max_size=12)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plain(value: Any) -> Any:
    """Numpy arrays as lists, at every depth."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(element) for element in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a tensor of every type gguf-py knows, of 1 to 4 dimensions. Read it only."""
    file: Path = tmp_path_factory.mktemp("gguf") / "every.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    generator = np.random.default_rng(0)
    for i, kind in enumerate(Kind):
        if kind is Kind.Q8_1:  # gguf-py's 40 bytes are not what ggml stores
            continue
        _, size = gguf.GGML_QUANT_SIZES[kind]
        rows = [(), (3,), (2, 5), (2, 3, 2)][i % 4]
        writer.add_tensor(f"tensor.{kind.name}", generator.integers(0, 256, (*rows, 2 * size), np.uint8), raw_dtype=kind)
    finish(writer)
    return file


@given(entries=ENTRIES)
def test_metadata_comes_back(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[Type, Type | None, Any]]
) -> None:
    file = tmp_path_factory.mktemp("gguf") / "made.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, (kind, element, value) in entries.items():
        writer.add_key_value(key, value, kind, element)
    finish(writer)
    reader = GgufReader(file)
    assert list(reader.fields) == ["general.architecture", *entries]
    for key, (kind, element, value) in entries.items():
        found = plain(reader.fields[key])
        assert found == value, key
        assert type(found) is type(value), key
        assert reader.encoded(key) == writer._pack_val(value, kind, add_vtype=True, sub_type=element)


def test_fields_are_a_mapping(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "made.gguf", "llama")
    writer.add_int8("a", -3)
    finish(writer)
    reader = GgufReader(tmp_path / "made.gguf")
    assert dict(reader.fields) == {"general.architecture": "llama", "a": -3}
    assert len(reader.fields) == 2
    assert "a" in reader.fields
    assert reader.fields.get("b", 4) == reader.field("b", 4) == 4
    assert reader.field("b", None) is None
    assert reader.field("a", 4) == -3
    assert reader.architecture == "llama"
    with pytest.raises(KeyError):
        reader.fields["b"]
    with pytest.raises(InputError, match=r"made\.gguf has no key b in its metadata"):
        reader.field("b")


def test_tensors_are_gguf_pys(every_kind: Path) -> None:
    expected = gguf.GGUFReader(every_kind).tensors
    reader = GgufReader(every_kind)
    assert list(reader.tensors) == [tensor.name for tensor in expected]
    for tensor in expected:
        found = reader.tensors[tensor.name]
        assert found.kind == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.offset, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
        data = reader.data(tensor.name)
        assert data.dtype == np.uint8
        assert data.shape == (*found.shape[:-1], found.row_bytes)
        assert data.tobytes() == tensor.data.tobytes()
        assert not data.flags.writeable
        assert not data.flags.owndata
    with pytest.raises(InputError, match=r"every\.gguf has no tensor nothing"):
        reader.data("nothing")


@given(
    tensors=st.lists(
        st.tuples(st.sampled_from([kind for kind in Kind if kind is not Kind.Q8_1]), st.lists(st.integers(1, 3), max_size=3)),
        max_size=6,
    ),
    alignment=st.sampled_from([8, 32, 256]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tensors_are_gguf_pys(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[Kind, list[int]]], alignment: int, seed: int
) -> None:
    file = tmp_path_factory.mktemp("gguf") / "made.gguf"
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_custom_alignment(alignment)
    for i, (kind, rows) in enumerate(tensors):
        raw = generator.integers(0, 256, (*rows, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        writer.add_tensor(f"{i}", raw, raw_dtype=kind)
    finish(writer)
    reader = GgufReader(file)
    assert reader.alignment == alignment
    expected = gguf.GGUFReader(file).tensors
    found = list(reader.tensors.values())
    assert [(t.name, t.kind, t.offset, t.nbytes) for t in found] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert reader.data(ours.name).tobytes() == theirs.data.tobytes()


def test_block_sizes_are_gguf_pys() -> None:
    ours = {name: (block, size) for name, block, size in TENSOR_KINDS.values()}
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert TENSOR_KINDS[int(kind)][0] == kind.name
        if kind is not Kind.Q8_1:  # two halves and 32 bytes in ggml-common.h
            assert ours[kind.name] == sizes


def test_every_truncation_is_refused(every_kind: Path, tmp_path: Path) -> None:
    reader = GgufReader(every_kind)
    first, *_, last = reader.tensors.values()
    end = last.offset + last.nbytes
    short = Path(shutil.copyfile(every_kind, tmp_path / "short.gguf"))
    with short.open("r+b") as file:
        # Nobody needs the padding behind the last tensor.
        file.truncate(end)
        assert GgufReader(short).data(last.name).tobytes() == reader.data(last.name).tobytes()
        for kept in [end - 1, *range(end - 2, first.offset, -97), *range(first.offset, 0, -3)]:
            file.truncate(kept)
            with pytest.raises(InputError, match=r"short\.gguf is not a readable GGUF model"):
                GgufReader(short)


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(InputError, match=r"empty\.gguf is not a readable GGUF model \(it is empty\)"):
        GgufReader(tmp_path / "empty.gguf")
    with pytest.raises(InputError, match=r"nothing\.gguf cannot be read"):
        GgufReader(tmp_path / "nothing.gguf")
    with pytest.raises(InputError, match=r"is no file; give a \.gguf file"):
        GgufReader(tmp_path)


def test_vocabularies_are_decoded_when_asked_for(tmp_path: Path) -> None:
    tokens = [f"token {i} ✓" for i in range(150_000)]
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_token_list(tokens)
    finish(writer)
    tracemalloc.start()
    reader = GgufReader(tmp_path / "large.gguf")
    assert tracemalloc.get_traced_memory()[1] < 1 << 17
    tracemalloc.stop()
    assert reader.fields["tokenizer.ggml.tokens"] == tokens
    assert reader.fields["tokenizer.ggml.tokens"] is reader.field("tokenizer.ggml.tokens")


def resident(file: Path) -> list[int]:
    """KiB in memory of each of this process's maps of the file."""
    maps = Path("/proc/self/smaps").read_text().split("\n")
    headers = [i for i, line in enumerate(maps) if line.endswith(str(file))]
    return [int(next(line for line in maps[i:] if line.startswith("Rss:")).split()[1]) for i in headers]


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from Linux's /proc")
def test_release_gives_the_pages_back(tmp_path: Path) -> None:
    weights = np.ones((1024, 1024), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_tensor("a", weights)
    finish(writer)
    reader = GgufReader(tmp_path / "large.gguf")
    data = reader.data("a")
    assert data.view(np.float32).sum() == weights.sum()
    assert sum(resident(reader.path)) >= 4096
    reader.release()
    assert np.array_equal(data.view(np.float32), weights), "a view outlives the release"
    del data
    reader.release()
    assert len(resident(reader.path)) == 1
    assert sum(resident(reader.path)) < 1024
    assert reader.field("general.architecture") == "llama"
    assert reader.data("a").view(np.float32)[-1, -1] == 1
    del reader
    assert resident(tmp_path / "large.gguf") == []


def test_release_notices_another_file(every_kind: Path, tmp_path: Path) -> None:
    reader = GgufReader(shutil.copyfile(every_kind, tmp_path / "made.gguf"))
    (tmp_path / "other.gguf").write_bytes(every_kind.read_bytes())
    (tmp_path / "other.gguf").replace(reader.path)
    with pytest.raises(InputError, match=r"made\.gguf was changed while it was being read"):
        reader.release()


def test_import_is_light() -> None:
    """Commands that need no network of tensors should not wait for PyTorch."""
    code = "import sys, quantize.gguf_reader; print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert found.stdout == "[]\n"
