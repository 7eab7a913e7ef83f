"""AWQ from recipe to artifact: what is scaled, that the function stays, and that every way of running gives the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from exports.containers import CONTAINERS
from quantize.files import sha256_file

Cli = Callable[..., tuple[int, str, str]]
MakeCheckpoint = Callable[..., Path]
ARTIFACTS = "stages=[load,calibrate,quantize,export]"
# With 8 bits, what rounding changes is small against what a wrong fold would change.
FINE = ["variants.awq.container=compressed-tensors", "solver.bits=8"]
SMALL = {"vocab_size": 304, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def awq(small_run: list[str]) -> list[str]:
    """Overrides for one small run of AWQ."""
    return ["recipe=awq", *small_run, ARTIFACTS]


def read(run: Path, container: str = "awq") -> tuple[dict[str, Any], dict[str, Tensor]]:
    return CONTAINERS[container].read(run / "variants" / "awq")


@torch.no_grad()
def logits(model_path: Path, run: Path | None = None, container: str = "awq") -> Tensor:
    """A checkpoint's logits in float32, with the numbers of an artifact put in."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    if run is not None:
        layers, dense = read(run, container)
        for name, tensor in layers.items():
            weight = tensor.dequantize()
            own = model.get_submodule(name).weight
            own.copy_(weight if own.shape == weight.shape and "c_" not in name else weight.t())
        for name, value in dense.items():
            model.get_parameter(name).copy_(value)
    found: Tensor = model(torch.arange(3, 60)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("solver", ["awq", "awq+gptq"])
def test_an_artifact_is_the_model_with_norms_and_layers_scaled(
    solver: str, awq: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    code, _, err = cli(*awq, f"solver={solver}", *FINE, f"output_dir={tmp_path}")
    assert code == 0, err
    source, (layers, dense) = load_file(tiny_llama / "model.safetensors"), read(tmp_path, "compressed-tensors")
    assert len(layers) == 4 * 7
    changed = {name for name, tensor in dense.items() if not torch.equal(tensor, source[name])}
    norms = {name for name in dense if re.search(r"layers\.\d\.(input|post_attention)_layernorm\.weight$", name)}
    assert changed <= norms and len(changed) >= len(norms) / 2
    # Layers' inputs are scaled, so weights differ by more than rounding; the model as a whole does not.
    moved = [float((t.dequantize() - source[f"{n}.weight"].float()).abs().max() / t.scales.max()) for n, t in layers.items()]
    assert sum(steps > 2 for steps in moved) > len(layers) / 2
    before, after = logits(tiny_llama), logits(tiny_llama, tmp_path, "compressed-tensors")
    assert float((after - before).norm() / before.norm()) < 0.02


def test_awq_is_nearer_to_the_model_than_rounding(awq: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path) -> None:
    errors = {}
    for solver in ("rtn", "awq"):
        assert cli(*awq, f"solver={solver}", f"output_dir={tmp_path / solver}")[0] == 0
        before = logits(tiny_llama)
        errors[solver] = float((logits(tiny_llama, tmp_path / solver) - before).norm() / before.norm())
    assert errors["awq"] < 0.9 * errors["rtn"], errors


def test_every_container_holds_the_same_numbers(awq: list[str], cli: Cli, tmp_path: Path) -> None:
    for container in ("awq", "compressed-tensors"):
        code, _, err = cli(*awq, f"variants.awq.container={container}", f"output_dir={tmp_path / container}")
        assert code == 0, err
    (left, dense), (right, others) = read(tmp_path / "awq"), read(tmp_path / "compressed-tensors", "compressed-tensors")
    for name, tensor in left.items():
        assert torch.equal(tensor.dequantize(), right[name].dequantize()), name
    assert all(torch.equal(tensor, others[name]) for name, tensor in dense.items())


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["solver.search_loss=module"],
        ["solver=awq+gptq", "quality=best"],
    ],
)
def test_activations_on_disk_give_the_bytes_of_those_in_memory(
    settings: list[str], awq: list[str], cli: Cli, tmp_path: Path
) -> None:
    for place in ("memory", "disk"):
        spill = [f"calibration.activations={place}", "calibration.batch_tokens=64"]
        code, _, err = cli(*awq, *settings, *spill, f"output_dir={tmp_path / place}")
        assert code == 0, err
    files = [tmp_path / place / "variants" / "awq" / "model.safetensors" for place in ("memory", "disk")]
    assert sha256_file(files[0]) == sha256_file(files[1])


