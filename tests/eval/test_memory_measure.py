"""Predicted memory against memory measured on artifacts, loaded by the programs that run them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from eval.bench_process import PROJECT
from eval.consumers import CONSUMERS
from eval.memory_compare import compare, predict_artifact, render, spec_of
from eval.memory_containers import VariantSpec
from eval.memory_measure import allocated, main, measure, measure_here
from eval.memory_predict import predict
from quantize.errors import InputError

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TOLERANCE = 0.05


def agrees(rows: Iterable[tuple[str, int, int, float]], tolerance: float = TOLERANCE) -> None:
    rows = list(rows)
    assert {"KV cache", "activations", "peak", "resident: codes", "on disk: codes"} <= {what for what, *_ in rows}
    assert all(abs(difference) < tolerance for *_, difference in rows), rows


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
        GPTNeoXConfig(**SMALL),
    ],
    ids=["qwen2", "mistral", "mixtral", "gpt_neox"],
)
def test_families_need_what_is_predicted(
    config: PretrainedConfig,
    logits: str,
    make_checkpoint: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    path = make_checkpoint(tmp_path / "model", config, torch.float32)
    tiny_tokenizer.save_pretrained(path)
    measured = measure_here(path, 200, 2, logits=logits)
    agrees(compare(predict_artifact(path, 200, 2, logits), measured))


def test_a_gptq_artifact_needs_what_is_predicted(tiny_llama: Path, tmp_path: Path) -> None:
    from quantize.__main__ import main as quantize

    arguments = [
        "recipe=gptq",
        "solver=rtn",
        f"model.path={tiny_llama}",
        f"output_dir={tmp_path / 'run'}",
        "solver.group_size=32",
        "stages=[load,calibrate,quantize,export]",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantize", *arguments])
        patch.setattr(logging.getLogger(), "handlers", [])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        assert quantize() == 0
    artifact = tmp_path / "run" / "variants" / "gptq"
    measured = measure(artifact, 16, 1, logits="last")
    prediction = predict_artifact(artifact, 16, 1, "last")
    rows = compare(prediction, measured)
    agrees(rows)
    assert {"resident: scales", "resident: zeros", "resident: g_idx", "resident: unpacked"} <= {what for what, *_ in rows}
    assert "gptqmodel" in measured["consumer"]
    assert spec_of(artifact) == VariantSpec("gptq", "gptq", 4, 32, False, "float16")
    # The kernel unpacks a whole layer: without that, far less would do.
    assert prediction.activation_bytes > 2 * predict_artifact(tiny_llama, 16, 1, "last").activation_bytes


def test_transformers_unpacks_compressed_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    """Stored are a byte a weight and a scale a row; resident, after the first forward, the weights in float16."""
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    quantization = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}},
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    artifact = tmp_path / "int8"
    shutil.copytree(tiny_llama, artifact)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors[f"{name}_scale"] = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / tensors[f"{name}_scale"]).round().to(torch.int8)
        else:
            tensors[name] = tensor
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_llama / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    measured = measure_here(artifact, 96, 1)
    agrees(compare(predict_artifact(artifact, 96, 1), measured))
    assert measured["resident"]["codes"] == 2 * measured["stored"]["codes"]
    assert measured["resident"]["scales"] == measured["stored"]["scales"]
    assert spec_of(artifact) == VariantSpec("int8", "int-quantized", 8, -1, True, "float16")


@pytest.mark.parametrize("method", ["awq", "bitsandbytes"])
def test_containers_that_are_not_measured_are_named(method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with pytest.raises(InputError, match=f"a checkpoint of {method}; the memory report measures"):
        spec_of(tmp_path)


def test_allocations_are_counted_to_the_byte() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.int8)
        del first
        return torch.cat([second, torch.empty(100, dtype=torch.int8)])

    result, peak, kept = allocated(work, "cpu")
    assert (peak, kept) == (4500, result.numel())


def test_a_later_chunk_needs_what_is_predicted(tiny_llama: Path) -> None:
    """The last of four chunks: each layer's cache is there twice while it grows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).eval()
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(2, 64, dtype=torch.int64)

    @torch.inference_mode()
    def prefill() -> None:
        for _ in range(4):
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def size() -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    _, peak, _ = allocated(prefill, "cpu")
    prediction = predict(model.config, VariantSpec("fp16"), 256, 2, prefill_chunk=64, logits="last", runtime="transformers")
    assert prediction.kv_bytes == size()
    assert prediction.activation_bytes == pytest.approx(peak - size(), rel=TOLERANCE)


def test_a_difference_shows(tiny_llama: Path) -> None:
    """Otherwise agreement would prove nothing."""
    measured = measure_here(tiny_llama, 64, 1)
    agrees(compare(predict_artifact(tiny_llama, 64, 1), measured))
    others = {what: difference for what, *_, difference in compare(predict_artifact(tiny_llama, 64, 2), measured)}
    assert others["KV cache"] == pytest.approx(1.0)
    assert others["activations"] > 0.5
    table = render({"tiny": compare(predict_artifact(tiny_llama, 64, 2), measured)})
    assert "+100.00%" in list(table.columns[-1].cells)


def test_an_artifact_that_does_not_load_is_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    artifact = tmp_path / "artifact"
    shutil.copytree(tiny_llama, artifact)
    (artifact / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"transformers does not load .*artifact"):
        measure_here(artifact, 16, 1)
    with pytest.raises(InputError, match="context=4096 exceeds the model's context of 2048 tokens"):
        measure_here(tiny_llama, 4096, 1)
    assert main([str(tiny_llama), "--context", "0"]) == 2


@pytest.mark.slow
def test_the_demo_model_needs_what_is_predicted(tmp_path: Path) -> None:
    """Every component and the peak, for five variants."""
    from transformers import AutoTokenizer

    from quantize.demo_model import demo_model

    artifacts = [demo_model()]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(demo_model()).save_pretrained(tmp_path / name)
        artifacts.append(tmp_path / name)
    for recipe, solver, variant in (("int8", "rtn", "int8"), ("gptq", "rtn", "gptq")):
        run = tmp_path / recipe
        stages = "stages=[load,calibrate,quantize,export]"
        command = [sys.executable, "-m", "quantize", f"recipe={recipe}", f"solver={solver}", f"output_dir={run}", stages]
        subprocess.run(
            command, cwd=PROJECT, check=True, capture_output=True, env={**os.environ, **CONSUMERS["gptq"].environment}
        )
        artifacts.append(run / "variants" / variant)
    for artifact in artifacts:
        for context, batch, logits in ((128, 1, "all"), (96, 2, "last")):
            agrees(
                compare(predict_artifact(artifact, context, batch, logits), measure(artifact, context, batch, logits=logits))
            )
