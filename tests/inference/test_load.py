"""Artifacts into models: int8 against transformers with compressed-tensors, GPTQ against its own codes, bad ones refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, Qwen2Config

from exports.base import Artifact
from exports.containers import CONTAINERS
from inference.engine import Engine
from inference.generate import generate
from inference.kv_cache import KVCache
from inference.linear import DenseLinear, HalfStoredLinear, Int8Linear, PackedLinear, SideBySide
from inference.load import LoadOptions, load
from inference.model import Model
from quantize.errors import InputError
from quantize.grids import Grid, quantize_nearest

MakeInt8 = Callable[..., Path]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENS = [5, 17, 299, 0, 44, 44, 120, 7, 63, 201, 33, 9]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A float16 Llama with an output embedding of its own."""
    path: Path = make_checkpoint(tmp_path_factory.mktemp("load") / "dense", LlamaConfig(**SIZES))
    return path


@torch.inference_mode()
def every_logit(model: Model, tokens: list[int]) -> Tensor:
    """Logits of every position."""
    return model.forward(torch.tensor(tokens), KVCache(model.config, 64, model.dtype).context([len(tokens)]))


def reference(artifact: Path, tokens: list[int]) -> Tensor:
    """transformers' logits, float32, of an artifact as that program loads it."""
    options: dict[str, Any] = {}
    if '"symmetric": false' in (artifact / "config.json").read_text():
        # Without it transformers does not take packed zero points.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, **options)
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("group_size", [-1, 32])
def test_weight_only_int8_gives_compressed_tensors_logits(
    dense: Path, make_int8: MakeInt8, tmp_path: Path, group_size: int
) -> None:
    artifact = make_int8(dense, tmp_path / "w8a16", "none", group_size)
    wanted = reference(artifact, TOKENS)
    torch.testing.assert_close(every_logit(load(artifact), TOKENS), wanted, atol=1e-4, rtol=0)
    assert float((wanted - reference(dense, TOKENS)).abs().max()) > 1e-3  # rounding to int8 is to be seen at this tolerance


@pytest.mark.parametrize("grid", [Grid(8, -1, True, 0), Grid(8, 32, True, 0), Grid(4, 32, False, 0)])
def test_packed_weights_give_compressed_tensors_logits(dense: Path, tmp_path: Path, grid: Grid) -> None:
    stored = load_file(dense / "model.safetensors")
    layers = {name.removesuffix(".weight"): quantize_nearest(stored.pop(name), grid) for name in [*stored] if "_proj." in name}
    config = json.loads((dense / "config.json").read_text())
    written = Artifact(config, stored.items(), layers.items(), grid, (), {}, dict.fromkeys(layers, grid), ("lm_head",))
    CONTAINERS["compressed-tensors"].write(tmp_path, written)
    wanted = reference(tmp_path, TOKENS)
    # An asymmetric checkpoint transformers decodes into its float16.
    torch.testing.assert_close(every_logit(load(tmp_path), TOKENS), wanted, atol=1e-4 if grid.symmetric else 2e-3, rtol=0)
    assert float((wanted - reference(dense, TOKENS)).abs().max()) > 1e-2 * (not grid.symmetric) + 1e-3 * grid.symmetric


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_w8a8_gives_compressed_tensors_logits(
    tmp_path: Path, make_checkpoint: Any, make_int8: MakeInt8, activations: str, family: Any
) -> None:
    """The programs agree on every code but those whose value is within float32 rounding of a tie.

    One such code moves a logit by about a step of the activation's grid, so most logits and all of them are bound apart: by
    1e-4, as no code flips; and by a tenth of what quantizing the activations changes.
    """
    source = make_checkpoint(tmp_path / "dense", family(**SIZES))
    artifact = make_int8(source, tmp_path / "w8a8", activations)
    wanted, found = reference(artifact, TOKENS), every_logit(load(artifact), TOKENS)
    effect = (reference(make_int8(source, tmp_path / "w8a16", "none"), TOKENS) - wanted).abs().max()
    difference = (found - wanted).abs()
    assert float(difference.median()) < 1e-4
    assert float(difference.max()) < 0.1 * float(effect)


