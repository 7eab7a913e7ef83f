"""Checkpoints that need GPTQModel's own loader: several grids, a quantized output embedding, experts; and tuned blocks.

As a program, this file loads artifacts through the consumer and writes what they compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from eval.consumers import CONSUMERS, gptqmodel_loader
from exports.gptq import read
from quantize.grids import Grid

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = r"""
# @package _global_
variants:
  mixed: {solver: {overrides: [{match: 'down_proj$', bits: 8, group_size: -1}, {match: 'layers\.1\.', bits: 3}]}}
  mixed-symmetric: {solver: {symmetric: true, overrides: [{match: down_proj, bits: 8}]}}
  head: {solver: {lm_head: true}}
  head-rtn: {solver: {name: rtn, lm_head: true, symmetric: true}}
  tuned: {solver: {tune_epochs: 2}}
  static: {solver: {static_groups: true}}
  aware: {solver: {desc_act: false, act_group_aware: true}}
"""
VARIANTS = ("mixed", "mixed-symmetric", "head", "head-rtn", "tuned", "static", "aware")
OWN_LOADER = ("mixed", "mixed-symmetric", "head", "head-rtn")
TOLERANCE = 2e-3  # absolute and relative, of logits in float32


def write_logits(ids_file: Path, output: Path, artifacts: list[Path]) -> None:
    """Logits of every artifact as the consumer computes them in float32."""
    from eval.consumers.transformers_model import for_evaluation, load

    ids, tensors = load_file(ids_file)["ids"], {}
    for artifact in artifacts:
        loaded = for_evaluation(load(artifact, "cpu"))
        tensors[artifact.name] = loaded.logits(ids).clone()
        print(json.dumps({artifact.name: loaded.consumer}))
    save_file(tensors, output)


def consume(ids: Tensor, artifacts: list[Path], folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """:func:`write_logits` in a process of its own: logits and consumer by artifact."""
    save_file({"ids": ids}, folder / "ids.safetensors")
    result = subprocess.run(
        [sys.executable, __file__, str(folder / "ids.safetensors"), str(folder / "logits.safetensors"), *map(str, artifacts)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **CONSUMERS["gptq"].environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    consumers: dict[str, str] = {}
    for line in result.stdout.splitlines():
        if line.startswith('{"'):
            consumers |= json.loads(line)
    return load_file(folder / "logits.safetensors"), consumers


SETTINGS = (
    "calibration.num_samples=8",
    "calibration.seq_len=64",
    "calibration.batch_tokens=128",
    "solver.group_size=32",
    "quality=balanced",
    "stages=[load,calibrate,quantize,export]",
)


@torch.no_grad()
def reference_logits(artifact: Path, model_path: Path, ids: Tensor) -> Tensor:
    """Logits of the original model with this project's reading of the artifact's weights put in, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    quantized, dense = read(artifact)
    if "lm_head" in quantized and model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for name, tensor in quantized.items():
        model.get_submodule(name).weight.copy_(tensor.dequantize())
    for name, weight in dense.items():
        model.get_parameter(name).copy_(weight)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A tiny Llama with tied embeddings whose vocabulary a 4-bit output embedding can pack."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    make_checkpoint(path, config)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def artifacts(model: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: Callable[..., Path]) -> Path:
    return run_recipe(tmp_path_factory.mktemp("own-loader"), RECIPE, f"model.path={model}", *SETTINGS) / "variants"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 300, (1, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def consumed(
    artifacts: Path, ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, str]]:
    return consume(ids, [artifacts / name for name in VARIANTS], tmp_path_factory.mktemp("logits"))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_consumer_computes_with_the_weights_this_project_means(
    name: str, artifacts: Path, ids: Tensor, consumed: Any, model: Path
) -> None:
    logits, consumers = consumed
    assert consumers[name].startswith("gptqmodel" if name in OWN_LOADER else "transformers")
    torch.testing.assert_close(logits[name], reference_logits(artifacts / name, model, ids), atol=TOLERANCE, rtol=TOLERANCE)


def test_the_comparison_tells_artifacts_apart(consumed: Any) -> None:
    logits = consumed[0]
    for name in VARIANTS:
        for other in VARIANTS:
            assert name == other or (logits[name] - logits[other]).abs().max() > 5 * TOLERANCE, (name, other)


