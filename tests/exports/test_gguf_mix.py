"""llama.cpp's mixes: the choices of ``llama-quantize --dry-run``, kept in ``tests/golden`` (see ``make_gguf_golden.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exports.gguf_layout import TYPES
from exports.gguf_mix import FILE_TYPES, in_order, quantizable, tensor_types
from quantize.errors import InputError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_mixes.json").read_text())

Tensors = list[tuple[str, tuple[int, ...]]]


def tensors_of(model: dict[str, Any], roles: dict[str, str]) -> Tensors:
    """The tensors of a golden model: rows do not matter, columns are all the same."""
    outside = {"token_embd.weight", "output.weight", "output_norm.weight"}
    tensors: Tensors = []
    for role in roles:
        names = [role] if role in outside else [f"blk.{layer}.{role}" for layer in range(model["layers"])]
        shape = (model["columns"],) if "norm" in role else (2, model["columns"])
        tensors += [(name, (model["experts"], *shape) if role.endswith("_exps.weight") else shape) for name in names]
    return tensors


def sizes(model: dict[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("architecture", "layers", "heads", "kv_heads", "experts")}


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['model']['architecture']}-{case['model']['layers']}")
def test_mixes_are_those_of_llama_quantize(case: dict[str, Any], file_type: str) -> None:
    model, roles = case["model"], case["types"][file_type]
    tensors = tensors_of(model, roles)
    found = tensor_types(tensors[::-1], file_type, **sizes(model))
    for role, kinds in roles.items():
        per_layer = kinds.split()
        if f"blk.0.{role}" not in found:
            assert found[role] == kinds
        else:
            wanted = per_layer if len(per_layer) > 1 else per_layer * model["layers"]
            assert [found[f"blk.{layer}.{role}"] for layer in range(model["layers"])] == wanted, role


LLAMA: dict[str, Any] = {"layers": 32, "heads": 32, "kv_heads": 8}


def matrices(columns: int = 256, layers: int = 32) -> Tensors:
    tensors: Tensors = [
        ("token_embd.weight", (2, columns)),
        ("output.weight", (2, columns)),
        ("output_norm.weight", (columns,)),
    ]
    for layer in range(layers):
        tensors += [(f"blk.{layer}.{name}.weight", (2, columns)) for name in ("attn_q", "attn_v", "ffn_down")]
    return tensors


def test_a_medium_file_spends_more_bits_on_the_ends_and_on_every_third_layer() -> None:
    """8 of 32 layers at the ends, and layers 6, 9, .. 27 between them: what llama.cpp's ``use_more_bits`` says."""
    found = tensor_types(matrices(), "Q4_K_M", **LLAMA)
    more = {layer for layer in range(32) if found[f"blk.{layer}.ffn_down.weight"] == "Q6_K"}
    assert more == {0, 1, 2, 3, 28, 29, 30, 31} | set(range(6, 28, 3))
    assert all(found[f"blk.{layer}.attn_q.weight"] == "Q4_K" for layer in range(32))


def test_pure_files_have_one_type() -> None:
    found = tensor_types(matrices(), "Q4_K_M", **LLAMA, pure=True)
    assert {kind for name, kind in found.items() if "norm" not in name} == {"Q4_K"}


def test_an_embedding_that_serves_as_output_gets_its_type() -> None:
    tied = [tensor for tensor in matrices() if tensor[0] != "output.weight"]
    assert tensor_types(tied, "Q4_0", **LLAMA)["token_embd.weight"] == "Q6_K"
    assert tensor_types(tied, "Q4_0", **LLAMA, output="Q5_1")["token_embd.weight"] == "Q5_1"
    assert tensor_types(tied, "Q4_0", **LLAMA, output="Q5_1", embedding="Q8_0")["token_embd.weight"] == "Q8_0"
    assert tensor_types(matrices(), "Q4_0", **LLAMA, output="Q5_1")["token_embd.weight"] == "Q4_0"


def test_an_importance_matrix_gives_the_first_layers_of_a_plain_file_a_minimum() -> None:
    plain, weighed = (tensor_types(matrices(), "Q4_0", **LLAMA, imatrix=imatrix) for imatrix in (False, True))
    changed = {name for name in plain if plain[name] != weighed[name]}
    assert changed == {f"blk.{layer}.ffn_down.weight" for layer in range(4)}
    assert {weighed[name] for name in changed} == {"Q4_1"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (64,)),
        ("blk.0.attn_q.bias", (64,)),
        ("blk.0.ffn_gate_inp.weight", (8, 64)),
        ("blk.0.ssm_conv1d.weight", (64, 4)),
        ("position_embd.weight", (64, 64)),
        ("blk.0.time_mix_w1.weight", (64, 64)),
        ("blk.0.ffn_up.weight", (1, 64)),
        ("rope_freqs.weight", (32,)),
    ],
)
def test_what_is_no_matrix_of_a_linear_layer_stays(name: str, shape: tuple[int, ...]) -> None:
    assert not quantizable(name, shape)
    assert tensor_types([(name, shape)], "Q4_0", **LLAMA) == {name: "F32"}


def test_tensors_lie_by_layer_and_then_by_name() -> None:
    names = ["blk.10.a", "output.weight", "blk.2.b", "blk.2.a", "token_embd.weight", "output_norm.weight"]
    assert in_order(names) == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"file_type": "Q3_K_M"}, "no GGUF file type 'Q3_K_M' here"),
        ({"embedding": "Q2_K"}, "token embedding type 'Q2_K' is unknown"),
        ({"output": "q8_0"}, "output tensor type 'q8_0' is unknown"),
        ({"embedding": "Q6_K"}, r"token_embd.weight has rows of 96 weights.*for example Q8_0"),
        ({"output": "Q4_K"}, r"output.weight has rows of 96 weights.*for example Q5_0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    file_type = arguments.pop("file_type", "Q4_0")
    with pytest.raises(InputError, match=message):
        tensor_types(matrices(96), file_type, **LLAMA, **arguments)


def test_file_types_name_tensor_types() -> None:
    assert {name.removesuffix("_S").removesuffix("_M") for name in FILE_TYPES} == set(TYPES)
    assert len(set(FILE_TYPES.values())) == len(FILE_TYPES)
