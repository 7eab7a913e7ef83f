"""A tiny model as a GGUF file, for the programs that read such files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exports.gguf_convert import convert


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama in F16, alone in its directory. Read it only."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(tiny_llama, file, "F16")
    return file


@pytest.fixture(scope="session")
def incomplete_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The same without one of its matrices, ``model.layers.1.mlp.up_proj.weight``."""
    folder = tmp_path_factory.mktemp("incomplete")
    checkpoint = shutil.copytree(tiny_llama, folder / "checkpoint")
    stored = load_file(checkpoint / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, checkpoint / "model.safetensors", metadata={"format": "pt"})
    convert(checkpoint, folder / "tiny.gguf", "F16")
    return folder / "tiny.gguf"
