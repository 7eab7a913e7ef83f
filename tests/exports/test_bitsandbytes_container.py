"""The bitsandbytes container: what is stored, that it reads back as bitsandbytes reads it, and that bytes repeat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from exports.bitsandbytes import check, read
from exports.shards import read_shards
from quantize.errors import InputError
from quantize.files import files_below, sha256_file
from quantize.grids import Grid

KINDS = {
    "int8": "{solver: {name: llm_int8, bits: 8}, container: bitsandbytes}",
    "threshold": "{solver: {name: llm_int8, bits: 8, outlier_threshold: 3.5}, container: bitsandbytes}",
    "nf4": "{solver: {name: nf4}, container: bitsandbytes}",
    "double": "{solver: {name: nf4, double_quant: true}, container: bitsandbytes}",
    "skipped": r"{solver: {name: nf4, skip: [down_proj, 'layers\.1\.self_attn\.q_proj']}, container: bitsandbytes}",
    "skipped-int8": r"{solver: {name: llm_int8, bits: 8, skip: ['layers\.[12]\.']}, container: bitsandbytes}",
    "experts": "{solver: {name: nf4, skip: [experts]}, container: bitsandbytes}",
}
VARIANTS = ("int8", "threshold", "nf4", "double", "skipped", "skipped-int8")
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, run_recipe: Callable[..., Path]) -> Export:
    """``export(model, variants=VARIANTS, code=0)``: the artifacts' folder of a fresh run that ends with exit code ``code``."""

    def run(model: Path, variants: Sequence[str] = VARIANTS, code: int = 0) -> Path:
        recipe = "\n".join(["# @package _global_", "variants:", *(f"  {name}: {KINDS[name]}" for name in variants)])
        settings = [f"model.path={model}", "device=cpu", "stages=[load,export]"]
        return run_recipe(tmp_path_factory.mktemp("bitsandbytes"), recipe, *settings, code=code) / "variants"

    return run


@pytest.fixture(scope="module")
def artifacts(export: Export, tiny_llama: Path) -> Path:
    """One artifact of each kind. Read them only."""
    return export(tiny_llama)


def linear_names(model: Path) -> list[str]:
    """The layers of a tiny Llama that are to be quantized."""
    return [name.removesuffix(".weight") for name in load_file(model / "model.safetensors") if name.endswith("proj.weight")]


def quantization(artifact: Path) -> dict[str, Any]:
    """An artifact's ``quantization_config``."""
    return dict(json.loads((artifact / "config.json").read_text())["quantization_config"])


def test_an_int8_layer_is_stored_as_documented(artifacts: Path, tiny_llama: Path) -> None:
    stored, source = read_shards(artifacts / "int8"), load_file(tiny_llama / "model.safetensors")
    for layer in linear_names(tiny_llama):
        weight = source[f"{layer}.weight"].float()
        largest = weight.abs().amax(1)
        assert torch.equal(stored[f"{layer}.SCB"], largest)
        assert torch.equal(stored[f"{layer}.weight"], torch.round(weight * (127 / largest)[:, None]).to(torch.int8))
        assert stored[f"{layer}.weight_format"].item() == 0