def test_prefill_and_decode_of_int8_agree(dense: Path, make_int8: MakeInt8, tmp_path: Path) -> None:
    """A scale for each token, not one for the prompt: a token's codes do not depend on its neighbours."""
    model = load(make_int8(dense, tmp_path / "w8a8", "dynamic"))
    engine = Engine(model, 64)
    found = [engine.prefill(TOKENS[:2])] + [engine.decode(token) for token in TOKENS[2:]]
    difference = (torch.stack(found) - every_logit(model, TOKENS)[1:]).abs()
    assert float(difference.median()) < 1e-4


@pytest.mark.parametrize("container", ["gptq", "awq"])
def test_codes_give_the_logits_of_their_dequantized_weights(container: str, dense: Path, tmp_path: Path) -> None:
    grid, stored = Grid(4, 32, symmetric=False), load_file(dense / "model.safetensors")
    layers = {name.removesuffix(".weight"): stored.pop(name) for name in list(stored) if name.endswith("_proj.weight")}
    quantized = {name: quantize_nearest(weight, grid) for name, weight in layers.items()}
    artifact = tmp_path / container
    artifact.mkdir()
    config = json.loads((dense / "config.json").read_text())
    grids = dict.fromkeys(quantized, grid)
    CONTAINERS[container].write(artifact, Artifact(config, stored.items(), quantized.items(), grid, (), {}, grids))
    shutil.copytree(dense, tmp_path / "rounded")
    rounded = stored | {f"{name}.weight": tensor.dequantize() for name, tensor in quantized.items()}
    save_file(rounded, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    wanted = reference(tmp_path / "rounded", TOKENS)
    torch.testing.assert_close(every_logit(load(artifact), TOKENS), wanted, atol=1e-4, rtol=0)


def test_layers_of_one_kind_become_one_and_others_stay_apart(dense: Path, make_int8: MakeInt8, tmp_path: Path) -> None:
    artifact = make_int8(dense, tmp_path / "static", "static")
    assert isinstance(load(artifact).blocks[0].qkv, Int8Linear)
    stored = load_file(artifact / "model.safetensors")
    stored["model.layers.0.self_attn.k_proj.input_scale"] *= 2
    save_file(stored, artifact / "model.safetensors", metadata={"format": "pt"})
    model = load(artifact)
    assert isinstance(model.blocks[0].qkv, SideBySide)
    assert isinstance(model.blocks[1].qkv, Int8Linear)
    difference = (every_logit(model, TOKENS) - reference(artifact, TOKENS)).abs()
    assert float(difference.median()) < 1e-4


def test_a_dense_layer_beside_int8_ones(dense: Path, make_int8: MakeInt8, tmp_path: Path) -> None:
    artifact = make_int8(dense, tmp_path / "mixed", "none")
    name = "model.layers.1.mlp.gate_proj"
    stored = load_file(artifact / "model.safetensors")
    stored[f"{name}.weight"] = load_file(dense / "model.safetensors")[f"{name}.weight"]
    del stored[f"{name}.weight_scale"]
    save_file(stored, artifact / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["ignore"].append(name)
    (artifact / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(every_logit(load(artifact), TOKENS), reference(artifact, TOKENS), atol=1e-4, rtol=0)


def test_what_dense_layers_are_held_as(dense: Path, make_int8: MakeInt8, tmp_path: Path) -> None:
    artifact = make_int8(dense, tmp_path / "w8a8", "dynamic")
    kinds = {"packed": PackedLinear, "plain": DenseLinear, "stored": HalfStoredLinear}
    for option, kind in kinds.items():
        assert isinstance(load(artifact, LoadOptions(dense=option)).head, kind)
    assert isinstance(load(artifact).head, HalfStoredLinear)
    assert isinstance(load(dense).head, PackedLinear)
    assert isinstance(load(dense, LoadOptions(dtype=torch.bfloat16)).head, DenseLinear)
    plain, stored = (load(artifact, LoadOptions(dense=option)) for option in ("plain", "stored"))
    assert plain.nbytes() - stored.nbytes() == 2 * 300 * 64
    torch.testing.assert_close(every_logit(plain, TOKENS), every_logit(stored, TOKENS), atol=1e-4, rtol=0)


def test_an_int8_head_is_made_only_on_request(dense: Path) -> None:
    plain, rounded = load(dense), load(dense, LoadOptions(head="int8"))
    assert isinstance(rounded.head, Int8Linear)
    difference = (every_logit(plain, TOKENS) - every_logit(rounded, TOKENS)).abs()
    assert 1e-4 < float(difference.max()) < 0.1 * float(every_logit(plain, TOKENS).std())
    with pytest.raises(InputError, match="head='int4' is not an option; use artifact, int8"):
        LoadOptions(head="int4")


def edit(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an artifact's config.json."""
    config = json.loads((artifact / "config.json").read_text())
    change(config)
    (artifact / "config.json").write_text(json.dumps(config))


def group(config: dict[str, Any]) -> dict[str, Any]:
    """A config's only group."""
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]
    return found


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "family": (lambda c: c.update(model_type="gpt2"), r"model_type='gpt2' .* use one of llama, mistral, qwen2, qwen3"),
    "activation": (lambda c: c.update(hidden_act="gelu"), r"hidden_act='gelu'.*'silu'"),
    "missing field": (lambda c: c.pop("num_hidden_layers"), r"has no num_hidden_layers"),
    "sizes": (lambda c: c.update(vocab_size=301), r"embed_tokens.weight is \[300, 64\].*vocab_size=301"),
    "layers": (lambda c: c.update(num_hidden_layers=3), r"lacks the tensor model.layers.2.input_layernorm.weight"),
    "method": (lambda c: c["quantization_config"].update(quant_method="exl2"), r"quant_method='exl2' is not read"),
    "format": (lambda c: c["quantization_config"].update(format="float-quantized"), r"use format='int-quantized'"),
    "cache": (lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme is not supported"),
    "no groups": (lambda c: c["quantization_config"].pop("config_groups"), r"no config_groups"),
    "bits": (lambda c: group(c)["weights"].update(num_bits=4), r"use num_bits=8"),
    "outputs": (lambda c: group(c).update(output_activations={"num_bits": 8}), r"output_activations are not supported"),
    "inputs": (lambda c: group(c)["input_activations"].update(symmetric=False), r"input_activations=.*strategy=token"),
    "static without scale": (
        lambda c: group(c)["input_activations"].update(dynamic=False, strategy="tensor"),
        r"q_proj has no input_scale, but config.json's input_activations are static",
    ),
    "no scheme": (lambda c: c.pop("quantization_config"), r"q_proj.weight is int8, but nothing says on which scale"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(dense: Path, make_int8: MakeInt8, tmp_path: Path, case: str) -> None:
    artifact = make_int8(dense, tmp_path / "artifact", "dynamic")
    load(artifact)
    change, message = BAD_CONFIGS[case]
    edit(artifact, change)
    with pytest.raises(InputError, match=message):
        load(artifact)


def test_mixed_activations_and_damaged_scales_are_refused(dense: Path, make_int8: MakeInt8, tmp_path: Path) -> None:
    artifact = make_int8(dense, tmp_path / "mixed", "dynamic")
    edit(
        artifact,
        lambda c: c["quantization_config"]["config_groups"].update(group_1={**group(c), "input_activations": None}),
    )
    with pytest.raises(InputError, match="mix dynamic, none activations; use one kind"):
        load(artifact)
    artifact = make_int8(dense, tmp_path / "damaged", "dynamic")
    stored = load_file(artifact / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(128, 3)
    save_file(stored, artifact / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj.weight_scale is \[128, 3\].*\[128, 1\] or \[128, groups\]"):
        load(artifact)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        load(tmp_path)


@pytest.mark.slow
def test_the_demo_models_text_is_transformers() -> None:
    from quantize.demo_model import demo_model

    path = demo_model()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = Engine(load(path), 128)
    for text in ("The capital of France is", "Once upon a time there was", "def fibonacci(n):"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        wanted = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
        assert list(generate(engine, ids[0].tolist(), 64)) == wanted.tolist()
