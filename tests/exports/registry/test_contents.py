"""What a release may hold: names from hostile lists, links, devices, pickles by name and by content."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exports.registry.base import Damaged
from exports.registry.contents import MOST_FILES, check_list, directory_names, list_problems, name_problem, pickle_problem
from quantize.errors import InputError


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../../x", "/etc/passwd", "~/x", "a//b", "a/", "./a", "a/.", ".git/config", "a\\b", "C:x", "C:/x", "a\0b"),
        *("a\nb", "", "é.json", "a ", " a", "a.", "con", "NUL.txt", "x" * 241, "a:b", "a|b", "a\u202eb", None, 3),
    ],
)
def test_names_that_could_leave_the_directory_or_not_exist_elsewhere_are_refused(name: Any) -> None:
    assert name_problem(name)
    with pytest.raises(Damaged, match="list"):
        check_list(["model.safetensors", name], "list")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "SHA256SUMS", "a/b/c.json", "model (1).gguf", "x+y=z@1,2.txt"]
)
def test_ordinary_names_are_allowed(name: str) -> None:
    assert name_problem(name) is None


@given(st.text(max_size=30))
def test_an_allowed_name_stays_below_its_directory(name: str) -> None:
    if name_problem(name) is None:
        assert Path("/root/of/it", name).resolve().is_relative_to("/root/of/it")
        assert os.path.normpath(name) == name


def test_lists_with_doubles_case_collisions_and_files_as_folders_are_refused() -> None:
    assert not list_problems(["a", "b", "c/d", "c/e"])
    assert "twice" in list_problems(["a", "b", "a"])[0]
    assert "case is folded" in list_problems(["README.md", "readme.MD"])[0]
    assert "cannot be a folder" in list_problems(["A/b", "a"])[0]
    assert str(MOST_FILES + 1) in list_problems(map(str, range(MOST_FILES + 1)))[0]


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("false",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_recognised_by_content_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "config.json"
    for value in [_Runs(), {"a": [_Runs()]}, [1, 2.5, "x", _Runs()]]:
        file.write_bytes(pickle.dumps(value, protocol) + b"\n more text")
        assert "a pickle by its content" in (pickle_problem(file) or "")


def test_pytorch_files_archives_and_pickle_names_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "zip file" in (pickle_problem(tmp_path / "model.safetensors") or "")
    with zipfile.ZipFile(tmp_path / "z.json", "w"):
        pass
    assert "zip file" in (pickle_problem(tmp_path / "z.json") or "")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.txt", _use_new_zipfile_serialization=False)
    assert "pickle by its content" in (pickle_problem(tmp_path / "old.txt") or "")
    (tmp_path / "x.json").write_bytes(b"\x1f\x8b\x08\0")
    assert "compressed archive" in (pickle_problem(tmp_path / "x.json") or "")
    for name in ("model.pkl", "m.PT", "pytorch_model.bin", "pytorch_model-00001-of-2.bin", "a.ckpt", "data.npy"):
        (tmp_path / name).write_text("")
        assert "by its name" in (pickle_problem(tmp_path / name) or ""), name


@given(st.text(alphabet="cRb.()[]{}#\n abcdefghijklmnop:\"'", max_size=200))
def test_text_is_no_pickle_unless_pickle_would_run_it(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "README.md")
        file.write_text(text)
        if pickle_problem(file) is not None:  # then it is a program with an import and a call, from its first byte
            assert "c" in text and "." in text
        file.write_text(f"# {text}")
        assert pickle_problem(file) is None


def test_this_projects_own_texts_are_no_pickles() -> None:
    root = Path(__file__).parents[3]
    files = [*root.glob("docs/*.md"), *root.glob("*.md"), *root.glob("recipes/**/*.yaml"), *root.glob("tests/golden/*.json")]
    assert len(files) > 20
    assert [problem for file in files if (problem := pickle_problem(file))] == []
    assert pickle_problem(root / "tests/golden/gguf_tiny.gguf") is None


def test_links_pipes_and_missing_directories_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_text("")
    (folder / "a").write_text("")
    assert directory_names(folder) == ["a", "sub/b"]
    (folder / "link").symlink_to("a")
    (folder / "sub" / "links").symlink_to("..")
    os.mkfifo(folder / "pipe")
    with pytest.raises(Damaged) as caught:
        directory_names(folder)
    assert all(
        each in str(caught.value) for each in ("'link': a symbolic link", "'sub/links': a symbolic link", "'pipe': neither")
    )
    (tmp_path / "other").symlink_to(folder)
    for path in (tmp_path / "other", tmp_path / "none", folder / "a"):
        with pytest.raises(InputError, match="not a directory"):
            directory_names(path)
