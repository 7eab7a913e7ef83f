"""Mixture-of-experts models: experts are layers of their own, whichever of them the calibration tokens reach."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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
from quantize.forwards import Hessian, find_groups, parallel_forward, rerun_forward, run_block, suspended_forward
from quantize.grids import Grid, quantize_nearest

MakeCheckpoint = Callable[..., Path]
Group = list[str]
FORWARDS = [suspended_forward, rerun_forward, parallel_forward]
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


def close_expert(path: Path) -> None:
    """Change the routers so that no token ever goes to the last expert.

    Of a row and its negative one gives a positive logit, or both zero; two such pairs leave a row of zeros no place.
    """
    stored = load_file(path / "model.safetensors")
    for name, router in stored.items():
        if name.endswith(".gate.weight"):
            router[1], router[3], router[UNREACHED] = -router[0], -router[2], 0
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint, tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """A tiny random checkpoint of each family, with a closed expert and a tokenizer. Read them only."""
    paths = {}
    for family, (config, _, _) in FAMILIES.items():
        paths[family] = make_checkpoint(tmp_path_factory.mktemp("experts") / family, config)
        close_expert(paths[family])
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
    model.get_submodule("model.layers.0.mlp.experts").is_transposed = True
    separate_experts(model, apart)
    found = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    assert found == ["model.layers.1.mlp.experts"]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "model.layers.1.mlp.experts.gate_up_proj" not in dict(model.named_parameters())


class Bench:
    """The first block of a tiny Qwen3-MoE and one short window in each batch, so that every batch misses some experts."""

    def __init__(self, path: Path) -> None:
        self.walk = open_walk(path)
        self.batches = [self.walk.block_inputs(ids) for ids in torch.split(windows(6, 3), 1)]
        self.arguments = self.walk.block_arguments(3)[0]
        self.reached = [self.layers_reached(hidden) for hidden in self.batches]

    def layers_reached(self, hidden: Tensor) -> list[str]:
        """Linear layers in the order in which one batch comes to them."""
        calls: list[str] = []
        with self.walk.loaded_block(0) as block, torch.no_grad():
            handles = [
                layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
                for name, layer in linear_layers(block).items()
            ]
            run_block(block, hidden, self.arguments)
            for handle in handles:
                handle.remove()
        return calls

    def groups(self) -> list[Group]:
        with self.walk.loaded_block(0) as block:
            return find_groups(block, self.batches, self.arguments)

    def run(
        self, forward: Callable[..., None], groups: list[Group], change: bool = True
    ) -> tuple[list[tuple[Group, Tensor | None]], list[Tensor]]:
        """What ``forward`` gives the solver, and the block's outputs; the solver rounds weights coarsely if it may."""
        solved: list[tuple[Group, Tensor | None]] = []
        outputs: dict[int, Tensor] = {}
        with self.walk.loaded_block(0) as block:
            layers = linear_layers(block)

            def solve(names: Group, hessian: Hessian) -> None:
                solved.append((names, hessian.value() if hessian.count else None))
                for name in names if change else ():
                    set_linear_weight(layers[name], (layers[name].get_parameter("weight") * 8).round() / 8)

            count = len(self.batches)
            forward(block, groups, count, self.batches.__getitem__, outputs.__setitem__, self.arguments, solve)
        return solved, [outputs[batch] for batch in range(count)]


@pytest.fixture(scope="module")
def bench(checkpoints: dict[str, Path]) -> Bench:
    return Bench(checkpoints["qwen3_moe"])


def test_groups_hold_experts_that_the_first_batch_misses(bench: Bench) -> None:
    everywhere = {name for reached in bench.reached for name in reached}
    assert len(bench.reached[0]) < len(everywhere)
    groups = bench.groups()
    assert {name for group in groups for name in group} == everywhere
    assert sum(map(len, groups)) == len(everywhere)
    assert groups[:2] == [[f"self_attn.{name}_proj" for name in "qkv"], ["self_attn.o_proj"]]
    for number in {int(name.split(".")[2]) for name in everywhere if "experts" in name}:
        gate, up, down = expert_layers("qwen3_moe", number)
        assert groups[groups.index([gate, up]) + 1] == [down]
    assert not any(f"experts.{UNREACHED}." in name for name in everywhere)


def test_order_of_groups_is_an_order_of_execution_of_every_batch(bench: Bench) -> None:
    place = {name: number for number, group in enumerate(bench.groups()) for name in group}
    for reached in bench.reached:
        places = [place[name] for name in reached]
        assert places == sorted(places)


def test_no_batch_is_taken_that_is_not_needed(bench: Bench, checkpoints: dict[str, Path]) -> None:
    taken: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number, hidden in enumerate(bench.batches):
            taken.append(number)
            yield hidden

    with bench.walk.loaded_block(0) as block:
        find_groups(block, batches(), bench.arguments)
    assert taken == list(range(len(bench.batches)))  # the closed expert is looked for everywhere
    taken.clear()
    dense = open_walk(checkpoints["qwen3_moe-some-dense"])
    with dense.loaded_block(1) as block:
        assert len(find_groups(block, batches(), dense.block_arguments(3)[1])) == 4
    assert taken == [0]


