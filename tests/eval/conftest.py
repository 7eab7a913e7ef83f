"""A tiny model as a GGUF file, for the programs that read such files; and artifacts with made-up figures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from eval.tasks_scores import entry
from exports.gguf_convert import convert
from quantize.artifact import record_evaluation, write_manifest

PROTOCOL: dict[str, Any] = {
    "name": "windows",
    "text": "wiki.txt",
    "text_sha256": "a" * 64,
    "part": "all",
    "window": 64,
    "stride": 64,
    "bos": False,
    "windows": 2,
    "tokens": 126,
    "words": 90,
    "bytes": 500,
}


class Made:
    """Artifacts of a few bytes with made-up figures, for tests of what reads figures."""

    @staticmethod
    def write_artifact(
        folder: Path,
        *,
        size: int = 1000,
        solver: str = "rtn",
        content: int = 0,
        name: str | None = None,
        container: str = "gptq",
    ) -> str:
        """An artifact of one weight file of ``size`` bytes, all of them ``content``; its fingerprint."""
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([content]) * size)
        (folder / "config.json").write_text('{"hidden_size": 64}\n')
        described: dict[str, Any] = {
            "name": name or folder.name,
            "container": container,
            "solver": {"name": solver},
            "bits": 16 if solver == "none" else 4,
            "bits_per_weight": 16.0 if solver == "none" else 4.5,
            "size_bytes": size,
            "base": {"name": "tiny-llama", "license": None, "sha256": "0" * 64},
            "recipe": {},
            "versions": {},
        }
        return str(write_manifest(folder, described)["fingerprint"])

    @staticmethod
    def measured(ppl: float | None = 10.0, **changes: Any) -> dict[str, Any]:
        """Figures as ``eval.perplexity`` writes them."""
        protocol = {**PROTOCOL, **changes.pop("protocol", {})}
        return {
            "ppl": ppl,
            "consumer": "transformers 5",
            "protocol": protocol,
            "compute_dtype": "float32",
            "seconds": 1.0,
            "peak_rss_bytes": 500_000_000,
            **changes,
        }

    @staticmethod
    def diverged_from(fingerprint: str | None, **changes: Any) -> dict[str, Any]:
        """A ``divergence`` from the artifact of that fingerprint."""
        figures = {"kld_mean": 0.02, "kld_median": 0.01, "kld_p99": 0.2, "kld_max": 1.0, "top1_agreement": 0.93, "tokens": 126}
        reference = {"artifact_fingerprint": fingerprint, "name": "fp16", "ppl": 9.8, "top_k": 256, "tokens_sha256": "b" * 64}
        return {**figures, "flips_lost": 3, "flips_won": 2, "reference": reference, **changes}

    @staticmethod
    def task(right: np.ndarray[Any, np.dtype[np.bool_]], **changes: Any) -> dict[str, Any]:
        """A task's entry with these answers right."""
        described = {"definition": "d" * 64, "items": "i" * 64, "versions": {"builtin": "1"}, "num_fewshot": 0, "limit": None}
        return {**entry({"acc": (right.astype(np.float64), True)}, {}, **described), **changes}

    @staticmethod
    def record(folder: Path, **figures: Any) -> None:
        """Write figures beside an artifact."""
        record_evaluation(folder, figures)


@pytest.fixture(scope="session")
def made() -> type[Made]:
    """Functions that make such artifacts."""
    return Made


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
