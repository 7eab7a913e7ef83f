"""Structured configs: every key a recipe may set, its type, its default and what is allowed.

Hydra checks keys and types against these dataclasses while composing; :func:`validate` checks values. Both happen before
anything is loaded.

Variants inherit: a variant's solver field that the recipe leaves out is an interpolation of the top-level ``solver`` field,
so ``solver.bits=3`` on the command line reaches every variant that does not set its own bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING, OmegaConf

from quantize.errors import InputError

STAGES = ("load", "calibrate", "quantize", "export", "evaluate", "report")
CALIBRATION_SOURCES = ("builtin", "text", "wikitext2", "c4", "pile")
# What `quality` means for solver fields left null; docs/gptq.md has the figures these were chosen by.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"search_steps": 20, "gptaq_alpha": 0.0, "tune_epochs": 0},
    "balanced": {"search_steps": 40, "gptaq_alpha": 1.0, "tune_epochs": 0},
    "best": {"search_steps": 40, "gptaq_alpha": 1.0, "tune_epochs": 2},
}
ACTIVATIONS = ("memory", "disk")
INPUT_ACTIVATIONS = ("none", "dynamic", "static")
OBSERVERS = ("minmax", "percentile", "mse")
DTYPES = ("float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass
class ModelConfig:
    """``model``: the checkpoint to quantize."""

    path: str | None = None  # directory | FILE.gguf | hub id; null: the demo model
    compute_dtype: str = "auto"  # of calibration forwards: auto | float32 | bfloat16 | float16


@dataclass
class CalibrationConfig:
    """``calibration``: which text the solvers see."""

    source: str = "builtin"
    path: str | None = None  # text: file or glob; data sets: a local mirror instead of the hub
    num_samples: int = 64
    seq_len: int = 512
    heldout_fraction: float = 0.2
    chat_template: bool = False
    activations: str = "memory"  # memory | disk (spill hidden states; slower, for models larger than RAM)
    batch_tokens: int = 2048  # tokens in one forward


@dataclass
class OverrideConfig:
    """An entry of ``solver.overrides``: another grid for the layers whose full name it matches; the first match counts."""

    match: str = MISSING  # regular expression, searched for in the layer's full name
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass
class SolverConfig:
    """``solver``: how codes are chosen on the grid."""

    name: str = "gptq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    desc_act: bool = True
    static_groups: bool = False
    act_group_aware: bool = False
    damp_percent: float = 0.01
    true_sequential: bool = True
    block_size: int = 128
    outlier_threshold: float = 6.0  # llm_int8
    double_quant: bool = False  # nf4
    # null: as `quality` says
    search_steps: int | None = None
    gptaq_alpha: float | None = None
    tune_epochs: int | None = None
    input_activations: str = "none"  # none | dynamic (8 bits, a scale for each token) | static (8 bits, one scale for all)
    observer: str = "minmax"  # of static ranges: minmax | percentile | mse
    percentile: float = 99.99  # of |x|, for observer=percentile
    smoothquant: bool = False
    smoothquant_alpha: float | None = None  # null: searched for each norm
    lm_head: bool = False
    skip: list[str] = field(default_factory=list)  # besides the routers of experts, which always stay as they are
    overrides: list[OverrideConfig] = field(default_factory=list)


@dataclass
class VariantSolverConfig(SolverConfig):
    """A variant's solver: whatever it does not set comes from the top-level ``solver``."""

    name: str = II("solver.name")
    bits: int = II("solver.bits")
    group_size: int = II("solver.group_size")
    symmetric: bool = II("solver.symmetric")
    desc_act: bool = II("solver.desc_act")
    static_groups: bool = II("solver.static_groups")
    act_group_aware: bool = II("solver.act_group_aware")
    damp_percent: float = II("solver.damp_percent")
    true_sequential: bool = II("solver.true_sequential")
    block_size: int = II("solver.block_size")
    outlier_threshold: float = II("solver.outlier_threshold")
    double_quant: bool = II("solver.double_quant")
    search_steps: int | None = II("solver.search_steps")
    gptaq_alpha: float | None = II("solver.gptaq_alpha")
    tune_epochs: int | None = II("solver.tune_epochs")
    input_activations: str = II("solver.input_activations")
    observer: str = II("solver.observer")
    percentile: float = II("solver.percentile")
    smoothquant: bool = II("solver.smoothquant")
    smoothquant_alpha: float | None = II("solver.smoothquant_alpha")
    lm_head: bool = II("solver.lm_head")
    skip: list[str] = II("solver.skip")
    overrides: list[OverrideConfig] = II("solver.overrides")


