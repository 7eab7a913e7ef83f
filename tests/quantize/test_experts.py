"""Mixture-of-experts models: the walk and the artifact have each expert's matrices as layers, as the checkpoint has them."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from exports import gptq
from quantize.__main__ import main
from quantize.blocks import DecoderWalk, linear_layers, linear_shape, set_linear_weight
from quantize.checkpoint import open_checkpoint
from quantize.experts import Experts, is_router, separate_experts
from quantize.forwards import run_block
from quantize.grids import Grid, quantize_nearest

MakeCheckpoint = Callable[..., Path]
CloseExpert = Callable[[Path, int], None]
TOKENS, EXPERTS, UNREACHED = 12, 8, 7

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
ROUTED: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Config, where a checkpoint keeps a block's experts, and what it calls their gate, up and down projection.
FAMILIES: dict[str, tuple[PretrainedConfig, str, tuple[str, str, str]]] = {
    "qwen3_moe": (
        Qwen3MoeConfig(**COMMON, **ROUTED, head_dim=16, moe_intermediate_size=32, norm_topk_prob=True),
        "mlp.experts",
        PROJECTIONS,
    ),
    "qwen3_moe-some-dense": (
        Qwen3MoeConfig(**COMMON, **ROUTED, head_dim=16, moe_intermediate_size=32, mlp_only_layers=[1]),
        "mlp.experts",
        PROJECTIONS,
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**COMMON, **ROUTED, moe_intermediate_size=32, shared_expert_intermediate_size=64),
        "mlp.experts",
        PROJECTIONS,
    ),
    "olmoe": (OlmoeConfig(**COMMON, **ROUTED), "mlp.experts", PROJECTIONS),
    "mixtral": (
        MixtralConfig(**COMMON, num_local_experts=EXPERTS, num_experts_per_tok=2),
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
}


def expert_layers(family: str, number: int) -> list[str]:
    """Names inside a block of one expert's layers: gate, up, down."""
    _, home, names = FAMILIES[family]
    return [f"{home}.{number}.{name}" for name in names]


def open_walk(path: Path) -> DecoderWalk:
    return DecoderWalk(open_checkpoint(str(path)), torch.device("cpu"), torch.float32)


