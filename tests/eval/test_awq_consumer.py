"""AWQ artifacts in transformers: what it computes is what this project's numbers say.

As a program, this file loads artifacts through the consumer and writes what they compute, in 16 bits as a user has it and as
evaluation has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.consumers import CONSUMERS
from exports.awq import read

PROJECT = Path(__file__).resolve().parents[2]
Cli = Callable[..., tuple[int, str, str]]


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
def reference(artifact: Path, model_path: Path, ids: Tensor) -> Tensor:
    """Logits of the original model with this project's reading of the artifact put in, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    layers, dense = read(artifact)
    for name, tensor in layers.items():
        model.get_submodule(name).weight.copy_(tensor.dequantize())
    for name, value in dense.items():
        model.get_parameter(name).copy_(value)
    found: Tensor = model(ids, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [[], ["solver.skip=[down_proj, 'layers\\.1\\.self_attn\\.q_proj']"]])
def test_transformers_computes_with_the_weights_this_project_means(
    settings: list[str], small_run: list[str], cli: Cli, ids: Tensor, tiny_llama: Path, tmp_path: Path
) -> None:
    run = ["recipe=awq", *small_run, *settings, "stages=[load,calibrate,quantize,export]", f"output_dir={tmp_path / 'run'}"]
    code, _, err = cli(*run)
    assert code == 0, err
    artifact = tmp_path / "run" / "variants" / "awq"
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "ids.safetensors"), str(tmp_path / "logits.safetensors"), str(artifact)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **CONSUMERS["awq"].environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "gptqmodel" in result.stdout
    found, expected = load_file(tmp_path / "logits.safetensors"), reference(artifact, tiny_llama, ids)
    torch.testing.assert_close(found["awq.evaluated"], expected, atol=1e-4, rtol=1e-4)
    # In 16 bits, as a user has it: the same but for rounding.
    assert float((found["awq.plain"] - expected).norm() / expected.norm()) < 0.01


if __name__ == "__main__":
    write_logits(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