@pytest.mark.parametrize("settings", [["solver.true_sequential=false"], ["solver.search_loss=module"], ["quality=best"]])
def test_other_ways_of_running_keep_the_function(
    settings: list[str], awq: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    code, _, err = cli(*awq, *settings, *FINE, f"output_dir={tmp_path}")
    assert code == 0, err
    before, after = logits(tiny_llama), logits(tiny_llama, tmp_path, "compressed-tensors")
    assert float((after - before).norm() / before.norm()) < 0.02


FAMILIES = {
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=2048),
    "opt": OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=2048),
    "gpt2": GPT2Config(vocab_size=304, n_embd=64, n_layer=2, n_head=4, n_positions=2048),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_follow_the_scales(
    family: str,
    awq: list[str],
    cli: Cli,
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_checkpoint(tmp_path / "model", FAMILIES[family])
    tiny_tokenizer.save_pretrained(model)
    code, _, err = cli(*awq, *FINE, f"model.path={model}", f"output_dir={tmp_path / 'run'}")
    assert code == 0, err
    stored = load_file(model / "model.safetensors")
    dense = read(tmp_path / "run", "compressed-tensors")[1]
    moved = {name for name, value in dense.items() if name in stored and not torch.equal(value, stored[name])}
    assert family == "gpt2" or any(re.search(r"(v_proj|fc1)\.bias$", name) for name in moved)
    before, after = logits(model), logits(model, tmp_path / "run", "compressed-tensors")
    assert float((after - before).norm() / before.norm()) < 0.02


def test_layers_that_stay_dense_stay_as_they_are(awq: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path) -> None:
    code, _, err = cli(*awq, "solver.skip=[v_proj, up_proj]", f"output_dir={tmp_path}")
    assert code == 0, err
    source, (layers, dense) = load_file(tiny_llama / "model.safetensors"), read(tmp_path)
    assert len(layers) == 4 * 5
    assert all(torch.equal(tensor, source[name]) for name, tensor in dense.items())


def test_experts_are_scaled_too(
    awq: list[str],
    cli: Cli,
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    close_expert: Callable[[Path, int], None],
    moe_config: Callable[..., PretrainedConfig],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_checkpoint(tmp_path / "model", moe_config(num_experts=8))
    close_expert(model, 5)
    tiny_tokenizer.save_pretrained(model)
    code, _, err = cli(*awq, f"model.path={model}", f"output_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert "experts.5" in err
    layers, _ = read(tmp_path / "run")
    assert len(layers) == 2 * (4 + 8 * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["solver.bits=3"], r"bits=3 of model\.layers\.0\..* cannot be stored in an AWQ checkpoint"),
        (["solver.lm_head=true"], r"variants\.awq\.container=awq leaves the output embedding dense"),
        (["solver.overrides=[{match: down, group_size: 64}]"], "one bits and one group_size for all layers"),
        (["solver.smoothquant=true"], r"smoothquant=true, but awq scales the same norms"),
        (["solver.search_loss=model"], "search_loss=model is unknown; use one of layer, module"),
        (["solver.alpha_steps=0"], "alpha_steps=0 is below 1; use 20"),
        (["solver=awq+gptq", "solver.static_groups=false"], "stores groups of consecutive columns"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str, awq: list[str], cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli(*awq, *settings, f"output_dir={tmp_path}")
    assert code == 2
    assert re.search(message, err), err
