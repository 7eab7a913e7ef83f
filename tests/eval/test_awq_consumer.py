"""AWQ artifacts in transformers: what it computes is what this project's numbers say.

As a program, this file loads artifacts through the consumer and writes what they compute, in 16 bits as a user has it and as
evaluation has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from eval.consumers import CONSUMERS
from exports.awq import read

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = r"""
# @package _global_
variants:
  plain: {container: awq}
  skipped: {container: awq, solver: {skip: [down_proj, 'layers\.1\.self_attn\.q_proj']}}
"""
EXPERTS = "# @package _global_\nvariants:\n  experts: {container: awq}\n"


def write_logits(ids_file: Path, output: Path, artifacts: list[Path]) -> None:
    """Logits of every artifact, before and after :func:`for_evaluation`."""
    from eval.consumers.awq_model import CONSUMER

    ids, tensors = load_file(ids_file)["ids"], {}
    for artifact in artifacts:
        loaded = CONSUMER.load(artifact, "cpu")
        tensors[f"{artifact.name}.plain"] = loaded.logits(ids).float().clone()
        loaded = CONSUMER.for_evaluation(loaded)
        tensors[f"{artifact.name}.evaluated"] = loaded.logits(ids).clone()
        print(loaded.consumer)
    save_file(tensors, output)


@torch.no_grad()
def reference(artifact: Path, model_path: Path, folder: Path, ids: Tensor) -> Tensor:
    """Logits, in float32, of the original model with this project's reading of the artifact in the place of its weights."""
    layers, dense = read(artifact)
    stored = {name: tensor.float() for name, tensor in dense.items()}
    stored |= {f"{name}.weight": tensor.dequantize() for name, tensor in layers.items()}
    folder.mkdir()
    shutil.copy(model_path / "config.json", folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: Tensor = model(ids, use_cache=False).logits
    return found


@pytest.fixture
def experts(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    moe_config: Callable[..., PretrainedConfig],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A tiny mixture of experts."""
    model = make_checkpoint(tmp_path / "model", moe_config(vocab_size=304))
    tiny_tokenizer.save_pretrained(model)
    return model


def test_transformers_computes_with_the_weights_this_project_means(
    small_run: list[str], run_recipe: Callable[..., Path], tiny_llama: Path, experts: Path, tmp_path: Path
) -> None:
    ids = torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    settings = [*small_run, "solver=awq", "stages=[load,calibrate,quantize,export]"]
    artifacts: dict[Path, Path] = {}
    for model, recipe in ((tiny_llama, RECIPE), (experts, EXPERTS)):  # the experts through GPTQModel's own loader
        folder = tmp_path / f"{model.name}-run"
        folder.mkdir()
        made = run_recipe(folder, recipe, *settings, f"model.path={model}") / "variants"
        artifacts |= dict.fromkeys(made.iterdir(), model)
    result = subprocess.run(
        [sys.executable, __file__, *map(str, (tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"))]
        + [str(artifact) for artifact in artifacts],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **CONSUMERS["awq"].environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gptqmodel") >= 3
    found = load_file(tmp_path / "logits.safetensors")
    for artifact, model in artifacts.items():
        name = artifact.name
        expected = reference(artifact, model, tmp_path / f"{name}-dense", ids)
        torch.testing.assert_close(found[f"{name}.evaluated"], expected, atol=1e-4, rtol=1e-4)
        # In 16 bits, as a user has it: the same but for rounding.
        assert float((found[f"{name}.plain"] - expected).norm() / expected.norm()) < 0.02, name


if __name__ == "__main__":
    write_logits(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