@dataclass
class VariantConfig:
    """One artifact: a solver and the container its numbers are written in."""

    solver: VariantSolverConfig = field(default_factory=VariantSolverConfig)
    container: str = "gptq"
    dtype: str | None = None  # of tensors that are not quantized: float32 | bfloat16 | float16; null: as in the checkpoint


@dataclass
class EvalConfig:
    """``eval``: the perplexity protocol."""

    text: str = "builtin"  # builtin (its held-out part) | FILE
    windows: int = 16
    seq_len: int = 1024
    stride: int | None = None  # null: seq_len (windows do not overlap)
    bos: bool = False


@dataclass
class RunConfig:
    """The whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    variants: dict[str, VariantConfig] = field(default_factory=dict)
    quality: str = "balanced"
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    output_dir: str = MISSING
    device: str = "auto"
    seed: int = 0
    debug: bool = False
    log_level: str = "info"


def register_configs() -> None:
    """Make the schema known to Hydra under the name ``schema``."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)


def validate(composed: Any) -> RunConfig:
    """Turn Hydra's composed config into a :class:`RunConfig` whose values are all possible.

    Raises:
        InputError: names the first key with an impossible value, what is allowed, and a value that would work.
    """
    config: RunConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
    _one_of("quality", config.quality, tuple(QUALITIES))
    _one_of("log_level", config.log_level, LOG_LEVELS)
    for stage in config.stages:
        _one_of("stages", stage, STAGES)
    if not config.stages:
        raise InputError(f"stages=[] runs nothing; name some of {', '.join(STAGES)}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        raise InputError(f"device={config.device} is unknown; use auto, cpu, cuda, cuda:0 or mps")
    if config.seed < 0:
        raise InputError(f"seed={config.seed} is negative; use 0 or more")
    _one_of("model.compute_dtype", config.model.compute_dtype, ("auto", "float32", "bfloat16", "float16"))
    _check_calibration(config.calibration)
    check_eval(config.eval)
    if not config.variants:
        raise InputError("variants={} makes nothing; a recipe lists at least one variant")
    for name, variant in config.variants.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(f"variants.{name}: a variant's name becomes a folder; use letters, digits, '.', '_' and '-'")
        _check_variant(f"variants.{name}", variant)
    return config


def _check_calibration(config: CalibrationConfig) -> None:
    _one_of("calibration.source", config.source, CALIBRATION_SOURCES)
    _one_of("calibration.activations", config.activations, ACTIVATIONS)
    if config.source == "text" and not config.path:
        raise InputError("calibration=text needs calibration.path=FILE or a glob like 'texts/*.txt'")
    if config.source == "builtin" and config.path:
        raise InputError(f"calibration.path={config.path} is not used by calibration=builtin; say calibration=text as well")
    _at_least("calibration.num_samples", config.num_samples, 1, 64)
    _at_least("calibration.seq_len", config.seq_len, 2, 512)
    _at_least("calibration.batch_tokens", config.batch_tokens, 1, 2048)
    if not 0 < config.heldout_fraction < 1:
        raise InputError(f"calibration.heldout_fraction={config.heldout_fraction} is not inside (0, 1); use 0.2")


def check_eval(config: EvalConfig) -> None:
    """Refuse an impossible perplexity protocol.

    Raises:
        InputError: names the key, what is allowed, and a value that would work.
    """
    _at_least("eval.windows", config.windows, 1, 16)
    _at_least("eval.seq_len", config.seq_len, 2, 1024)
    if config.stride is not None and not 1 <= config.stride <= config.seq_len:
        raise InputError(f"eval.stride={config.stride} is not in 1..eval.seq_len={config.seq_len}; leave it null or halve it")


def _check_variant(key: str, variant: VariantConfig) -> None:
    # Late, because the registries import torch, and a wrong key elsewhere should be told at once.
    from exports import CONTAINERS
    from quantize.grids import Grid
    from quantize.run import override_grid
    from quantize.solvers import SOLVERS

    solver = variant.solver
    _one_of(f"{key}.solver.name", solver.name, tuple(SOLVERS))
    _one_of(f"{key}.container", variant.container, tuple(CONTAINERS))
    entry = SOLVERS[solver.name]
    # A container whose own program quantizes is for the solvers that name it, and they for it alone.
    delegates = {other.container for other in SOLVERS.values()}
    fits = [name for name, kind in CONTAINERS.items() if name not in delegates and kind.quantized == entry.quantizes]
    fits = [entry.container] if entry.container else fits
    if variant.container not in fits:
        raise InputError(
            f"{key}.container={variant.container} cannot hold what solver.name={solver.name} makes; use {' or '.join(fits)}"
        )
    if variant.dtype is not None:
        _one_of(f"{key}.dtype", variant.dtype, DTYPES)
    if entry.quantizes:
        Grid(solver.bits, solver.group_size, solver.symmetric)
        _check_inputs(key, variant)
    _check_bitsandbytes(f"{key}.solver", solver, entry.container, entry.bits)
    for override in solver.overrides:
        _check_pattern(f"{key}.solver.overrides", override.match)
        override_grid(solver, override)
    if solver.desc_act and solver.act_group_aware:
        raise InputError(
            f"{key}.solver: desc_act and act_group_aware are two orders of the same columns; use act_group_aware=true "
            "with desc_act=false"
        )
    if solver.search_steps is not None and solver.search_steps < 0:
        raise InputError(f"{key}.solver.search_steps={solver.search_steps} is negative; use 0 (min-max), 40 or null")
    if solver.gptaq_alpha is not None and not 0 <= solver.gptaq_alpha <= 1:
        raise InputError(f"{key}.solver.gptaq_alpha={solver.gptaq_alpha} is not in [0, 1]; use 0 (off), 1 (full) or null")
    if solver.tune_epochs is not None and solver.tune_epochs < 0:
        raise InputError(f"{key}.solver.tune_epochs={solver.tune_epochs} is negative; use 0, 2 or null")
    if not 0 < solver.damp_percent < 1:
        raise InputError(f"{key}.solver.damp_percent={solver.damp_percent} is not inside (0, 1); use 0.01")
    _at_least(f"{key}.solver.block_size", solver.block_size, 1, 128)
    for pattern in solver.skip:
        _check_pattern(f"{key}.solver.skip", pattern)


def _check_inputs(key: str, variant: VariantConfig) -> None:
    """What concerns quantized inputs, and the groups a container can store."""
    from exports import CONTAINERS
    from quantize.run import grids_of

    solver, container = variant.solver, CONTAINERS[variant.container]
    _one_of(f"{key}.solver.input_activations", solver.input_activations, INPUT_ACTIVATIONS)
    _one_of(f"{key}.solver.observer", solver.observer, OBSERVERS)
    if not 50 < solver.percentile <= 100:
        raise InputError(f"{key}.solver.percentile={solver.percentile} is not in (50, 100]; use 99.99")
    alpha = solver.smoothquant_alpha
    if alpha is not None and not 0 <= alpha <= 1:
        raise InputError(f"{key}.solver.smoothquant_alpha={alpha} is not in [0, 1]; use 0.5, or null to search")
    if solver.input_activations != "none":
        if not container.quantized_inputs:
            fits = [name for name, entry in CONTAINERS.items() if entry.quantized_inputs]
            raise InputError(
                f"{key}.container={variant.container} has no place for input_activations={solver.input_activations}; "
                f"use {' or '.join(fits)}"
            )
        if any(grid.bits != 8 or not grid.symmetric or grid.group_size != -1 for grid in grids_of(solver)):
            raise InputError(
                f"{key}.solver.input_activations={solver.input_activations} needs bits=8, group_size=-1 and symmetric=true: "
                "kernels multiply whole rows of 8-bit integers"
            )
    ordered = solver.name == "gptq" and solver.desc_act and not solver.static_groups
    if ordered and not container.shuffled_groups and any(grid.group_size != -1 for grid in grids_of(solver)):
        raise InputError(
            f"{key}.container={variant.container} stores groups of consecutive columns; use solver.static_groups=true, or "
            "solver.act_group_aware=true with solver.desc_act=false"
        )


def _check_bitsandbytes(key: str, solver: SolverConfig, program: str | None, bits: int | None) -> None:
    """Refuse an impossible threshold, and what a program that quantizes by itself does not take from a recipe."""
    if not 0 <= solver.outlier_threshold < float("inf"):
        raise InputError(f"{key}.outlier_threshold={solver.outlier_threshold} is not in [0, inf); use 6.0, or 0 for none")
    if program is None:
        return
    if solver.bits != bits:
        raise InputError(f"{key}.bits={solver.bits} is not what {key}.name={solver.name} makes; use {bits}")
    if solver.lm_head:
        raise InputError(f"{key}.lm_head=true, but {program} leaves the output embedding dense; use false")
    if solver.overrides:
        raise InputError(f"{key}.overrides: {program} has one grid for all layers; use [], or solver.skip for dense ones")


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{key}: {pattern!r} is no regular expression ({error})") from error


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{key}={value} is unknown; use one of {', '.join(allowed)}")


def _at_least(key: str, value: int, least: int, example: int) -> None:
    if value < least:
        raise InputError(f"{key}={value} is below {least}; use {example}")
