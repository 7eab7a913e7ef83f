"""The memory plan of a quantization against quantizations measured, and its command line."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig

from eval.memory_geometry import load_config
from eval.memory_quantize import DOES_NOT_FIT, main, parse, report
from eval.memory_quantize_measure import main as measure
from eval.memory_quantize_measure import measure_variant
from eval.memory_quantize_plan import CUDA_WORKSPACE, QuantizationPlan, plan_variant
from eval.memory_quantize_trace import ALIKE, EMBEDDING, KIND_NAMES, PHASE_NAMES, RUNNING, SOLVING, TUNING
from quantize.config import RunConfig
from quantize.errors import InputError
from quantize.files import read_json

SIZES: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
CALIBRATION = ["calibration.num_samples=6", "calibration.seq_len=64", "calibration.batch_tokens=128"]
# Less work and as much memory.
QUICK = ["solver.search_steps=3", "solver.block_size=32"]
MOST = 1.3  # times the measured peak


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels' buffers are one for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", LlamaConfig(**SIZES))


def recipe(path: Path, *arguments: str) -> RunConfig:
    return parse([f"model.path={path}", "memory=1GB", "device=cpu", *CALIBRATION, *QUICK, *arguments]).config


def planned(config: RunConfig, name: str) -> QuantizationPlan:
    return plan_variant(config, name, load_config(str(config.model.path)), torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe=awq"],
        ["recipe=awq", "calibration.activations=disk", "solver.search_loss=module"],
        ["recipe=awq", "solver=awq+gptq"],
        ["recipe=gptq", "quality=fast", "solver.static_groups=true", "solver.lm_head=true"],
        ["recipe=gptq", "quality=balanced"],
        ["recipe=gptq", "quality=balanced", "calibration.activations=disk", "model.compute_dtype=bfloat16"],
        ["recipe=gptq", "quality=fast", "solver.true_sequential=false", "solver.act_group_aware=true", "solver.desc_act=false"],
        ["recipe=gptq", "solver=rtn"],
        ["recipe=int8", "solver.input_activations=static", "solver.smoothquant=true", "solver.smoothquant_alpha=0.5"],
        pytest.param(["recipe=int8", "solver.input_activations=dynamic", "solver.smoothquant=true"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_plan_holds(checkpoint: Path, tmp_path: Path, arguments: list[str]) -> None:
    config = recipe(checkpoint, *arguments)
    (name,) = config.variants
    plan, peak = planned(config, name), measure_variant(config, name, tmp_path)
    assert peak <= plan.peak_bytes <= MOST * peak


@pytest.mark.parametrize(
    ("activations", "quality", "largest"),
    [("memory", "balanced", f"{SOLVING} down_proj"), ("disk", "best", TUNING)],
)
def test_the_plan_holds_where_activations_are_the_most(
    checkpoint: Path, tmp_path: Path, activations: str, quality: str, largest: str
) -> None:
    config = recipe(
        checkpoint,
        "recipe=gptq",
        f"quality={quality}",
        "calibration.seq_len=512",
        "calibration.num_samples=4",
        "calibration.batch_tokens=1024",
        f"calibration.activations={activations}",
    )
    plan, peak = planned(config, "gptq"), measure_variant(config, "gptq", tmp_path)
    assert max(plan.phases, key=lambda name: plan.phases[name].peak) == largest
    assert peak <= plan.peak_bytes <= MOST * peak


GPT2 = {"vocab_size": 304, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize(
    "config",
    [
        # Biases, learned positions, layers stored the other way round, and q, k and v in one.
        GPT2Config(**GPT2),
        # A mask for attention, through which tuning needs a gradient.
        MistralConfig(**SIZES, sliding_window=16),
    ],
    ids=lambda config: config.model_type,
)
def test_the_plan_holds_for_other_families(
    tmp_path: Path, make_checkpoint: Callable[..., Path], config: PretrainedConfig
) -> None:
    tried = recipe(make_checkpoint(tmp_path / "model", config), "recipe=gptq", "quality=best")
    plan, peak = planned(tried, "gptq"), measure_variant(tried, "gptq", tmp_path / "run")
    assert peak <= plan.peak_bytes <= MOST * peak


def test_plan_and_measurement_side_by_side(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    file = tmp_path / "both.json"
    arguments = [f"model.path={checkpoint}", "recipe=demo", "variants.int4-gptq.solver.name=rtn", "device=cpu"]
    assert measure([*arguments, "blocks=1", f"json={file}"]) == 0
    rows = read_json(file)["variants"]
    assert [row["variant"] for row in rows] == ["int8", "int4-rtn", "int4-gptq"]
    shown = capsys.readouterr().out
    assert all(f"{row['peak_bytes']:,}" in shown and f"{row['measured_bytes']:,}" in shown for row in rows)
    assert measure([*arguments, "blocks=none"]) == 2
    assert "blocks=none" in capsys.readouterr().err


def test_phases_say_what_is_alive(checkpoint: Path) -> None:
    plan = planned(recipe(checkpoint, "recipe=gptq", "quality=best"), "gptq")
    groups = ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"]
    assert list(plan.phases) == [EMBEDDING, RUNNING, *(f"{SOLVING} {group}" for group in groups), TUNING]
    assert all(sum(phase.kinds.values()) == phase.peak for phase in plan.phases.values())
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    down = plan.phases[f"{SOLVING} down_proj"].kinds
    # Hessian and drift, and what the solver is given of both; the hidden states of both models.
    assert down["Hessians and statistics"] == 4 * inner**2 * 4
    assert down["weights in float32"] == hidden * inner * 4
    assert down["hidden states"] == 2 * 6 * 64 * hidden * 4
    # The block's own weights and, once replaced, those of the unquantized block beside it.
    weights = 4 * hidden * (2 * hidden + 2 * hidden // 2 + 3 * inner)
    assert weights < down["block weights"] < 2 * weights
    assert plan.hidden_states == 2 * down["hidden states"]


def test_the_device_decides_the_type_and_the_workspace(checkpoint: Path) -> None:
    config = recipe(checkpoint, "recipe=gptq", "quality=fast")
    model = load_config(str(checkpoint))
    cpu = plan_variant(config, "gptq", model, torch.device("cpu"))
    cuda = plan_variant(config, "gptq", model, torch.device("cuda"))
    assert (cpu.compute_dtype, cuda.compute_dtype) == ("float32", "float16")
    assert (cpu.workspace, cuda.workspace) == (0, CUDA_WORKSPACE)
    block = {plan.device: plan.phases[f"{SOLVING} down_proj"].kinds["block weights"] for plan in (cpu, cuda)}
    assert block["cpu"] == pytest.approx(2 * block["cuda"], rel=0.01)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the config of a model of Mistral-7B's geometry, and nothing else."""
    path = tmp_path_factory.mktemp("config-only")
    config = MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=None,
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["awq_7b", "gptq_7b"])
def test_recipes_for_7b_models_fit_16_gigabytes(mistral: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "plan.json"
    assert main([f"recipe={name}", "memory=16GB", f"model.path={mistral}", f"json={file}"]) == 0
    (row,) = read_json(file)["variants"]
    assert row["fits"] and row["device"] == "cuda" and row["compute_dtype"] == "bfloat16"
    # At least a block's 218 million weights, and the Hessian of the inputs of its widest layer.
    assert 2 * 218e6 + 4 * 14336**2 < row["peak_bytes"] <= 16e9


def test_exit_codes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    common = [f"model.path={checkpoint}", "recipe=gptq", "solver=rtn"]
    file = tmp_path / "plan.json"
    assert main([*common, "memory=10kB", f"json={file}"]) == DOES_NOT_FIT
    assert read_json(file)["variants"][0]["fits"] is False
    peak = read_json(file)["variants"][0]["peak_bytes"]
    assert "does not fit" in capsys.readouterr().out
    assert main([*common, f"memory={peak}"]) == 0
    assert main([*common, f"memory={peak - 1}"]) == DOES_NOT_FIT
    assert main(["--help"]) == 0


def test_a_recipe_of_one_s_own(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        """# @package _global_
variants:
  int4: {solver: {name: rtn}}
  fp16: {solver: {name: none}, container: safetensors}
  nf4: {solver: {name: nf4, bits: 4}, container: bitsandbytes}
"""
    )
    rows = report(parse([f"--config-dir={tmp_path}", "recipe=mine", "memory=10kB", f"model.path={checkpoint}"]))["variants"]
    # The last two have no quantize step: nothing of this project's is run for them.
    found = [(row["variant"], row["fits"], bool(row["phases"])) for row in rows]
    assert found == [("int4", False, True), ("fp16", True, False), ("nf4", True, False)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe=none_such"], ["none_such"]),
        (["solver.bitz=3"], ["bitz", "bits"]),
        (["quality=superb"], ["quality=superb", "fast"]),
        (["memory=much"], ["memory=much", "16GB"]),
        (["device=mps"], ["device=mps", "cuda"]),
        (["--config-dir", "/none/such"], ["/none/such", "recipe/NAME.yaml"]),
        (["model.path=/none/such"], ["/none/such", "config.json"]),
        (["model.path=owner/name@main"], ["owner/name@main", "revision"]),
        (["solver.group_size=100"], ["group_size=100", "128"]),
    ],
)
def test_bad_input_is_told(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main([f"model.path={checkpoint}", "recipe=gptq", "memory=1GB", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words)


def test_experts_are_refused(tmp_path: Path, moe_config: Callable[..., PretrainedConfig]) -> None:
    moe_config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has experts"):
        report(parse([f"model.path={tmp_path}", "recipe=gptq", "memory=1GB"]))


def test_every_name_is_one_of_the_quantizer_s_code() -> None:
    for name in (*PHASE_NAMES, *KIND_NAMES, *ALIKE, "gptq:feed_back"):
        module, _, function = name.partition(":")
        package = "quantize.solvers" if module in ("awq", "gptq", "rtn") else "quantize"
        found: Any = importlib.import_module(f"{package}.{module}")
        for part in filter(None, function.split(".<locals>")[0].split(".")):
            found = getattr(found, part)
            assert callable(found), name