class Routes(nn.Module):
    """Comes to its layers in the order that the first numbers of the input name."""

    def __init__(self, with_empty: bool = False) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))
        self.with_empty = with_empty

    def forward(self, hidden: Tensor) -> Tensor:
        named = [int(number) for number in hidden[0, :, 0] if number >= 0]
        for number, step in enumerate(self.steps) if self.with_empty else ((n, self.steps[n]) for n in named):
            step(hidden[0, 1:] + 1 if number in named else hidden[0, :0])
        return hidden


def route(*steps: int) -> Tensor:
    """A batch of one window that comes to these steps."""
    hidden = torch.full((1, 6, 4), -1.0)
    hidden[0, : len(steps), 0] = torch.tensor(steps, dtype=torch.float32)
    return hidden


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([(3, 1, 0)], [3, 1, 0]),
        ([(3, 0), (3, 2, 0), (3, 1, 0), (4,)], [3, 1, 2, 0, 4]),
        ([(4, 2), (2, 0), (1, 0)], [1, 4, 2, 0]),
        ([(2, 1), (1, 0), (0, 2)], [0, 1, 2]),  # no order serves all three
    ],
)
def test_sequences_of_batches_are_merged(routes: list[tuple[int, ...]], expected: list[int]) -> None:
    groups = find_groups(Routes(), [route(*steps) for steps in routes], ((), {}))
    assert groups == [[f"steps.{number}"] for number in expected]


def test_layer_first_reached_later_stays_out_of_an_earlier_group() -> None:
    class Sharing(Routes):
        def forward(self, hidden: Tensor) -> Tensor:
            for number, step in enumerate(self.steps[:3]):
                step(hidden if number == 1 or hidden[0, 0, 0] > number else hidden[:, :0])
            return hidden

    block = Sharing()
    groups = find_groups(block, [route(0), route(1), route(4)], ((), {}))
    assert groups == [["steps.0"], ["steps.1"], ["steps.2"]]


@pytest.mark.parametrize("forward", FORWARDS)
def test_hessians_hold_the_rows_routed_to_each_expert(bench: Bench, forward: Callable[..., None]) -> None:
    groups = [*bench.groups(), expert_layers("qwen3_moe", UNREACHED)[:2]]
    solved, outputs = bench.run(forward, groups, change=False)
    assert [names for names, _ in solved] == groups
    inputs: dict[str, list[Tensor]] = {}
    with bench.walk.loaded_block(0) as block, torch.no_grad():
        for name, layer in linear_layers(block).items():
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        expected = [run_block(block, hidden, bench.arguments) for hidden in bench.batches]
        for layer in linear_layers(block).values():
            layer._forward_pre_hooks.clear()
    assert all(torch.equal(left, right) for left, right in zip(outputs, expected, strict=True))
    for names, found in solved[:-1]:
        hessian = Hessian()
        for rows in inputs[names[0]]:
            hessian.add(rows)
        assert hessian.count == sum(rows.numel() // rows.shape[-1] for rows in inputs[names[-1]])
        assert found is not None and torch.equal(found, hessian.value()), names
    assert solved[-1][1] is None
    some = [names for names, _ in solved if len(inputs.get(names[0], [])) in range(1, len(bench.batches))]
    assert some  # there are experts that only some batches reach


def test_suspending_equals_rerunning_where_batches_miss_experts(bench: Bench) -> None:
    groups = [expert_layers("qwen3_moe", UNREACHED)[:2], *bench.groups(), expert_layers("qwen3_moe", UNREACHED)[2:]]
    (suspended, left), (rerun, right) = bench.run(suspended_forward, groups), bench.run(rerun_forward, groups)
    assert [names for names, _ in suspended] == [names for names, _ in rerun] == groups
    assert suspended[0][1] is rerun[0][1] is suspended[-1][1] is rerun[-1][1] is None
    for (names, ours), (_, theirs) in zip(suspended[1:-1], rerun[1:-1], strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs), names
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(left, right, strict=True))
    unquantized = bench.run(suspended_forward, [])[1]
    assert not any(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(left, unquantized, strict=True))


@pytest.mark.parametrize("forward", FORWARDS)
def test_calls_without_rows_count_for_nothing(forward: Callable[..., None]) -> None:
    batches = [route(0, 3), route(3), route(1, 3)]
    groups = [[f"steps.{number}"] for number in range(5)]
    solved: dict[bool, list[tuple[Group, Tensor | None]]] = {False: [], True: []}
    for with_empty, found in solved.items():
        block = Routes(with_empty)
        assert find_groups(block, batches, ((), {})) == [["steps.0"], ["steps.1"], ["steps.3"]]

        def solve(names: Group, hessian: Hessian, found: list[tuple[Group, Tensor | None]] = found) -> None:
            found.append((names, hessian.value() if hessian.count else None))

        forward(block, groups, len(batches), batches.__getitem__, lambda *_: None, ((), {}), solve)
    assert [names for names, _ in solved[True]] == [names for names, _ in solved[False]] == groups
    for number, ((_, ours), (_, theirs)) in enumerate(zip(solved[True], solved[False], strict=True)):
        if number in (0, 1, 3):
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
            assert bool(torch.isfinite(ours).all())
        else:
            assert ours is theirs is None


def test_hessian_counts_rows() -> None:
    hessian = Hessian()
    hessian.add(torch.ones(0, 4))
    assert hessian.count == 0
    with pytest.raises(ValueError, match="no inputs were added"):
        hessian.value()
    hessian.add(torch.ones(2, 3, 4))
    hessian.add(torch.ones(5, 4))
    assert hessian.count == 11


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
