"""Precisions other than 4 bits, from recipe to artifact: types of dense tensors, quantized inputs, norms that were scaled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from exports.containers import CONTAINERS
from quantize.files import sha256_file
from quantize.statistics import Statistics

Cli = Callable[..., tuple[int, str, str]]
ARTIFACTS = "stages=[load,calibrate,quantize,export]"
W8A8 = [
    "solver=rtn",
    "solver.bits=8",
    "solver.group_size=-1",
    "solver.symmetric=true",
    "variants.gptq.container=compressed-tensors",
]


@pytest.fixture(scope="module")
def w8a8(small_run: list[str]) -> list[str]:
    """Overrides for one small W8A8 run."""
    return ["recipe=gptq", *small_run, *W8A8, ARTIFACTS]


@torch.no_grad()
def logits(model_path: Path, artifact: Path | None = None) -> Tensor:
    """A checkpoint's logits in float32, with the weights and norms of an artifact put in."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    if artifact is not None:
        layers, dense = CONTAINERS["compressed-tensors"].read(artifact)
        for name, tensor in layers.items():
            model.get_submodule(name).weight.copy_(tensor.dequantize())
        for name, weight in dense.items():
            model.get_parameter(name).copy_(weight)
    found: Tensor = model(torch.arange(3, 60)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_variant_is_stored_in_its_type(
    dtype: torch.dtype, small_run: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    name = str(dtype).removeprefix("torch.")
    code, _, err = cli("recipe=fp16", *small_run, f"variants.fp16.dtype={name}", ARTIFACTS, f"output_dir={tmp_path}")
    assert code == 0, err
    artifact = tmp_path / "variants" / "fp16"
    assert json.loads((artifact / "config.json").read_text())["dtype"] == name
    source = load_file(tiny_llama / "model.safetensors")
    stored = load_file(artifact / "model.safetensors")
    assert stored.keys() == source.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == dtype and torch.equal(tensor, source[key].to(dtype)), key
    result = json.loads((tmp_path / "manifest.json").read_text())["steps"]["export/fp16"]["result"]
    assert result["bits"] == torch.finfo(dtype).bits


def test_values_beyond_a_type_are_refused(small_run: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    stored = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    stored["model.norm.weight"][3] = 1e6
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    run = ["recipe=fp16", *small_run, f"model.path={model}", ARTIFACTS, f"output_dir={tmp_path / 'run'}"]
    code, _, err = cli(*run, "variants.fp16.dtype=float16")
    assert code == 2
    assert re.search(r"error: tensor model\.norm\.weight has values up to 1e\+06, beyond .*float16; use dtype=bfloat16", err)
    assert not (tmp_path / "run" / "variants" / "fp16").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_have_the_type_of_the_dense_tensors(dtype: str, w8a8: list[str], cli: Cli, tmp_path: Path) -> None:
    assert cli(*w8a8, f"variants.gptq.dtype={dtype}", f"output_dir={tmp_path}")[0] == 0
    layers, dense = CONTAINERS["compressed-tensors"].read(tmp_path / "variants" / "gptq")
    assert {str(tensor.scales.dtype) for tensor in layers.values()} == {f"torch.{dtype}"}
    assert {str(tensor.dtype) for tensor in dense.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_smoothing_changes_norms_and_not_the_function(
    solver: str, w8a8: list[str], cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    smooth = ["solver.input_activations=dynamic", "solver.smoothquant=true", "solver.smoothquant_alpha=0.5"]
    code, _, err = cli(*w8a8, *smooth, f"solver.name={solver}", f"output_dir={tmp_path}")
    assert code == 0, err
    artifact = tmp_path / "variants" / "gptq"
    source, (layers, dense) = load_file(tiny_llama / "model.safetensors"), CONTAINERS["compressed-tensors"].read(artifact)
    changed = {name for name, tensor in dense.items() if not torch.equal(tensor, source[name])}
    assert changed == {name for name in dense if re.search(r"layers\.\d\.(input|post_attention)_layernorm\.weight$", name)}
    # Layers behind a norm are scaled, and those behind another linear layer: no layer is the checkpoint's to half a step.
    for name, tensor in layers.items():
        error = (tensor.dequantize() - source[f"{name}.weight"].float()).abs()
        assert not bool((error <= 0.6 * tensor.scales.float()).all()), name
    before, after = logits(tiny_llama), logits(tiny_llama, artifact)
    # Eight bits cost two percent here; a norm without its layers, or layers without their norm, several tens.
    assert float((after - before).norm() / before.norm()) < 0.05


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that solvers are shown, in order."""
    inputs: list[Tensor] = []
    add = Statistics.add

    def watch(self: Statistics, rows: Tensor, reference: Tensor | None = None) -> None:
        inputs.append(rows.clone())
        add(self, rows, reference)

    monkeypatch.setattr(Statistics, "add", watch)
    return inputs


def has_eight_bits(inputs: Tensor) -> bool:
    """Whether each token's values are whole multiples of its largest magnitude's 127th, or 128th, part."""
    relative = inputs / inputs.abs().amax(-1, keepdim=True)
    distances = [(relative * steps - (relative * steps).round()).abs().amax(-1) for steps in (127, 128)]
    return bool((torch.minimum(*distances) < 1e-3).all())


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_solvers_see_the_rounding_of_inputs_that_is_known_by_then(
    kind: str, w8a8: list[str], cli: Cli, tmp_path: Path, seen: list[Tensor]
) -> None:
    assert cli(*w8a8, "solver.name=gptq", f"solver.input_activations={kind}", f"output_dir={tmp_path}")[0] == 0
    assert {has_eight_bits(inputs) for inputs in seen} == {kind == "dynamic"}


def test_what_follows_learns_of_static_ranges(w8a8: list[str], cli: Cli, tmp_path: Path, seen: list[Tensor]) -> None:
    sizes = []
    for percentile in (100.0, 51.0):  # a range that clips nothing, and one that clips half of all values
        run = ["solver.name=rtn", "solver.input_activations=static", "solver.observer=percentile"]
        assert cli(*w8a8, *run, f"solver.percentile={percentile}", f"output_dir={tmp_path / str(percentile)}")[0] == 0
        widest = max(inputs.shape[-1] for inputs in seen)
        sizes.append(float(next(inputs for inputs in seen if inputs.shape[-1] == widest).norm()))  # of the first down_proj
        seen.clear()
    assert sizes[1] < 0.7 * sizes[0]


def test_a_smoothed_run_tuned_and_spilled_gives_the_bytes_of_one_in_memory(w8a8: list[str], cli: Cli, tmp_path: Path) -> None:
    smooth = ["solver.name=gptq", "solver.input_activations=static", "solver.smoothquant=true", "quality=best"]
    for place in ("memory", "disk"):
        spill = [f"calibration.activations={place}", "calibration.batch_tokens=64"]
        assert cli(*w8a8, *smooth, *spill, f"output_dir={tmp_path / place}")[0] == 0
    files = [tmp_path / place / "variants" / "gptq" / "model.safetensors" for place in ("memory", "disk")]
    assert sha256_file(files[0]) == sha256_file(files[1])


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_static_ranges_are_stored_for_every_layer(observer: str, w8a8: list[str], cli: Cli, tmp_path: Path) -> None:
    static = ["solver.input_activations=static", f"solver.observer={observer}", "solver.percentile=99.0"]
    assert cli(*w8a8, *static, f"output_dir={tmp_path}")[0] == 0
    layers, _ = CONTAINERS["compressed-tensors"].read(tmp_path / "variants" / "gptq")
    steps = {name: float(tensor.input_scale) for name, tensor in layers.items() if tensor.input_scale is not None}
    assert steps.keys() == layers.keys()
    assert all(step > 0 for step in steps.values())
    # Layers that share their input share its range.
    assert steps["model.layers.0.self_attn.q_proj"] == steps["model.layers.0.self_attn.v_proj"]
    assert steps["model.layers.0.self_attn.q_proj"] != steps["model.layers.0.self_attn.o_proj"]


def test_a_static_range_that_nothing_tells_is_refused(
    w8a8: list[str],
    cli: Cli,
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    close_expert: Callable[[Path, int], None],
    moe_config: Callable[..., PretrainedConfig],
    tiny_llama: Path,
) -> None:
    model = make_checkpoint(tmp_path / "model", moe_config(num_experts=8))
    close_expert(model, 5)
    for file in tiny_llama.glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    code, _, err = cli(*w8a8, "solver.input_activations=static", f"model.path={model}", f"output_dir={tmp_path / 'run'}")
    assert code == 2
    assert re.search(r"no calibration token reaches model\.layers\.\d\.mlp\.experts\.5\.\w+, .*input_activations=dynamic", err)
