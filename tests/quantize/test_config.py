"""Recipes: what is refused, what variants inherit, and that every shipped one is sound."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from quantize.checks import validate
from quantize.config import RunConfig, VariantConfig, register_configs
from quantize.errors import InputError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CT = ["variants.gptq.container=compressed-tensors"]
LLM_INT8 = ["solver=llm_int8", "variants.gptq.container=bitsandbytes"]
NF4 = ["solver=nf4", "variants.gptq.container=bitsandbytes"]
SHIPPED = sorted(file.stem for file in (RECIPES / "recipe").glob("*.yaml"))


def recipe(name: str, *overrides: str) -> RunConfig:
    """A validated recipe."""
    register_configs()
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        composed = compose("config", overrides=["output_dir=unused", f"recipe={name}", *overrides])
        return validate(composed)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quality=superb"], ["quality=superb", "fast, balanced, best"]),
        (["log_level=loud"], ["log_level=loud", "debug, info, warning, error"]),
        (["stages=[load,bake]"], ["stages=bake", "use one of load, calibrate, "]),
        (["stages=[]"], ["stages=[]", "load"]),
        (["device=tpu"], ["device=tpu", "cpu", "cuda", "mps"]),
        (["device=cuda:x"], ["device=cuda:x", "cuda:0"]),
        (["seed=-1"], ["seed=-1", "0 or more"]),
        (["model.compute_dtype=int8"], ["model.compute_dtype=int8", "float32", "bfloat16"]),
        (["calibration.source=books"], ["calibration.source=books", "builtin", "wikitext2"]),
        (["calibration.activations=tape"], ["calibration.activations=tape", "memory, disk"]),
        (["calibration=text"], ["calibration=text", "calibration.path"]),
        (["calibration.path=notes.txt"], ["calibration.path=notes.txt", "calibration=text"]),
        (["calibration.num_samples=0"], ["calibration.num_samples=0", "64"]),
        (["calibration.seq_len=1"], ["calibration.seq_len=1", "512"]),
        (["calibration.batch_tokens=0"], ["calibration.batch_tokens=0", "2048"]),
        (["calibration.heldout_fraction=0"], ["calibration.heldout_fraction=0", "(0, 1)", "0.2"]),
        (["calibration.heldout_fraction=1"], ["calibration.heldout_fraction=1", "(0, 1)"]),
        (["calibration.heldout_fraction=nan"], ["calibration.heldout_fraction=nan", "(0, 1)"]),
        (["eval.windows=0"], ["eval.windows=0", "16"]),
        (["eval.seq_len=1"], ["eval.seq_len=1", "1024"]),
        (["eval.stride=0"], ["eval.stride=0", "1..eval.seq_len=1024"]),
        (["eval.protocol=c4"], ["eval.protocol=c4", "windows, gptq, llamacpp, strided, wikitext"]),
        (["eval=gptq", "eval.bos=true"], ["eval.bos=true", "eval.protocol=gptq", "windows or strided"]),
        (["eval.windows=-2"], ["eval.windows=-2", "16"]),
        (["eval.top_k=0"], ["eval.top_k=0", "256"]),
        (["eval.stride=1025"], ["eval.stride=1025", "1..eval.seq_len=1024"]),
        (["~variants.gptq"], ["variants={}"]),
        (["variants.gptq.container=zip"], ["variants.gptq.container=zip", "safetensors", "gptq"]),
        (["solver.name=magic"], ["variants.gptq.solver.name=magic", "none, rtn, gptq"]),
        (["solver=none"], ["variants.gptq.container=gptq", "solver.name=none", "safetensors"]),
        (["variants.gptq.container=safetensors"], ["variants.gptq.container=safetensors", "use gptq"]),
        (["solver.bits=5"], ["solver.bits=5", "2, 3, 4, 8"]),
        (["solver.group_size=0"], ["solver.group_size=0", "-1", "128"]),
        (["solver.group_size=-2"], ["solver.group_size=-2", "-1"]),
        (["solver.damp_percent=0"], ["solver.damp_percent=0", "(0, 1)", "0.01"]),
        (["solver.damp_percent=1"], ["solver.damp_percent=1", "(0, 1)"]),
        (["solver.damp_percent=nan"], ["solver.damp_percent=nan", "(0, 1)"]),
        (["solver.block_size=0"], ["solver.block_size=0", "128"]),
        (["solver=llm_int8"], ["variants.gptq.container=gptq", "solver.name=llm_int8", "use bitsandbytes"]),
        (["solver=nf4", "variants.gptq.container=safetensors"], ["container=safetensors", "use bitsandbytes"]),
        (["variants.gptq.container=bitsandbytes"], ["variants.gptq.container=bitsandbytes", "solver.name=gptq", "use gptq"]),
        (["solver=none", "variants.gptq.container=bitsandbytes"], ["container=bitsandbytes", "use safetensors"]),
        ([*LLM_INT8, "solver.bits=4"], ["variants.gptq.solver.bits=4", "name=llm_int8", "use 8"]),
        ([*NF4, "solver.bits=8"], ["variants.gptq.solver.bits=8", "name=nf4", "use 4"]),
        ([*NF4, "solver.lm_head=true"], ["variants.gptq.solver.lm_head=true", "bitsandbytes", "use false"]),
        ([*NF4, "solver.overrides=[{match: x, bits: 8}]"], ["variants.gptq.solver.overrides", "use []", "solver.skip"]),
        (["solver.input_activations=always"], ["solver.input_activations=always", "none, dynamic, static"]),
        (["solver.observer=entropy"], ["solver.observer=entropy", "minmax, percentile, mse"]),
        (["solver.percentile=40"], ["solver.percentile=40.0", "(50, 100]", "99.99"]),
        (["solver.smoothquant_alpha=2"], ["solver.smoothquant_alpha=2.0", "[0, 1]", "null"]),
        (["solver.input_activations=dynamic"], ["container=gptq", "input_activations=dynamic", "use compressed-tensors"]),
        ([*CT, "solver=rtn", "solver.input_activations=static"], ["static", "bits=8, group_size=-1 and symmetric=true"]),
        (CT, ["container=compressed-tensors", "consecutive columns", "static_groups=true"]),
        ([*LLM_INT8, "solver.bits=8", "solver.smoothquant=true"], ["smoothquant=true", "bitsandbytes", "use false"]),
        (["variants.gptq.dtype=float8"], ["variants.gptq.dtype=float8", "float32, bfloat16, float16"]),
        (["solver.outlier_threshold=-1"], ["variants.gptq.solver.outlier_threshold=-1.0", "[0, inf)", "6.0"]),
        (["solver.outlier_threshold=nan"], ["variants.gptq.solver.outlier_threshold=nan", "6.0"]),
        (["solver.outlier_threshold=inf"], ["variants.gptq.solver.outlier_threshold=inf", "6.0"]),
        (["solver.skip=['(']"], ["variants.gptq.solver.skip", "'('", "regular expression"]),
    ],
)
def test_an_impossible_value_is_refused_with_its_key_and_what_is_allowed(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        recipe("gptq", *overrides)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "two words", "-x"])
def test_a_variant_that_could_not_be_a_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="becomes a folder"):
        validate(OmegaConf.structured(RunConfig(output_dir="unused", variants={name: VariantConfig()})))


@pytest.mark.parametrize("name", ["a-b_c.1", "4bit", "X"])
def test_a_variant_may_have_a_name_of_ones_own(name: str) -> None:
    config = validate(OmegaConf.structured(RunConfig(output_dir="unused", variants={name: VariantConfig()})))
    assert config.variants[name].solver.bits == 4


@pytest.mark.parametrize(
    "overrides",
    [
        ["device=cuda:1"],
        ["device=mps"],
        ["eval.stride=1024"],
        ["eval.stride=1"],
        ["calibration=c4", "calibration.path=mirror"],
        ["calibration=text", "calibration.path=notes.txt"],
        ["solver.group_size=-1"],
        ["solver.skip=[down_proj]"],
        [*CT, "solver.static_groups=true"],
        [*CT, "solver.desc_act=false"],
        [*CT, "solver.group_size=-1"],
        [
            *CT,
            "solver=rtn",
            "solver.bits=8",
            "solver.group_size=-1",
            "solver.symmetric=true",
            "solver.input_activations=static",
        ],
        ["variants.gptq.dtype=bfloat16"],
        [*LLM_INT8, "solver.outlier_threshold=0"],
        [*NF4, "solver.double_quant=true", "solver.skip=[down_proj]"],
        ["stages=[evaluate,report]"],
    ],
)
def test_values_at_the_edge_of_what_is_allowed_pass(overrides: list[str]) -> None:
    recipe("gptq", *overrides)


def test_variants_take_from_the_top_level_solver_what_they_do_not_set() -> None:
    variants = recipe("demo", "solver.bits=3", "solver.group_size=32", "solver.skip=[o_proj]").variants
    assert {name: variant.solver.bits for name, variant in variants.items()} == {
        "fp16": 3,  # of no effect: its solver leaves weights as they are
        "int8": 8,
        "int4-rtn": 3,
        "int4-gptq": 3,
    }
    assert variants["int8"].solver.group_size == -1
    assert variants["int4-rtn"].solver.group_size == 32
    assert all(variant.solver.skip == ["o_proj"] for variant in variants.values())


def test_every_solver_field_is_inherited() -> None:
    changed = {
        "bits": "8",
        "group_size": "-1",
        "symmetric": "true",
        "desc_act": "false",
        "static_groups": "true",
        "act_group_aware": "true",
        "search_steps": "3",
        "gptaq_alpha": "0.5",
        "tune_epochs": "1",
        "input_activations": "dynamic",
        "observer": "mse",
        "percentile": "99.0",
        "smoothquant": "true",
        "smoothquant_alpha": "0.5",
        "alpha_steps": "10",
        "search_loss": "module",
        "lm_head": "true",
        "overrides": "[{match: x, bits: 8}]",
        "damp_percent": "0.5",
        "true_sequential": "false",
        "block_size": "7",
        "skip": "[x]",
        "outlier_threshold": "4.5",
        "double_quant": "true",
        "refits": "1",
        "bit_choices": "[3, 8]",
        "sensitivity": "measured",
        "sensitivity_windows": "2",
    }
    config = recipe("gptq", *CT, "solver=rtn", *(f"solver.{key}={value}" for key, value in changed.items()))
    assert vars(config.variants["gptq"].solver) == vars(config.solver)
    budgets = {"budget_bits": 4.5, "budget_bytes": 9000}  # one at a time, and not beside a quantized output embedding
    assert set(vars(config.solver)) == {"name", *changed, *budgets}
    for key, value in budgets.items():
        assert getattr(recipe("gptq", f"solver.{key}={value}").variants["gptq"].solver, key) == value


def test_a_variant_can_be_set_on_the_command_line() -> None:
    variants = recipe("demo", "solver.bits=3", "variants.int4-rtn.solver.bits=2").variants
    assert (variants["int4-rtn"].solver.bits, variants["int4-gptq"].solver.bits) == (2, 3)


def test_the_shipped_recipes_are_these() -> None:
    assert SHIPPED == [
        "awq",
        "awq_7b",
        "demo",
        "fp16",
        "gguf_7b",
        "gguf_q4_0",
        "gguf_q4_k",
        "gptq",
        "gptq_7b",
        "gptq_ablation",
        "int8",
        "llm_int8",
        "mixed",
        "nf4",
        "precisions",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_sound(name: str) -> None:
    config = recipe(name)
    assert config.variants
    assert "${" not in OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def test_recipes_hold_what_they_promise() -> None:
    assert list(recipe("demo").variants) == ["fp16", "int8", "int4-rtn", "int4-gptq"]
    large = recipe("gptq_7b")
    assert (large.calibration.source, large.calibration.num_samples, large.calibration.seq_len) == ("c4", 128, 2048)
    assert (large.solver.bits, large.solver.group_size, large.calibration.activations) == (4, 128, "disk")
    large = recipe("awq_7b")
    assert (large.calibration.source, large.calibration.num_samples, large.calibration.seq_len) == ("pile", 128, 512)
    assert (large.solver.name, large.solver.bits, large.solver.group_size) == ("awq", 4, 128)
    assert large.variants["awq"].container == "awq"
    both = recipe("awq", "solver=awq+gptq").variants["awq"].solver
    assert (both.name, both.static_groups) == ("awq+gptq", True)
    int8 = recipe("int8").variants["int8"].solver
    assert (int8.name, int8.bits, int8.group_size, int8.symmetric) == ("rtn", 8, -1, True)
    for name, variant, bits in (("llm_int8", "llm-int8", 8), ("nf4", "nf4", 4)):
        made = recipe(name).variants[variant]
        assert (made.solver.name, made.solver.bits, made.container) == (name, bits, "bitsandbytes")


def test_command_line_wins_over_the_recipe() -> None:
    config = recipe("gptq_7b", "calibration=wikitext2", "solver.group_size=64", "model.path=here")
    assert (config.calibration.source, config.calibration.num_samples) == ("wikitext2", 128)
    assert (config.solver.group_size, config.model.path) == (64, "here")


@pytest.mark.parametrize("name", sorted(file.stem for file in (RECIPES / "eval").glob("*.yaml")))
def test_every_shipped_protocol_is_sound(name: str) -> None:
    config = recipe("demo", f"eval={name}").eval
    assert config.protocol == ("windows" if name == "perplexity" else name)
    assert config.windows == (16 if name == "perplexity" else -1)


def test_shipped_limits_are_sound_and_ever_looser() -> None:
    limits = [recipe("demo", f"gate={name}").gate for name in ("strict", "standard", "loose")]
    assert {file.stem for file in (RECIPES / "gate").glob("*.yaml")} == {"none", "strict", "standard", "loose"}
    for tight, loose in itertools.pairwise(limits):
        assert tight.ppl_ratio and loose.ppl_ratio and 1 < tight.ppl_ratio < loose.ppl_ratio
        assert tight.kld_mean and loose.kld_mean and 0 < tight.kld_mean < loose.kld_mean
        assert tight.top1_agreement and loose.top1_agreement and 1 > tight.top1_agreement > loose.top1_agreement