def test_overrides_put_layers_on_their_own_grids(artifacts: Path) -> None:
    quantized, _ = read(artifacts / "mixed")
    grids = {name: tensor.grid for name, tensor in quantized.items()}
    # The first match counts: down_proj of block 1 has 8 bits and not 3.
    assert grids["model.layers.0.mlp.down_proj"] == grids["model.layers.1.mlp.down_proj"] == Grid(8, -1, False)
    assert grids["model.layers.0.self_attn.q_proj"] == Grid(4, 32, False)
    assert grids["model.layers.1.self_attn.q_proj"] == Grid(3, 32, False)
    assert int(quantized["model.layers.1.self_attn.q_proj"].codes.max()) <= 7


def test_a_quantized_output_embedding_is_untied(artifacts: Path, model: Path) -> None:
    config = json.loads((artifacts / "head" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["lm_head"] is True
    quantized, dense = read(artifacts / "head")
    original = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(dense["model.embed_tokens.weight"], original)
    assert "lm_head.weight" not in dense
    error = (quantized["lm_head"].dequantize() - original.float()).abs().max()
    assert 0 < float(error) < float(original.abs().max())


def test_formats_are_the_oldest_that_the_loader_takes(artifacts: Path) -> None:
    formats = {
        name: json.loads((artifacts / name / "config.json").read_text())["quantization_config"]["checkpoint_format"]
        for name in VARIANTS
    }
    assert formats == {
        "mixed": "gptq_v2",
        "mixed-symmetric": "gptq",
        "head": "gptq_v2",
        "head-rtn": "gptq",
        "tuned": "gptq",
        "static": "gptq",
        "aware": "gptq",
    }


def test_groups_stay_consecutive_where_they_should(artifacts: Path) -> None:
    for name, consecutive in (("static", True), ("aware", True), ("tuned", False)):
        quantized, _ = read(artifacts / name)
        shuffled = [layer for layer, tensor in quantized.items() if bool((tensor.g_idx.diff() < 0).any())]
        assert bool(shuffled) is not consecutive, name


def test_tuning_changes_norms_in_the_artifact_only_by_a_little(artifacts: Path, model: Path) -> None:
    original, (_, tuned), (_, plain) = (
        load_file(model / "model.safetensors"),
        read(artifacts / "tuned"),
        read(artifacts / "static"),
    )
    norms = [name for name in tuned if "layernorm" in name]
    assert len(norms) == 4
    for name in norms:
        assert tuned[name].dtype == original[name].dtype
        assert not torch.equal(tuned[name], original[name])
        assert float((tuned[name] - original[name]).abs().max()) < 0.1
        assert torch.equal(plain[name], original[name])


def test_experts_are_loaded_by_gptqmodel(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    moe_config: Callable[..., PretrainedConfig],
    tiny_tokenizer: PreTrainedTokenizerFast,
    run_recipe: Callable[..., Path],
    ids: Tensor,
) -> None:
    config = moe_config(vocab_size=320, intermediate_size=128, moe_intermediate_size=64, tie_word_embeddings=False)
    path = make_checkpoint(tmp_path / "moe", config)
    tiny_tokenizer.save_pretrained(path)
    recipe = "# @package _global_\nvariants:\n  moe: {}\n"
    artifacts = run_recipe(tmp_path, recipe, f"model.path={path}", *SETTINGS) / "variants"
    assert gptqmodel_loader.needed(artifacts / "moe", {"quant_method": "gptq"})
    logits, consumers = consume(ids, [artifacts / "moe"], tmp_path)
    assert consumers["moe"].startswith("gptqmodel")
    # The same weights in transformers' own model: written out dense under the checkpoint's names.
    quantized, dense = read(artifacts / "moe")
    dense |= {f"{name}.weight": tensor.dequantize() for name, tensor in quantized.items()}
    (tmp_path / "dense").mkdir()
    save_file(
        {name: tensor.float() for name, tensor in dense.items()}, tmp_path / "dense" / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(logits["moe"], expected, atol=TOLERANCE, rtol=TOLERANCE)


if __name__ == "__main__":
    write_logits(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
