"""A planted regression: one layer's scales times 1.1 pass a loose limit on perplexity and fail one on the divergence."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.gate import main
from eval.perplexity import evaluate_artifact
from quantize.artifact import read_evaluation, record_evaluation, write_manifest
from quantize.config import EvalConfig

MakeInt8 = Callable[..., Path]
DESCRIPTION: dict[str, Any] = {
    "name": "int8",
    "container": "compressed-tensors",
    "solver": {"name": "rtn"},
    "bits": 8,
    "bits_per_weight": 8.0,
    "size_bytes": 1,
    "base": {"name": "tiny-llama", "license": None, "sha256": "0" * 64},
    "recipe": {},
    "versions": {},
}


@pytest.fixture(scope="module")
def measured(tiny_llama: Path, make_int8: MakeInt8, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """``measured(name, factor)``: an int8 artifact with one layer's scales times ``factor``, its manifest true; measured."""
    folder = tmp_path_factory.mktemp("regression")
    text = folder / "text.txt"
    text.write_text(pydoc_data.topics.topics["assignment"])
    config = EvalConfig(text=str(text), windows=4, seq_len=64)
    evaluate_artifact(tiny_llama, config, save_reference=folder / "reference.npz")

    def make(name: str, factor: float) -> Path:
        artifact = make_int8(tiny_llama, folder / name, "none")
        stored = load_file(artifact / "model.safetensors")
        stored["model.layers.1.mlp.down_proj.weight_scale"] *= torch.tensor(factor)
        save_file(stored, artifact / "model.safetensors", metadata={"format": "pt"})
        write_manifest(artifact, DESCRIPTION)
        record_evaluation(artifact, evaluate_artifact(artifact, config, reference=folder / "reference.npz"))
        return artifact

    return make


def _kld(artifact: Path) -> float:
    found = read_evaluation(artifact)
    assert found is not None
    return float(found["divergence"]["kld_mean"])


def test_the_divergence_sees_what_perplexity_does_not(measured: Callable[[str, float], Path]) -> None:
    good, noisy, broken = measured("good", 1.0), measured("noisy", 1.0005), measured("broken", 1.1)
    loose, strict = ["--limits", "ppl_ratio=1.1"], ["--limits", f"kld_mean={2 * _kld(good)}"]
    for artifact in (good, noisy, broken):
        assert main([str(artifact), *loose]) == 0
    assert [main([str(artifact), *strict]) for artifact in (good, noisy, broken)] == [0, 0, 3]
