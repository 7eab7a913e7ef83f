"""Files are whole or absent, whatever happens while they are written; disk trouble becomes one clear line."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import quantize.files
from quantize.errors import InputError, one_line
from quantize.files import (
    atomic_directory,
    atomic_path,
    disk_error,
    files_below,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
    write_tensors,
    write_text,
)

Atomic = Callable[[Path], AbstractContextManager[Path]]
BOTH = [atomic_path, atomic_directory]


def fill(atomic: Atomic, temporary: Path, text: str) -> None:
    (temporary if atomic is atomic_path else temporary / "content").write_text(text)


def content(atomic: Atomic, path: Path) -> str:
    return (path if atomic is atomic_path else path / "content").read_text()


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("atomic", BOTH)
def test_nothing_is_seen_before_the_end(tmp_path: Path, atomic: Atomic) -> None:
    target = tmp_path / "deep" / "er" / "target"
    with atomic(target) as temporary:
        fill(atomic, temporary, "new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert content(atomic, target) == "new"
    assert listing(target.parent) == ["target"]


@pytest.mark.parametrize("atomic", BOTH)
def test_replacing(tmp_path: Path, atomic: Atomic) -> None:
    for text in ("old", "new"):
        with atomic(tmp_path / "target") as temporary:
            fill(atomic, temporary, text)
    assert content(atomic, tmp_path / "target") == "new"
    assert listing(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("atomic", BOTH)
def test_failure_keeps_the_old_and_leaves_nothing(tmp_path: Path, atomic: Atomic, error: type[BaseException]) -> None:
    with atomic(tmp_path / "target") as temporary:
        fill(atomic, temporary, "old")
    for name in ("target", "other"):
        with pytest.raises(error), atomic(tmp_path / name) as temporary:
            fill(atomic, temporary, "half of the n")
            raise error
    assert listing(tmp_path) == ["target"]
    assert content(atomic, tmp_path / "target") == "old"


def test_a_killed_runs_directory_is_swept_away(tmp_path: Path) -> None:
    leftover = tmp_path / f".target.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "stale").write_text("")
    with atomic_directory(tmp_path / "target") as temporary:
        (temporary / "fresh").write_text("")
    assert listing(tmp_path / "target") == ["fresh"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.EFBIG, "the file system refuses a file of this size"),
    ],
)
@pytest.mark.parametrize("atomic", BOTH)
def test_disk_trouble_is_bad_input(tmp_path: Path, atomic: Atomic, number: int, reason: str) -> None:
    target = tmp_path / "target"
    with pytest.raises(InputError, match=rf"cannot write {target}: {reason}") as caught, atomic(target) as temporary:
        fill(atomic, temporary, "half")
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("atomic", BOTH)
def test_trouble_while_flushing_is_bad_input_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: Atomic) -> None:
    """Delayed allocation finds out about a full disk only then."""
    with atomic(tmp_path / "target") as temporary:
        fill(atomic, temporary, "old")

    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"), atomic(tmp_path / "target") as temporary:
        fill(atomic, temporary, "new")
    assert listing(tmp_path) == ["target"]
    assert content(atomic, tmp_path / "target") == "old"


@pytest.mark.parametrize("atomic", BOTH)
def test_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: Atomic) -> None:
    def refuse(path: Path, *_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="the file system is read-only"), atomic(tmp_path / "a" / "target"):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("atomic", BOTH)
def test_parent_that_is_a_file(tmp_path: Path, atomic: Atomic) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a part of the path is a file"), atomic(tmp_path / "file" / "b" / "target"):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("atomic", BOTH)
def test_other_trouble_stays_what_it_is(tmp_path: Path, atomic: Atomic) -> None:
    for error in (OSError(errno.EIO, "Input/output error"), SafetensorError("tensor is odd"), ValueError("no")):
        with pytest.raises(type(error)) as caught, atomic(tmp_path / "target"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I/O error: No space left on device (os error 28)", "the disk is full"),
        ("Error while serializing: I/O error: Read-only file system (os error 30)", "the file system is read-only"),
        ("I/O error: Permission denied (os error 13)", "permission denied"),
    ],
)
def test_safetensors_wrapped_errors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    def fail(_: object, path: Path, metadata: object) -> NoReturn:
        path.write_bytes(b"half")
        raise SafetensorError(text)

    monkeypatch.setattr(quantize.files, "save_file", fail)
    with pytest.raises(InputError, match=rf"cannot write .*weights\.safetensors: {reason}"):
        write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    assert listing(tmp_path) == []


def test_numbers_within_other_numbers_are_no_disk_error() -> None:
    assert disk_error(Path("x"), SafetensorError("I/O error: odd (os error 280)")) is None
    assert disk_error(Path("x"), SafetensorError("(os error 2)")) is None
    assert disk_error(Path("x"), ValueError("(os error 28)")) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the disk is full"), atomic_path(tmp_path / "target") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")
    assert listing(tmp_path) == []


def test_tensors_have_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(3, dtype=torch.float16), "c": torch.tensor(1)}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = load_file(tmp_path / "one")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_json_comes_back_and_nan_is_refused(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ä": "\n"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert (tmp_path / "value.json").read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"a": float("nan")})
    assert read_json(tmp_path / "value.json") == value


def test_bad_json_is_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    with pytest.raises(InputError, match=rf"{file} does not exist"):
        read_json(file)
    for damaged in (b"", b"{", b'{"a": 1}}', b"\xff\xfe"):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{file} is not valid JSON .*fetch it again"):
            read_json(file)


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "Käse\n")
    assert (tmp_path / "text").read_bytes() == "Käse\n".encode()


def test_hashes(tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 1)
    (tmp_path / "data").write_bytes(data)
    assert sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert len({sha256_json(value) for value in ({"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, [1])}) == 5


def test_files_below_are_sorted_and_regular(tmp_path: Path) -> None:
    for name in ("b/2", "a", "b/1", "b/c/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)] == ["a", "b/1", "b/2", "b/c/0"]


def test_one_line_shortens_and_joins() -> None:
    assert one_line(ValueError("  two\n lines\t here ")) == "two lines here"
    assert one_line(ValueError("")) == "ValueError"
    assert len(one_line(ValueError("word " * 100))) == 200
