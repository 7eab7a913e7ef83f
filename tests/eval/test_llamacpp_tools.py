"""llama.cpp's tools: found, missed, fetched and built, with stand-ins for pip, CMake and PyPI's file."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval import llamacpp_tools
from eval.llamacpp_tools import OPTIONS, SDIST, SOURCE, TOOLS, VARIABLE, build, fetch, find_library, find_tool, home, main, tool
from quantize.errors import InputError

LIBRARIES = ("libggml-base.so", "libggml-base.so.0")


class Programs:
    """Stands in for ``subprocess.run``: pip puts ``archive`` where it is told, CMake makes what it is asked for."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive
        self.commands: list[list[str]] = []
        self.fails: set[str] = set()
        self.forgets: set[str] = set()

    def __call__(self, command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        step = "pip" if "pip" in command else "build" if "--build" in command else "configure"
        if step in self.fails:
            return subprocess.CompletedProcess(command, 1, "", "no such host\n")
        if step == "pip":
            (Path(command[command.index("--dest") + 1]) / SDIST).write_bytes(self.archive)
        if step == "configure":
            assert (Path(command[command.index("-S") + 1]) / "CMakeLists.txt").read_text() == "project(llama)"
        if step == "build":
            made = Path(command[command.index("--build") + 1]) / "bin"
            made.mkdir(parents=True, exist_ok=True)
            for name in command[command.index("--target") + 1 :]:
                if name not in self.forgets:
                    (made / name).write_text("#!/bin/sh\necho built\n")
                    (made / name).chmod(0o755)
            (made / LIBRARIES[1]).write_bytes(b"library")
            (made / LIBRARIES[0]).unlink(missing_ok=True)
            (made / LIBRARIES[0]).symlink_to(LIBRARIES[1])
            (made / "test-something").write_text("not wanted")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in (
            (f"{SOURCE}/CMakeLists.txt", b"project(llama)"),
            (f"{SOURCE}/.git", b"gitdir"),
            (f"{SOURCE}x/other", b""),
            ("top/setup.py", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    made = Programs(packed.getvalue())
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llamacpp_tools, "SDIST_SHA256", hashlib.sha256(made.archive).hexdigest())
    monkeypatch.setattr(llamacpp_tools.subprocess, "run", made)
    monkeypatch.setattr(llamacpp_tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


def test_the_tools_are_built_once_and_found(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_tool("llama-quantize") is None and find_library("ggml-base") is None
    assert main(["--jobs", "3"]) == 0
    folder = tmp_path / "cache" / f"llama.cpp-{llamacpp_tools.VERSION}" / "bin"
    assert capsys.readouterr().out.strip() == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*TOOLS, *LIBRARIES))
    assert all(find_tool(name) == tool(name) == folder / name for name in TOOLS)
    library = find_library("ggml-base")
    assert library is not None and library.is_symlink() and library.read_bytes() == b"library"
    # The tree and the objects are gone, the archive is kept.
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [folder.parent.name, "sdists"]
    pip, configure, compile_ = programs.commands
    assert pip[-1] == f"llama-cpp-python=={llamacpp_tools.VERSION}" and "--no-deps" in pip
    assert configure[-len(OPTIONS) :] == list(OPTIONS)
    assert compile_[compile_.index("--parallel") + 1] == "3"
    assert build() == folder and len(programs.commands) == 3


def test_an_interrupted_build_goes_on(programs: Programs) -> None:
    programs.fails = {"build"}
    with pytest.raises(InputError, match=r"building llama\.cpp failed"):
        build()
    assert not home().exists()
    programs.fails = set()
    build()
    assert [command[1] for command in programs.commands].count("-m") == 1  # fetched once
    assert find_tool("llama-server") is not None


def test_a_tree_one_has_is_built(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "CMakeLists.txt").write_text("project(llama)")
    assert main(["--source", str(tmp_path / "tree")]) == 0
    assert "-m" not in [command[1] for command in programs.commands]
    assert (tmp_path / "tree" / "CMakeLists.txt").exists()


def test_trouble_is_one_line(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.fails = {"pip"}
    with pytest.raises(InputError, match="could not be fetched from PyPI \\(no such host\\)"):
        build()
    programs.fails, programs.forgets = set(), {"llama-bench"}
    with pytest.raises(InputError, match="has no llama-bench; remove"):
        build()
    assert not (home() / "bin").exists()
    (tmp_path / "cache" / "sdists" / SDIST).write_bytes(b"another file")
    with pytest.raises(InputError, match="not the known"):
        fetch(tmp_path / "cache" / "sdists")
    monkeypatch.setattr(llamacpp_tools.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="needs CMake"):
        build()


def test_a_missing_tool_says_how_to_build_it(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    programs.fails = {"configure"}
    with pytest.raises(InputError, match="run `make llamacpp`"):
        tool("llama-quantize")
    assert main([]) == 2
    assert "error: configuring llama.cpp failed" in capsys.readouterr().err


def test_another_folder_of_binaries_is_used(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "llama-quantize").write_text("#!/bin/sh\n")
    assert find_tool("llama-quantize") is None  # it cannot be run
    (tmp_path / "llama-quantize").chmod(0o755)
    assert tool("llama-quantize") == tmp_path / "llama-quantize"
    with pytest.raises(InputError, match=f"has no llama-bench; run `make llamacpp`, or correct {VARIABLE}"):
        tool("llama-bench")
