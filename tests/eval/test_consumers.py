"""Consumers: what the program that runs an artifact computes is what this project's numbers say it should.

As a program, this file is that consumer: transformers and GPTQModel as a user loads them, without this project's loader.
Those imports want variables set before the process starts, and take seconds, so all artifacts share one process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.consumers import CONSUMERS
from eval.perplexity import container_of
from exports.containers import CONTAINERS
from exports.gptq import read
from quantize.activations import quantize_inputs, token_steps
from quantize.errors import InputError

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = r"""
# @package _global_
variants:
  dense: {solver: {name: none}, container: safetensors}
  gptq: {}
  no-order: {solver: {desc_act: false}}
  symmetric: {solver: {symmetric: true}}
  bits2: {solver: {bits: 2}}
  bits3: {solver: {name: rtn, bits: 3}}
  bits8: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}}
  w8a16: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}, container: compressed-tensors}
  w4a16: {solver: {name: rtn, bits: 4, symmetric: true}, container: compressed-tensors}
  asymmetric: {solver: {name: rtn, bits: 4}, container: compressed-tensors}
  w8a8:
    solver: {name: rtn, bits: 8, group_size: -1, symmetric: true, input_activations: dynamic}
    container: compressed-tensors
  w8a8-static:
    solver: {name: rtn, bits: 8, group_size: -1, symmetric: true, input_activations: static, smoothquant: true}
    container: compressed-tensors
  bf16: {solver: {name: rtn, bits: 3, symmetric: true}, container: compressed-tensors, dtype: bfloat16}
  skipped: {solver: {skip: [down_proj, 'layers\.1\.self_attn\.q_proj']}}