def windows(count: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, 300, (count, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: MakeCheckpoint,
    close_expert: CloseExpert,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    """A tiny random checkpoint of each family, with a closed expert and a tokenizer. Read them only."""
    paths = {}
    for family, (config, _, _) in FAMILIES.items():
        paths[family] = make_checkpoint(tmp_path_factory.mktemp("experts") / family, config)
        close_expert(paths[family], UNREACHED)
        tiny_tokenizer.save_pretrained(paths[family])
    return paths


@torch.no_grad()
def block_outputs(path: Path, ids: Tensor) -> list[Tensor]:
    """What each decoder block of transformers' own model returns; its experts are fused."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert any(name.endswith("experts.gate_up_proj") and p.dim() == 3 for name, p in model.named_parameters())
    outputs: list[Tensor] = []
    for block in model.get_submodule("model.layers"):
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=ids, use_cache=False)
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_with_separate_experts_compute_what_the_fused_ones_do(family: str, checkpoints: dict[str, Path]) -> None:
    walk, ids = open_walk(checkpoints[family]), windows(3)
    hidden, arguments = walk.block_inputs(ids), walk.block_arguments(TOKENS)
    # The model is built after the walk: the walk must not have changed transformers' classes.
    expected = block_outputs(checkpoints[family], ids)
    assert len(expected) == walk.count == 2
    for index, theirs in enumerate(expected):
        with walk.loaded_block(index) as block, torch.no_grad():
            hidden = run_block(block, hidden, arguments[index])
        assert torch.allclose(hidden, theirs, rtol=1e-5, atol=1e-5), index


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_layers_under_the_checkpoints_names(family: str, checkpoints: dict[str, Path]) -> None:
    walk = open_walk(checkpoints[family])
    layers = walk.layer_names(0)
    for number in range(EXPERTS):
        gate, up, down = (f"model.layers.0.{name}" for name in expert_layers(family, number))
        assert (layers[gate], layers[up], layers[down]) == ((32, 64), (32, 64), (64, 32))
        assert torch.equal(walk.weight(up), walk.checkpoint.tensor(f"{up}.weight").float())
    # Every parameter has its tensor and every tensor its parameter, by one name.
    with walk.loaded_block(0) as block:
        parameters = {f"model.layers.0.{name}" for name, _ in block.named_parameters()}
    assert parameters == {name for name in walk.checkpoint.names() if name.startswith("model.layers.0.")}
    assert all(walk.canonical(name) == name for name in walk.checkpoint.names())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_block_can_be_copied(family: str, checkpoints: dict[str, Path]) -> None:
    walk = open_walk(checkpoints[family])
    hidden, arguments = walk.block_inputs(windows(1)), walk.block_arguments(TOKENS)[0]
    with walk.loaded_block(0) as block, torch.no_grad():
        twin = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
        expected = run_block(block, hidden, arguments)
        assert list(linear_layers(twin)) == list(linear_layers(block))
        for name in expert_layers(family, 0):
            set_linear_weight(linear_layers(block)[name], torch.zeros(linear_shape(linear_layers(block)[name])))
        assert torch.equal(run_block(twin, hidden, arguments), expected)
        assert not torch.equal(run_block(block, hidden, arguments), expected)


def test_routers_are_told_by_name() -> None:
    assert all(map(is_router, ("model.layers.0.mlp.gate", "gate", "mlp.shared_expert_gate", "moe.router", "moe.router.layer")))
    assert not any(
        map(is_router, ("mlp.gate_proj", "mlp.experts.0.gate_proj", "mlp.gate_up_proj", "mlp.shared_expert.up_proj"))
    )


def test_experts_stored_fused_or_computed_otherwise_are_left_alone() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"][0])
    apart = [f"model.layers.{i}.mlp.experts.0.gate_proj.weight" for i in range(2)]
    separate_experts(model, [name for name, _ in model.named_parameters()])
    assert not any(isinstance(module, Experts) for module in model.modules())
    other = model.get_submodule("model.layers.0.mlp.experts")
    for flag in ("is_transposed", "has_post_expert_norm"):
        before = getattr(other, flag)
        setattr(other, flag, True)
        separate_experts(model, apart[:1])
        assert not any(isinstance(module, Experts) for module in model.modules()), flag
        setattr(other, flag, before)
    separate_experts(model, apart[1:])
    found = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    assert found == ["model.layers.1.mlp.experts"]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "model.layers.1.mlp.experts.gate_up_proj" not in dict(model.named_parameters())


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """``cli("key=value", ...)``: the log of a successful run."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
        code, captured = main(), capsys.readouterr()
        assert code == 0, captured.err
        return captured.err

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def overrides(model: Path, directory: Path) -> list[str]:
    return [
        "recipe=gptq",
        f"model.path={model}",
        f"output_dir={directory}",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
        "calibration.batch_tokens=32",
        "solver.group_size=32",
        "quality=fast",
        "stages=[load,calibrate,quantize,export]",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_artifact_has_each_expert_and_dense_routers(
    family: str, checkpoints: dict[str, Path], tmp_path: Path, cli: Callable[..., str]
) -> None:
    log = cli(*overrides(checkpoints[family], tmp_path / "run"))
    artifact = next((tmp_path / "run" / "variants").glob("*gptq*"))
    quantized, dense = gptq.read(artifact)
    walk = open_walk(checkpoints[family])
    layers = [name for index in range(walk.count) for name in walk.layer_names(index)]
    routers = [name for name in layers if is_router(name)]
    assert set(quantized) == set(layers) - set(routers)
    assert {f"model.layers.0.{name}" for number in range(EXPERTS) for name in expert_layers(family, number)} <= set(quantized)
    stored = load_file(checkpoints[family] / "model.safetensors")
    assert set(dense) == set(stored) - {f"{name}.weight" for name in quantized}
    assert any(name.endswith(".gate.weight") for name in dense)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in dense.items())
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert len(config.get("dynamic", {})) == len(routers) == (2 if family == "qwen2_moe" else 0)

    for name, tensor in quantized.items():
        weight = stored[f"{name}.weight"].float()
        nearest = quantize_nearest(weight, Grid(bits=4, group_size=32, symmetric=config["sym"]))
        unreached = f"experts.{UNREACHED}." in name
        assert torch.equal(tensor.codes, nearest.codes) is unreached, name
        assert torch.equal(tensor.dequantize(), nearest.dequantize()) is unreached, name
        assert (name in log) is unreached
    assert f"no calibration token reaches model.layers.0.{expert_layers(family, UNREACHED)[0]}, " in log


def test_activations_on_disk_give_the_same_artifact(
    checkpoints: dict[str, Path], tmp_path: Path, cli: Callable[..., str]
) -> None:
    for kind in ("memory", "disk"):
        cli(*overrides(checkpoints["qwen3_moe"], tmp_path / kind), f"calibration.activations={kind}")
    left, right = (next((tmp_path / kind / "variants").glob("*gptq*")) for kind in ("memory", "disk"))
    assert (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()