@pytest.mark.parametrize("name", ["nf4", "double"])
def test_an_nf4_layer_is_stored_as_documented(name: str, artifacts: Path, tiny_llama: Path) -> None:
    stored = read_shards(artifacts / name)
    for layer in linear_names(tiny_llama):
        rows, columns = json.loads(bytes(stored[f"{layer}.weight.quant_state.bitsandbytes__nf4"].tolist()))["shape"]
        assert stored[f"{layer}.weight"].shape == (rows * columns // 2, 1)
        assert stored[f"{layer}.weight.absmax"].shape == (rows * columns // 64,)
        assert stored[f"{layer}.weight.absmax"].dtype == (torch.float32 if name == "nf4" else torch.uint8)
        assert (f"{layer}.weight.nested_absmax" in stored) == (name == "double")


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_else_is_the_checkpoints_own(name: str, artifacts: Path, tiny_llama: Path) -> None:
    quantized, dense = read(artifacts / name)
    source = load_file(tiny_llama / "model.safetensors")
    assert {*dense, *(f"{layer}.weight" for layer in quantized)} == set(source)
    for key, tensor in source.items():
        if not key.endswith("proj.weight"):
            assert torch.equal(dense[key], tensor), key
    assert "lm_head" in quantization(artifacts / name)["llm_int8_skip_modules"]


@pytest.mark.parametrize("name", ["int8", "nf4", "double"])
def test_what_is_read_is_what_bitsandbytes_decodes(name: str, artifacts: Path, tiny_llama: Path) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    stored = read_shards(artifacts / name)
    quantized, dense = read(artifacts / name)
    for layer in linear_names(tiny_llama):
        weight = stored[f"{layer}.weight"]
        if name == "int8":
            expected = int8_vectorwise_dequant(weight, stored[f"{layer}.SCB"])
            torch.testing.assert_close(quantized[layer].dequantize(), expected, rtol=1e-6, atol=0)
            continue
        parts = {key.removeprefix(f"{layer}.weight."): tensor for key, tensor in stored.items() if f"{layer}.weight." in key}
        state = QuantState.from_dict(parts, torch.device("cpu"))
        state.dtype = torch.float32
        torch.testing.assert_close(dense[f"{layer}.weight"], dequantize_4bit(weight, state), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "limit"), [("int8", 0.01), ("nf4", 0.1), ("double", 0.1)])
def test_the_weights_are_near_the_checkpoints(name: str, limit: float, artifacts: Path, tiny_llama: Path) -> None:
    source = load_file(tiny_llama / "model.safetensors")
    quantized, dense = read(artifacts / name)
    for layer in linear_names(tiny_llama):
        weight = source[f"{layer}.weight"].float()
        found = quantized[layer].dequantize() if layer in quantized else dense[f"{layer}.weight"]
        assert 0 < float((found - weight).norm() / weight.norm()) < limit


def test_the_recipes_choices_are_in_the_config(artifacts: Path) -> None:
    assert quantization(artifacts / "int8")["llm_int8_threshold"] == 6.0
    assert quantization(artifacts / "threshold")["llm_int8_threshold"] == 3.5
    assert quantization(artifacts / "nf4")["bnb_4bit_quant_type"] == "nf4"
    assert not quantization(artifacts / "nf4")["bnb_4bit_use_double_quant"]
    assert quantization(artifacts / "double")["bnb_4bit_use_double_quant"]
    assert {quantization(artifacts / name)["quant_method"] for name in VARIANTS} == {"bitsandbytes"}


def test_skipped_layers_are_dense(artifacts: Path, tiny_llama: Path) -> None:
    source, stored = load_file(tiny_llama / "model.safetensors"), read_shards(artifacts / "skipped")
    dense = {name for name in linear_names(tiny_llama) if f"{name}.weight.absmax" not in stored}
    assert dense == {"model.layers.1.self_attn.q_proj", *(f"model.layers.{index}.mlp.down_proj" for index in range(4))}
    assert all(torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"]) for name in dense)
    assert set(quantization(artifacts / "skipped")["llm_int8_skip_modules"]) == {*dense, "lm_head"}
    quantized, _ = read(artifacts / "skipped-int8")
    assert {name.split(".")[2] for name in quantized} == {"0", "3"}


def test_the_manifest_has_bits_and_layers_and_no_leftovers(artifacts: Path) -> None:
    steps = json.loads((artifacts.parent / "manifest.json").read_text())["steps"]
    found = {
        name: (steps[f"export/{name}"]["result"]["bits"], steps[f"export/{name}"]["result"]["quantized_layers"])
        for name in VARIANTS
    }
    assert found == {
        "int8": (8, 28),
        "threshold": (8, 28),
        "nf4": (4, 28),
        "double": (4, 28),
        "skipped": (4, 23),
        "skipped-int8": (8, 14),
    }
    assert sorted(path.name for path in artifacts.iterdir()) == sorted(VARIANTS)


def test_the_same_recipe_gives_the_same_bytes(export: Export, artifacts: Path, tiny_llama: Path) -> None:
    again = export(tiny_llama)
    first, second = ({str(f.relative_to(d)): sha256_file(f) for f in files_below(d)} for d in (artifacts, again))
    assert first == second
    assert len({first[f"{name}/model.safetensors"] for name in VARIANTS}) == 5  # a threshold changes the config alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_tensors_keep_their_type(
    dtype: torch.dtype, export: Export, make_checkpoint: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = make_checkpoint(tmp_path / "model", config, dtype=dtype)
    tiny_tokenizer.save_pretrained(model)
    source = load_file(model / "model.safetensors")
    source["model.layers.0.mlp.up_proj.weight"][3] = 0
    save_file(source, model / "model.safetensors", metadata={"format": "pt"})
    folder = export(model, ("int8", "nf4"))
    quantized, dense = read(folder / "int8")
    assert torch.equal(dense["lm_head.weight"], source["lm_head.weight"])
    assert {tensor.dtype for tensor in dense.values()} == {dtype}
    assert not quantized["model.layers.0.mlp.up_proj"].dequantize()[3].any()
    assert not read(folder / "nf4")[1]["model.layers.0.mlp.up_proj.weight"][3].any()


def test_transposed_layers_are_read_as_out_by_in(
    export: Export, make_checkpoint: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """GPT-2 stores its layers as ``[in, out]``, and its checkpoints may leave out the prefix ``transformer.``."""
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=128)
    model = make_checkpoint(tmp_path / "model", config)
    tiny_tokenizer.save_pretrained(model)
    source = load_file(model / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in source.items()}, model / "model.safetensors", metadata={"format": "pt"}
    )
    folder = export(model, ("int8", "nf4"))
    layer = "transformer.h.1.mlp.c_fc"
    weight = source[f"{layer}.weight"].float().t()
    quantized, _ = read(folder / "int8")
    assert len(quantized) == 8
    torch.testing.assert_close(quantized[layer].dequantize(), weight, atol=0.005, rtol=0)
    torch.testing.assert_close(read(folder / "nf4")[1][f"{layer}.weight"], weight, atol=0.1, rtol=0)


def test_a_weight_beyond_float16_is_refused(
    export: Export,
    make_checkpoint: Any,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = make_checkpoint(tmp_path / "model", config, dtype=torch.float32)
    tiny_tokenizer.save_pretrained(model)
    source = load_file(model / "model.safetensors")
    source["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(source, model / "model.safetensors", metadata={"format": "pt"})
    folder = export(model, ("int8",), code=2)
    assert "model.layers.1.mlp.up_proj.weight holds a weight beyond float16's 65504" in capsys.readouterr().err
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_experts_are_refused_and_can_be_skipped(
    export: Export,
    make_checkpoint: Any,
    moe_config: Any,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_checkpoint(tmp_path / "model", moe_config())
    tiny_tokenizer.save_pretrained(model)
    export(model, ("nf4",), code=2)
    assert "which bitsandbytes leaves dense; use solver.skip=['experts']" in capsys.readouterr().err
    _, dense = read(export(model, ("experts",)) / "experts")
    source = load_file(model / "model.safetensors")
    assert set(dense) == set(source)
    changed = {name for name, tensor in source.items() if not torch.equal(dense[name].to(tensor.dtype), tensor)}
    assert changed == {name for name in source if "self_attn" in name and name.endswith("proj.weight")}


def test_only_experts_are_refused_by_name() -> None:
    check("model.layers.0.mlp.up_proj", 30, 7, Grid(4))
    with pytest.raises(InputError, match=r"model.layers.0.mlp.experts.3.up_proj: .* container gptq"):
        check("model.layers.0.mlp.experts.3.up_proj", 32, 64, Grid(4))


@pytest.mark.parametrize(
    ("name", "lost"),
    [("int8", "SCB"), ("nf4", "weight.absmax"), ("nf4", "weight.quant_map"), ("double", "weight.nested_absmax")],
)
def test_a_layer_that_lacks_a_tensor_is_refused(name: str, lost: str, artifacts: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifacts / name, tmp_path / "artifact")
    tensors = load_file(damaged / "model.safetensors")
    del tensors[f"model.layers.2.mlp.up_proj.{lost}"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model.layers.2.mlp.up_proj lacks {lost}; the checkpoint is damaged"):
        read(damaged)


def test_packed_codes_without_state_are_refused(artifacts: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifacts / "nf4", tmp_path / "artifact")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.layers.2.mlp.up_proj.weight holds packed codes without their state"):
        read(damaged)


def test_another_container_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="does not describe a bitsandbytes checkpoint"):
        read(tiny_llama)