"""
VARIANTS = ("dense", "gptq", "no-order", "symmetric", "bits2", "bits3", "w8a16", "w4a16", "w8a8", "w8a8-static", "bf16")
TOLERANCE = 1e-3  # absolute and relative, of logits in float32


def load_plainly(artifact: Path) -> Any:
    """An artifact in float32, loaded without this project."""
    options: dict[str, Any] = {}
    quantization = json.loads((artifact / "config.json").read_text()).get("quantization_config")
    if quantization and quantization["quant_method"] == "gptq":
        from transformers import GPTQConfig

        options["quantization_config"] = GPTQConfig(bits=quantization["bits"], backend="torch")
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto", device_map={"": "cpu"}, **options)
    return torch.nn.Module.float(model.eval())


@torch.no_grad()
def write_logits(ids_file: Path, artifacts: list[Path], output: Path) -> None:
    """Logits of every artifact for the windows in ``ids_file``, and the mean loss of each window."""
    ids = load_file(ids_file)["ids"]
    tensors = {}
    for artifact in artifacts:
        model = load_plainly(artifact)
        tensors[f"{artifact.name}.logits"] = model(input_ids=ids[:1], use_cache=False).logits.contiguous()
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in ids]
        tensors[f"{artifact.name}.losses"] = torch.tensor(losses, dtype=torch.float64)
    save_file(tensors, output)


def consume(ids: Tensor, artifacts: list[Path], folder: Path) -> dict[str, Tensor]:
    """:func:`write_logits` in a process of its own."""
    save_file({"ids": ids}, folder / "ids.safetensors")
    result = subprocess.run(
        [sys.executable, __file__, str(folder / "ids.safetensors"), str(folder / "logits.safetensors"), *map(str, artifacts)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **CONSUMERS["gptq"].environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(load_file(folder / "logits.safetensors"))


@torch.no_grad()
def reference_logits(artifact: Path, model_path: Path, ids: Tensor) -> Tensor:
    """Logits of the original model with this project's reading of the artifact's weights put in, in float32.

    Where the artifact says that a layer's inputs are quantized, they are.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    container = CONTAINERS[container_of(artifact)]
    quantized, dense = container.read(artifact)
    config = json.loads((artifact / "config.json").read_text()).get("quantization_config", {})
    dynamic = any(group["input_activations"] for group in config.get("config_groups", {}).values())
    for name, tensor in quantized.items():
        model.get_submodule(name).weight.copy_(tensor.dequantize())
        if tensor.input_scale is not None or dynamic:
            fixed = tensor.input_scale
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, fixed=fixed: (quantize_inputs(args[0], token_steps(args[0]) if fixed is None else fixed),)
            )
    for name, weight in dense.items():
        model.get_parameter(name).copy_(weight)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.fixture(scope="module")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: Callable[..., Path]) -> Path:
    """A run directory's artifacts, one for each kind of grid."""
    settings = [
        f"model.path={tiny_llama}",
        "calibration.num_samples=8",
        "calibration.seq_len=64",
        "solver.group_size=32",
        "quality=fast",
        "stages=[load,calibrate,quantize,export]",
    ]
    return run_recipe(tmp_path_factory.mktemp("consumers"), RECIPE, *settings) / "variants"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Token ids of two windows."""
    return torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def consumed(artifacts: Path, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the consumer computes on every artifact."""
    return consume(ids, [artifacts / name for name in VARIANTS], tmp_path_factory.mktemp("logits"))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_consumer_computes_with_the_weights_this_project_means(
    name: str, artifacts: Path, ids: Tensor, consumed: dict[str, Tensor], tiny_llama: Path
) -> None:
    expected = reference_logits(artifacts / name, tiny_llama, ids[:1])
    torch.testing.assert_close(consumed[f"{name}.logits"], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_asymmetric_compressed_tensors_are_loaded_decoded(artifacts: Path, ids: Tensor, tiny_llama: Path) -> None:
    consumer = CONSUMERS["compressed-tensors"]
    loaded = consumer.for_evaluation(consumer.load(artifacts / "asymmetric", "cpu"))
    expected = reference_logits(artifacts / "asymmetric", tiny_llama, ids[:1])
    # The decoded weights are float16, as the checkpoint is.
    torch.testing.assert_close(loaded.logits(ids[:1]), expected, atol=1e-2, rtol=0)


def test_the_comparison_tells_artifacts_apart(artifacts: Path, ids: Tensor, consumed: dict[str, Tensor]) -> None:
    """Otherwise the test above would prove nothing."""
    for name in VARIANTS:
        for other in VARIANTS:
            gap = (consumed[f"{name}.logits"] - consumed[f"{other}.logits"]).abs().max()
            assert name == other or gap > 10 * TOLERANCE, (name, other)


def test_skipped_layers_are_dense_in_the_artifact(artifacts: Path) -> None:
    quantized, dense = read(artifacts / "skipped")
    assert "model.layers.1.self_attn.q_proj.weight" in dense
    assert len(quantized) == 4 * 6 - 1


def test_the_consumer_leaves_skipped_layers_alone(artifacts: Path, ids: Tensor, tiny_llama: Path, tmp_path: Path) -> None:
    consumed = consume(ids, [artifacts / "skipped"], tmp_path)
    expected = reference_logits(artifacts / "skipped", tiny_llama, ids[:1])
    torch.testing.assert_close(consumed["skipped.logits"], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["dense", "gptq"])
def test_a_missing_tensor_is_refused_and_not_made_up(name: str, artifacts: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "artifact"
    damaged.mkdir()
    for file in (artifacts / name).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    lost = "model.layers.2.mlp.up_proj." + ("weight" if name == "dense" else "qweight")
    del tensors[lost]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    result = subprocess.run(
        [sys.executable, "-m", "eval.perplexity", str(damaged), "--windows", "1", "--seq-len", "16"],
        cwd=PROJECT,
        env={**os.environ, **CONSUMERS["gptq"].environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert lost in result.stderr.splitlines()[-1]


def test_an_unknown_container_is_refused_with_those_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "exl2"}}')
    with pytest.raises(InputError, match=r"container exl2; known are safetensors, gptq"):
        container_of(tmp_path)


def test_every_container_has_a_consumer() -> None:
    assert set(CONSUMERS) == set(CONTAINERS)


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes ``[rows, columns]``, 0 to 15, to int32 ``[rows, columns / 8]``: the first code in the lowest bits."""
    wide = codes.to(torch.int64).view(codes.shape[0], -1, 8) << (4 * torch.arange(8))
    return wide.sum(2).to(torch.int32)


def test_a_compressed_tensors_checkpoint_computes_in_float32_what_its_bytes_say(tiny_llama: Path, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    quantization = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    generator = torch.Generator().manual_seed(0)
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            packed[name], dense[name] = tensor, tensor.float()
            continue
        rows, columns = tensor.shape
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        scales = (torch.rand(rows, columns // 32, generator=generator) / 50 + 0.001).half()
        # One product of a float16 scale and a small integer needs more than float16's bits: float16 arithmetic would show.
        dense[name] = (codes - 8) * scales.float().repeat_interleave(32, 1)
        packed |= {f"{name}_packed": pack_nibbles(codes), f"{name}_scale": scales}
        packed[f"{name}_shape"] = torch.tensor([rows, columns])
    shutil.copytree(tiny_llama, tmp_path / "packed")
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    shutil.copytree(tiny_llama, tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    consumer = CONSUMERS[container_of(tmp_path / "packed")]
    loaded = consumer.for_evaluation(consumer.load(tmp_path / "packed", "cpu"))
    expected = CONSUMERS["safetensors"].load(tmp_path / "dense", "cpu")
    ids = torch.arange(200)[None]
    assert loaded.consumer.endswith(f"compressed-tensors {metadata.version('compressed-tensors')}")
    assert loaded.compute_dtype == "float32"
    assert loaded.logits(ids).dtype == torch.float32
    torch.testing.assert_close(loaded.logits(ids), expected.logits(ids), rtol=1e-5, atol=1e-5)


def test_without_compressed_tensors_its_checkpoint_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    shutil.copytree(tiny_llama, tmp_path / "artifact")
    config = json.loads((tiny_llama / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "artifact" / "config.json").write_text(json.dumps(config | quantization))
    with pytest.raises(InputError, match="needs compressed-tensors"):
        CONSUMERS["compressed-tensors"].load(tmp_path / "artifact", "cpu")


@pytest.mark.slow
def test_the_demo_model_is_quantized_as_promised(tmp_path: Path) -> None:
    from calibration.sources import load_text
    from quantize.demo_model import demo_model

    run = tmp_path / "run"
    command = [sys.executable, "-m", "quantize", "recipe=gptq", "quality=fast", f"output_dir={run}"]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)

    step = json.loads((run / "manifest.json").read_text())["steps"]["quantize/gptq"]
    assert step["peak_rss_bytes"] < 1.5 * 2**30
    assert step["seconds"] < 180

    artifact = run / "variants" / "gptq"
    stream = AutoTokenizer.from_pretrained(artifact)(load_text("builtin", "heldout").text, add_special_tokens=False)
    ids = torch.tensor(stream["input_ids"])[: 16 * 1024].view(16, 1024)
    consumed = consume(ids, [artifact], tmp_path)
    ppl = json.loads((run / "report.json").read_text())["variants"][0]["ppl"]
    assert ppl == pytest.approx(math.exp(float(consumed["gptq.losses"].mean())), rel=1e-3)

    expected = reference_logits(artifact, demo_model(), ids[:1])
    torch.testing.assert_close(consumed["gptq.logits"], expected, atol=TOLERANCE, rtol=TOLERANCE)


if __name__ == "__main__":
    write_logits(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[3:]], Path(sys.argv[2]))
