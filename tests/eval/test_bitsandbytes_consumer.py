"""Transformers and bitsandbytes as a consumer: it computes in float32 with the numbers on disk, and refuses damage."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.consumers import CONSUMERS
from eval.perplexity import container_of, evaluate_artifact
from exports.bitsandbytes import read
from inference.llm_int8 import llm_int8_linear, outlier_columns
from quantize.config import EvalConfig
from quantize.errors import InputError
from quantize.grids import QuantizedTensor

RECIPE = """
# @package _global_
variants:
  int8: {solver: {name: llm_int8, bits: 8}, container: bitsandbytes}
  low: {solver: {name: llm_int8, bits: 8, outlier_threshold: 2.0}, container: bitsandbytes}
  nf4: {solver: {name: nf4}, container: bitsandbytes}
  double: {solver: {name: nf4, double_quant: true}, container: bitsandbytes}
  skipped: {solver: {name: nf4, skip: [self_attn]}, container: bitsandbytes}
"""
RunRecipe = Callable[..., Path]
VARIANTS = ("int8", "low", "nf4", "double", "skipped")
THRESHOLDS = {"int8": 6.0, "low": 2.0}


@pytest.fixture(scope="module")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: RunRecipe) -> Path:
    """One artifact of each kind. Read them only."""
    settings = [f"model.path={tiny_llama}", "device=cpu", "stages=[load,export]"]
    return run_recipe(tmp_path_factory.mktemp("consumer"), RECIPE, *settings) / "variants"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Token ids of one window."""
    return torch.randint(2, 300, (1, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def consumed(artifacts: Path, ids: Tensor) -> dict[str, Tensor]:
    """What the consumer computes, as evaluation uses it."""
    logits = {}
    for name in VARIANTS:
        consumer = CONSUMERS[container_of(artifacts / name)]
        logits[name] = consumer.for_evaluation(consumer.load(artifacts / name, "cpu")).logits(ids).clone()
    return logits


class Int8Linear(torch.nn.Module):
    """A layer of an LLM.int8() artifact on this project's arithmetic."""

    def __init__(self, tensor: QuantizedTensor, threshold: float) -> None:
        super().__init__()
        self.codes = (tensor.codes.to(torch.int16) - 128).to(torch.int8)
        self.scales, self.threshold = tensor.scales[:, 0], threshold

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` ``[batch, tokens, in]`` to ``[batch, tokens, out]``."""
        return llm_int8_linear(inputs, self.codes, self.scales, self.threshold)


@torch.no_grad()
def reference_logits(artifact: Path, model_path: Path, ids: Tensor) -> Tensor:
    """Logits of the original model with this project's reading of the artifact put in, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    quantized, dense = read(artifact)
    for name, tensor in quantized.items():
        model.set_submodule(name, Int8Linear(tensor, THRESHOLDS[artifact.name]))
    for name, weight in dense.items():
        model.get_parameter(name).copy_(weight)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", VARIANTS)
def test_the_consumer_computes_in_float32_what_the_bytes_say(
    name: str, artifacts: Path, ids: Tensor, consumed: dict[str, Tensor], tiny_llama: Path
) -> None:
    expected = reference_logits(artifacts / name, tiny_llama, ids)
    error = float((consumed[name] - expected).norm() / expected.norm())
    # NF4: far below what bfloat16 arithmetic would do (see below). LLM.int8(): a difference in the fifth digit lets some of the
    # next layer's inputs fall to the other side of a tie, so whole models agree no better than they are coded.
    assert error < (0.03 if name in THRESHOLDS else 1e-5)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_every_int8_layer_computes_what_its_bytes_say(name: str, artifacts: Path, ids: Tensor) -> None:
    consumer = CONSUMERS["bitsandbytes"]
    loaded: Any = consumer.for_evaluation(consumer.load(artifacts / name, "cpu"))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(layer: str) -> Callable[..., None]:
        return lambda _, args, output: seen.__setitem__(layer, (args[0].clone(), output.clone()))

    quantized, _ = read(artifacts / name)
    for layer in quantized:
        loaded.model.get_submodule(layer).register_forward_hook(watch(layer))
    loaded.logits(ids)
    with_outliers = 0
    for layer, tensor in quantized.items():
        inputs, output = seen[layer]
        with_outliers += bool(outlier_columns(inputs[0].half(), THRESHOLDS[name]).any())
        found = Int8Linear(tensor, THRESHOLDS[name])(inputs)
        assert float((found - output).norm() / output.norm()) < 1e-4, layer
    assert with_outliers or name == "int8"


def test_the_comparison_tells_artifacts_and_arithmetic_apart(artifacts: Path, ids: Tensor, consumed: dict[str, Tensor]) -> None:
    """Otherwise the test above would prove nothing."""
    for name in VARIANTS:
        for other in VARIANTS:
            gap = float((consumed[name] - consumed[other]).norm() / consumed[name].norm())
            assert name == other or gap > 2e-3, (name, other)
    consumer = CONSUMERS["bitsandbytes"]
    plain = consumer.load(artifacts / "nf4", "cpu").logits(ids).float()
    assert float((plain - consumed["nf4"]).norm() / plain.norm()) > 1e-4


def test_evaluation_uses_neither_bfloat16_nor_float16(artifacts: Path) -> None:
    import bitsandbytes

    consumer = CONSUMERS["bitsandbytes"]
    loaded: Any = consumer.load(artifacts / "nf4", "cpu")
    assert loaded.compute_dtype == "float16"
    widened: Any = consumer.for_evaluation(loaded)
    assert widened.compute_dtype == "float32"
    layers = [module for module in widened.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 28
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert {tensor.dtype for tensor in widened.model.parameters()} == {torch.float32, torch.uint8}


def test_the_threshold_on_disk_is_the_one_used(artifacts: Path) -> None:
    import bitsandbytes

    for name, threshold in THRESHOLDS.items():
        loaded: Any = CONSUMERS["bitsandbytes"].load(artifacts / name, "cpu")
        layers = [module for module in loaded.model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
        assert {layer.state.threshold for layer in layers} == {threshold}
        assert len(layers) == 28


def test_the_programs_and_their_versions_are_named(artifacts: Path) -> None:
    result = evaluate_artifact(artifacts / "int8", EvalConfig(windows=1, seq_len=64))
    programs = (f"{name} {metadata.version(name)}" for name in ("transformers", "bitsandbytes"))
    assert result["consumer"] == " + ".join(programs)
    assert math.isfinite(result["ppl"]) and result["compute_dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("int8", "weight"),
        ("int8", "SCB"),
        ("nf4", "weight"),
        ("nf4", "weight.absmax"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4"),
        ("double", "weight.nested_absmax"),
    ],
)
def test_a_damaged_artifact_is_refused(name: str, lost: str, artifacts: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifacts / name, tmp_path / "artifact")
    tensors = load_file(damaged / "model.safetensors")
    del tensors[f"model.layers.2.mlp.up_proj.{lost}"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="artifact"):
        CONSUMERS["bitsandbytes"].load(damaged, "cpu")


def test_a_change_of_recipe_makes_only_what_it_concerns_again(tiny_llama: Path, tmp_path: Path, run_recipe: RunRecipe) -> None:
    settings = [f"model.path={tiny_llama}", "device=cpu", "stages=[load,export]"]

    def ended(directory: Path) -> dict[str, Any]:
        steps = json.loads((directory / "manifest.json").read_text())["steps"]
        return {step: entry["key"] for step, entry in steps.items()}

    first = ended(run_recipe(tmp_path, RECIPE, *settings))
    assert not any(step.startswith("quantize") for step in first)
    assert first == ended(run_recipe(tmp_path, RECIPE, *settings))
    changed = ended(run_recipe(tmp_path, RECIPE, *settings, "variants.int8.solver.outlier_threshold=5.0"))
    assert {step for step in first if first[step] != changed[step]} == {"export/int8"}
    assert (
        json.loads((tmp_path / "run/variants/int8/config.json").read_text())["quantization_config"]["llm_int8_threshold"] == 5.0
    )


@pytest.mark.slow
def test_the_demo_model_stays_near_its_perplexity(tmp_path: Path, run_recipe: RunRecipe) -> None:
    """The whole pipeline, on the built-in text."""
    from quantize.demo_model import demo_model

    lines = [line for line in RECIPE.splitlines() if not line.startswith(("  low", "  skipped"))]
    recipe = "\n".join([*lines, "  fp16: {solver: {name: none}, container: safetensors}"])
    settings = [f"model.path={demo_model()}", "device=cpu", "eval.windows=2", "eval.seq_len=512"]
    directory = run_recipe(tmp_path, recipe, *settings)
    rows = {row["name"]: row for row in json.loads((directory / "report.json").read_text())["variants"]}
    for row in rows.values():
        print(f"{row['name']}: ppl {row['ppl']:.3f}, {row['bits']} bits, {row['size_bytes'] / 1e6:.1f} MB, {row['consumer']}")
    assert {name: row["bits"] for name, row in rows.items()} == {"fp16": 16, "int8": 8, "nf4": 4, "double": 4}
    assert 0.99 < rows["int8"]["ppl_ratio"] < 1.03
    assert 1.0 < rows["nf4"]["ppl_ratio"] < 1.5
    assert abs(rows["double"]["ppl"] / rows["nf4"]["ppl"] - 1) < 0.02
    assert rows["double"]["size_bytes"] < rows["nf4"]["size_bytes"] < rows["int8"]["size_bytes"] < rows["fp16"]["size_bytes"]
