"""GGUF files built byte by byte: what gguf-py never writes, and what nobody should."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from quantize.errors import InputError
from quantize.gguf_header import MAX_DEPTH, MAX_ELEMENTS, MAX_HEADER, MAX_KEYS, MAX_TENSORS
from quantize.gguf_reader import GgufReader


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, value: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + value


def info(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's description, dimensions in the file's order."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    tensors = len(infos) if tensor_count is None else tensor_count
    count = len(keys) if key_count is None else key_count
    header = magic + struct.pack("<IQQ", version, tensors, count) + b"".join((*keys, *infos))
    return header + bytes(-len(header) % alignment if infos else 0) + data


def read(tmp_path: Path, content: bytes) -> GgufReader:
    file = tmp_path / "made.gguf"
    file.write_bytes(content)
    return GgufReader(file)


def test_arrays_keep_their_types(tmp_path: Path) -> None:
    keys = [
        entry("bytes", 9, array(0, 3, b"\x01\x02\xff")),
        entry("bools", 9, array(7, 3, b"\x00\x01\x02")),
        entry("halves", 9, array(12, 1, struct.pack("<d", 0.5))),
        entry("none", 9, array(6, 0)),
        entry("no strings", 9, array(8, 0)),
        entry("nan", 6, struct.pack("<f", math.nan)),
        entry("true", 7, b"\x07"),
    ]
    reader = read(tmp_path, build(keys))
    assert reader.fields["bytes"].dtype == np.uint8
    assert reader.fields["bools"].tolist() == [False, True, True]
    assert reader.fields["bools"].dtype == np.bool_
    assert reader.fields["halves"].dtype == np.float64
    assert reader.fields["none"].shape == (0,)
    assert reader.fields["none"].dtype == np.float32
    assert reader.fields["no strings"] == []
    assert math.isnan(reader.fields["nan"])
    assert reader.fields["true"] is True


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_alignment_and_versions(tmp_path: Path, alignment: int, version: int) -> None:
    second = -(-12 // alignment) * alignment
    content = build(
        [entry("general.alignment", 4, struct.pack("<I", alignment))],
        [info("a", [3]), info("b", [2, 1], 1, second)],
        np.arange(3, dtype="<f4").tobytes().ljust(second, b"\0") + b"\x01\x02\x03\x04",
        version=version,
        alignment=alignment,
    )
    reader = read(tmp_path, content)
    assert (reader.version, reader.alignment) == (version, alignment)
    assert reader.data("a").view("<f4").tolist() == [0, 1, 2]
    assert reader.data("b").tolist() == [[1, 2, 3, 4]]
    assert reader.tensors["b"].shape == (1, 2)


HUGE = 2**60
BAD: dict[str, tuple[bytes, str]] = {
    "magic": (build(magic=b"GGML"), r"it begins with b'GGML', not with b'GGUF'"),
    "version 0": (build(version=0), r"GGUF version 0; versions 2 and 3 are read"),
    "version 1": (build(version=1), r"GGUF version 1; versions 2 and 3 are read: convert the model"),
    "version 4": (build(version=4), r"GGUF version 4; versions 2 and 3"),
    "big-endian": (build(version=3 << 24), r"is big-endian; only little-endian files are read"),
    "tensor count": (build(tensor_count=HUGE), rf"claims {HUGE} tensors; at most {MAX_TENSORS} are read"),
    "tensor count, small": (build(tensor_count=MAX_TENSORS), r"the length of the name of tensor 0 takes 8 bytes"),
    "key count": (build(key_count=2**64 - 1), rf"claims {2**64 - 1} keys; at most {MAX_KEYS} are read"),
    "key count, small": (
        build(key_count=MAX_KEYS),
        r"the length of key 0 takes 8 bytes from byte 24 on, but the file ends at byte 24",
    ),
    "key length": (build([struct.pack("<Q", HUGE)]), rf"key 0 is {HUGE} bytes long; at most 65535 are allowed"),
    "key beyond the end": (build([struct.pack("<Q", 65535)]), r"key 0 takes 65535 bytes"),
    "key empty": (build([entry("", 0, b"\1")]), r"key 0 is empty"),
    "key twice": (build([entry("a", 0, b"\1"), entry("a", 0, b"\1")]), r"key a is there twice"),
    "key not UTF-8": (build([entry(b"\xff", 0, b"\1")]), r"key 0 is not UTF-8"),
    "key with commands": (build([entry("\x1b[2J\n", 0, b"\1")] * 2), r"key \\x1b\[2J\\n is there twice"),
    "key endless": (build([entry("k" * 65535, 0, b"\1")] * 2), r"key k{77}\.\.\. is there twice"),
    "value type": (build([entry("a", 13, bytes(8))]), r"a is of the unknown type 13"),
    "value type, negative": (build([entry("a", 2**32 - 1, bytes(8))]), rf"a is of the unknown type {2**32 - 1}"),
    "value cut": (build([entry("a", 12, bytes(7))]), r"a takes 8 bytes from byte 37 on, but the file ends at byte 44"),
    "string length": (build([entry("a", 8, struct.pack("<Q", 2**63 + 1))]), rf"a takes {2**63 + 1} bytes"),
    "array length": (build([entry("a", 9, array(0, HUGE))]), rf"with {HUGE} elements in a its arrays hold more than"),
    "array cut": (build([entry("a", 9, array(10, MAX_ELEMENTS, bytes(100)))]), rf"a takes {8 * MAX_ELEMENTS} bytes"),
    "strings cut": (build([entry("a", 9, array(8, MAX_ELEMENTS, text("b") * 3))]), r"a takes \d+ bytes from byte 49 on"),
    "string in array": (build([entry("a", 9, array(8, 2, text("b") + struct.pack("<Q", 2**64 - 1)))]), r"a takes \d+ bytes"),
    "string far beyond": (
        build([entry("a", 9, array(8, 3, text("b") + struct.pack("<Q", 2**63) + text("c")))]),
        r"a takes \d+ bytes",
    ),
    "array type": (build([entry("a", 9, array(99, 0))]), r"a is an array of the unknown type 99"),
    "array depth": (build([entry("a", 9, array(9, 1) * MAX_DEPTH + array(0, 0))]), r"a is an array nested deeper than 4"),
    "alignment zero": (build([entry("general.alignment", 4, bytes(4))]), r"general\.alignment is 0; it must be a power of two"),
    "alignment odd": (build([entry("general.alignment", 4, b"\x18\0\0\0")]), r"general\.alignment is 24; it must be a power"),
    "alignment type": (build([entry("general.alignment", 10, b" " + bytes(7))]), r"general\.alignment is not of type uint32"),
    "alignment array": (build([entry("general.alignment", 9, array(4, 1, b" \0\0\0"))]), r"alignment is not of type uint32"),
    "name length": (build(infos=[info("n" * 64, [1])], data=bytes(4)), r"the name of tensor 0 is 64 bytes long; at most 63"),
    "name twice": (build(infos=[info("a", [1]), info("a", [1], 0, 32)], data=bytes(64)), r"tensor a is there twice"),
    "name not UTF-8": (build(infos=[info(b"\xc3", [1])], data=bytes(4)), r"the name of tensor 0 is not UTF-8"),
    "no dimension": (build(infos=[info("a", [])], data=bytes(4)), r"tensor a has 0 dimensions; 1 to 4 are allowed"),
    "five dimensions": (build(infos=[info("a", [1] * 5)], data=bytes(4)), r"tensor a has 5 dimensions"),
    "dimension count": (build(infos=[text("a") + b"\xff" * 4]), rf"tensor a has {2**32 - 1} dimensions"),
    "dimension zero": (
        build(infos=[info("a", [2, 0])], data=bytes(4)),
        r"tensor a has shape \[0, 2\]; no dimension may be zero",
    ),
    "dimension negative": (build(infos=[info("a", [2**64 - 1])], data=bytes(64)), r"but the file ends at byte 128"),
    "size overflows": (build(infos=[info("a", [2**32, 2**32])], data=bytes(64)), rf"takes {2**66} bytes"),
    "size overflows to zero": (build(infos=[info("a", [2**62, 4])], data=bytes(64)), rf"takes {2**66} bytes"),
    "tensor type": (build(infos=[info("a", [32], 4)], data=bytes(64)), r"tensor a is of the unknown type 4"),
    "tensor type, negative": (build(infos=[info("a", [1], 2**32 - 1)], data=bytes(64)), rf"unknown type {2**32 - 1}"),
    "columns": (build(infos=[info("a", [48], 2)], data=bytes(64)), r"tensor a has 48 columns; Q4_0 needs a multiple of 32"),
    "offset": (build(infos=[info("a", [1], 0, 32)], data=bytes(64)), r"offset 32, which leaves a gap behind the header; 0 was"),
    "offset huge": (build(infos=[info("a", [1], 0, 2**64 - 32)], data=bytes(64)), rf"tensor a has offset {2**64 - 32}"),
    "offset unaligned": (build(infos=[info("a", [1]), info("b", [1], 0, 4)], data=bytes(64)), r"is not a multiple of 32"),
    "overlap": (
        build(infos=[info("a", [16]), info("b", [1], 0, 32)], data=bytes(128)),
        r"tensor b has offset 32, which overlaps tensor a; 64 was expected",
    ),
    "no data": (build(infos=[info("a", [16])]), r"tensor a of shape \[16\] takes 64 bytes from byte 64 on"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "made.gguf") in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", BAD)
def test_claims_cost_no_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / "made.gguf").write_bytes(BAD[name][0])
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            GgufReader(tmp_path / "made.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_strings_that_are_no_utf8(tmp_path: Path) -> None:
    """Found when they are asked for: nothing else of the file is spoiled by them."""
    keys = [entry("a", 8, text(b"\xff")), entry("b", 9, array(8, 2, text("fine") + text(b"\x80"))), entry("c", 0, b"\3")]
    reader = read(tmp_path, build(keys))
    assert reader.field("c") == 3
    for key in "ab":
        with pytest.raises(InputError, match=rf"made\.gguf is not a readable GGUF model \({key} is not UTF-8"):
            reader.fields[key]


def test_architecture_must_be_a_string(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"general\.architecture is 7; it must be a string like 'llama'"):
        _ = read(tmp_path, build([entry("general.architecture", 0, b"\7")])).architecture
    with pytest.raises(InputError, match=r"has no key general\.architecture"):
        _ = read(tmp_path, build()).architecture


def test_header_without_end(tmp_path: Path) -> None:
    """A string as long as the file says, in a file that is long enough: refused all the same."""
    file = tmp_path / "made.gguf"
    file.write_bytes(build([entry("a", 8, struct.pack("<Q", MAX_HEADER))]))
    with file.open("r+b") as sparse:
        sparse.truncate(2 * MAX_HEADER)
    with pytest.raises(InputError, match=r"a reaches beyond 64 MiB, the longest header read"):
        GgufReader(file)
