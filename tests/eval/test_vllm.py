"""Artifacts in vLLM's CPU build: those it runs say what transformers says, the others fail where and as the documents say."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from eval.consumers import CONSUMERS
from eval.perplexity import container_of
from exports.containers import CONTAINERS

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = PROJECT / ".venv-vllm" / "bin" / "python"
PROMPT = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(1)).tolist()
COUNT = 12
RECIPE = """
# @package _global_
variants:
  bf16: {solver: {name: none}, container: safetensors, dtype: bfloat16}
  w8a8:
    solver: {name: rtn, bits: 8, group_size: -1, symmetric: true, input_activations: dynamic}
    container: compressed-tensors
  w8a8-static-smooth:
    solver: {name: rtn, bits: 8, group_size: -1, symmetric: true, input_activations: static, smoothquant: true}
    container: compressed-tensors
  w8a16: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}, container: compressed-tensors}
  int4-gptq: {solver: {symmetric: true, desc_act: false}, container: compressed-tensors}
  awq: {solver: {name: awq}, container: awq}
"""


@dataclass(frozen=True)
class Behaviour:
    """What an artifact does in vLLM.

    Attributes:
        dtype: it is computed in.
        tolerance: largest difference of logarithms of probabilities to transformers', which computes in float32.
        avx2: the step at which it fails with AVX2 kernels and what the message has in it; None where it runs.
        avx512: the same with AVX-512 kernels.
    """

    dtype: str
    tolerance: float
    avx2: tuple[str, str] | None = None
    avx512: tuple[str, str] | None = None


NO_INT8_WEIGHTS = ("load", r"Quant type \(uint8b128\) not supported by CPUWNA16")
NO_INT4 = ("forward", r"'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'")
BEHAVIOURS = {
    "bf16": Behaviour("float32", 1e-3),
    "w8a8": Behaviour("float32", 1e-3),
    "w8a8-static-smooth": Behaviour("float32", 1e-3),
    "w8a16": Behaviour("float32", 1e-3, NO_INT8_WEIGHTS, NO_INT8_WEIGHTS),
    "int4-gptq": Behaviour("float16", 0.02, NO_INT4),
    "awq": Behaviour("float16", 0.02, NO_INT4),
}
# How far vLLM's W8A8 is from transformers' where the steps of a token's inputs are absmax / 127 there and absmax / 127.5 here.
STEPS_APART = 0.2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM's CPU build: `make vllm`"),
]


@pytest.fixture(scope="module")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    run_recipe: Callable[..., Path],
) -> Path:
    """One artifact of each kind, of a model as small as vLLM's attention takes it. Read them only."""
    folder = tmp_path_factory.mktemp("vllm")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = make_checkpoint(folder / "model", config)
    tiny_tokenizer.save_pretrained(model)
    settings = [
        f"model.path={model}",
        "device=cpu",
        "calibration.num_samples=8",
        "calibration.seq_len=64",
        "solver.group_size=64",
        "quality=fast",
        "stages=[load,calibrate,quantize,export]",
    ]
    return run_recipe(folder, RECIPE, *settings) / "variants"


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The instruction set of the kernels that vLLM takes."""
    if request.param == "avx512" and not torch.cpu._is_avx512_supported():
        pytest.skip("needs a processor with AVX-512")
    return str(request.param)


@pytest.fixture(scope="module")
def seen(kernels: str, artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM did with every artifact."""
    out = tmp_path_factory.mktemp(kernels) / "seen.json"
    arguments = [",".join(map(str, PROMPT)), str(COUNT), str(out)]
    arguments += [f"{behaviour.dtype}:{artifacts / name}" for name, behaviour in BEHAVIOURS.items()]
    arguments += ["--avx2"] if kernels == "avx2" else []
    result = subprocess.run(
        [str(PYTHON), "-m", "eval.peers.vllm_generate", *arguments],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(out.read_text())["artifacts"]
    assert found.keys() == BEHAVIOURS.keys()
    return found


@pytest.fixture(scope="module")
def logprobs_of(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[int]], Tensor]:
    """``logprobs_of(name, tokens)``: transformers' logarithms of probabilities before each of the tokens, ``[COUNT, 320]``.

    In float32, after the prompt and the tokens before. AWQ's codes, which transformers runs by a program of its own
    (test_awq_consumer.py compares it with these numbers), are decoded first. ``w8a8-127`` is ``w8a8`` with vLLM's input steps.
    """
    decoded = tmp_path_factory.mktemp("decoded")
    loaded: dict[str, Any] = {}
    for name in BEHAVIOURS:
        path = decode(artifacts / name, decoded / name) if name == "awq" else artifacts / name
        consumer = CONSUMERS[container_of(path)]
        loaded[name] = consumer.for_evaluation(consumer.load(path, "cpu"))
    loaded["w8a8-127"] = CONSUMERS["safetensors"].load(decode(artifacts / "w8a8", decoded / "w8a8-127"), "cpu")
    for layer in CONTAINERS["compressed-tensors"].read(artifacts / "w8a8")[0]:
        loaded["w8a8-127"].model.get_submodule(layer).register_forward_pre_hook(round_inputs)

    def logprobs(name: str, tokens: list[int]) -> Tensor:
        logits: Tensor = loaded[name].logits(torch.tensor([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1]
        return logits.log_softmax(-1)

    return logprobs


def round_inputs(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """A layer's inputs ``[..., columns]`` as vLLM's kernel rounds them: to 8 bits in steps of a token's absmax / 127."""
    steps = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (inputs[0] / steps).round() * steps


def decode(artifact: Path, path: Path) -> Path:
    """An artifact's weights as a dense directory in float32."""
    layers, dense = CONTAINERS[container_of(artifact)].read(artifact)
    stored = {name: tensor.float() for name, tensor in dense.items()}
    stored |= {f"{name}.weight": tensor.dequantize() for name, tensor in layers.items()}
    config = json.loads((artifact / "config.json").read_text())
    del config["quantization_config"]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for file in artifact.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return path


def difference(result: dict[str, Any], expected: Tensor) -> float:
    """The largest difference between vLLM's logarithms of probabilities and ``expected``."""
    steps = zip(result["logprobs"], expected, strict=True)
    gaps: list[float] = [abs(value - float(row[int(token)])) for found, row in steps for token, value in found.items()]
    return max(gaps)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_an_artifact_does_in_vllm_what_the_documents_say(
    name: str, kernels: str, seen: dict[str, Any], logprobs_of: Callable[[str, list[int]], Tensor]
) -> None:
    behaviour, result = BEHAVIOURS[name], seen[name]
    failure = behaviour.avx2 if kernels == "avx2" else behaviour.avx512
    if failure is not None:
        step, message = failure
        assert "tokens" not in result, f"vLLM now runs {name}: say so in docs/precisions.md and here"
        assert result["step"] == step, result
        assert re.search(message, result["message"]), result
        return
    assert "tokens" in result, result
    tokens = result["tokens"]
    expected = logprobs_of("w8a8-127" if name == "w8a8" else name, tokens)
    assert difference(result, expected) < behaviour.tolerance
    # Greedy there and here, but for ties within the tolerance.
    best, chosen = expected.max(-1).values, expected[torch.arange(COUNT), tokens]
    assert float((best - chosen).max()) <= 2 * behaviour.tolerance
    if name == "w8a8":
        assert difference(result, logprobs_of(name, tokens)) < STEPS_APART
    if name != "bf16":
        # The comparison would notice another artifact's weights.
        assert difference(result, logprobs_of("bf16", tokens)) > 2 * behaviour.tolerance
